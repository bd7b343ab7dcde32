"""The planner of experiments: idempotent, complete, and honest about what cannot be done."""

import json
import threading
from collections import Counter

import anyio
import numpy as np
import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import OperationalError

from models.experiment import render
from models.experiment.cases import FILE, CaseResult, CaseResults
from models.experiment.plan import Method, Plan
from service import (
    datasets,
    db,
    experiment_reports,
    experiment_summary,
    experiments,
    migrate,
    registry,
    runs,
    upkeep,
)
from service.db import RunState
from service.errors import ServiceError
from service.runs import NewArtifact, NewVersion
from service.storage import Store

NETWORK = {"base_width": 2}
SHA = "0" * 64


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data")


@pytest.fixture
def session(sessions):
    with sessions() as session:
        yield session


def plan(**fields) -> Plan:
    given = {
        "methods": [
            {"name": "pcrl", "pretrain": {"kind": "pretrain", "network": NETWORK}},
            {"name": "scratch"},
        ],
        "finetune": {"kind": "finetune", "network": NETWORK, "labels": {"liver": 1}},
        "ratios": [0.5],
        "seeds": [0, 1],
    }
    return Plan.model_validate({**given, **fields})


def volume(session, subject, kind="image"):
    row = db.Volume(
        id=db.new_id("vol"),
        kind=kind,
        subject=subject,
        modality="CT",
        format="nifti",
        shape=[8, 8, 8],
        spacing_mm=[1.0, 1.0, 1.0],
        affine=np.eye(4).tolist(),
        source_shape=[8, 8, 8],
        source_affine=np.eye(4).tolist(),
        original_sha256=SHA,
        voxels_sha256=SHA,
        intake={},
        series_selector=db.new_id("s"),
        created_by="t",
    )
    session.add(row)
    session.flush()
    return row.id


def dataset(session, name, splits, *, labelled=True):
    db.insert_if_absent(session, db.Blob, sha256=SHA, size_bytes=1)
    items = []
    for subject, split in splits.items():
        labels = volume(session, subject, "labels") if labelled else None
        items.append(datasets.Item(volume(session, subject), labels, split))
    return datasets.create(session, name=name, items=items, principal="t").id


@pytest.fixture
def world(session):
    """A source and a target that share no subject."""
    source = dataset(session, "LUNA", {"u1": "train", "u2": "train"}, labelled=False)
    target = dataset(session, "LiTS", {"a": "train", "b": "val", "c": "test", "d": "test"})
    session.commit()
    return source, target


def create(session, world, asked=None):
    made, queued = experiments.create(
        session,
        name="Liver",
        source_dataset_id=world[0],
        target_dataset_id=world[1],
        plan=asked or plan(),
        principal="t",
    )
    session.commit()
    return made, queued


def states(session, experiment):
    row = experiments.get(session, experiment.id)
    return {one.cell.key: one.state for one in experiments.standings(session, row)}


def work(session, store, *, fails=(), limit=1000, score=0.5):
    """Be the worker: take runs by turn and end them, as `trainer.tasks` does."""
    done = []
    while len(done) < limit and (lease := runs.claim(session, None, "train", "w")) is not None:
        key = lease.spec["experiment"]["cell"]
        done.append(key)
        runs.started(session, lease)
        if key in fails:
            error = {"code": "non_finite_loss", "detail": "of step 3"}
            runs.finish(session, lease, RunState.FAILED, outcome="error", error=error)
        else:
            _succeed(session, store, lease, key, score)
        experiments.advance_after(session, lease.run_id)
    return done


def _succeed(session, store, lease, key, score):
    artifacts = ()
    kind = "encoder"
    if lease.kind == "finetune":
        kind = "segmenter"
        cases = tuple(
            CaseResult(case_id=at, subject=at, values={"liver": score + 0.01 * len(key)})
            for at in ("c", "d")
        )
        results = CaseResults(measure="dice", labels=("liver",), cases=cases)
        path = store.tmp / FILE
        path.write_text(results.model_dump_json())
        artifacts = (NewArtifact(FILE, *store.put_file(path), "application/json"),)
    name = lease.spec["model_name"]
    new = NewVersion(name=name, kind=kind, digest=lease.run_id[4:] * 2, manifest={})
    runs.finish(
        session, lease, RunState.SUCCEEDED, outcome="done", artifacts=artifacts, register=new
    )


def test_what_needs_no_pretraining_is_queued_at_once_and_the_rest_follows(session, store, world):
    made, queued = create(session, world)

    assert {run.spec["experiment"]["cell"] for run in queued} == {
        "pretrain/pcrl/0",
        "pretrain/pcrl/1",
        "finetune/scratch/50%/0",
        "finetune/scratch/50%/1",
    }
    assert states(session, made)["finetune/pcrl/50%/0"] == "waiting"
    done = work(session, store)

    assert set(states(session, made).values()) == {"succeeded"}
    assert len(done) == len(set(done)) == 6
    by_key = {
        one.cell.key: one.run
        for one in experiments.standings(session, experiments.get(session, made.id))
    }
    tuned, encoder = by_key["finetune/pcrl/50%/1"], by_key["pretrain/pcrl/1"]
    assert tuned.spec["parent"] == registry.of_run(session, encoder.id).digest
    assert tuned.spec["recipe"]["labelled"] == {"ratio": 0.5, "seed": 1}
    assert (encoder.dataset_id, tuned.dataset_id) == world
    summary = experiment_summary.summary(session, made)
    assert (summary.state, summary.num_ended) == ("succeeded", 6)
    assert summary.finished_at is not None


def test_upkeep_does_what_a_killed_worker_left_undone(session, sessions, store, world):
    made, _ = create(session, world)
    work(session, store)
    later = experiments.extend(session, made.id, seeds=(2,))
    session.commit()
    keys = [run.spec["experiment"]["cell"] for run in later]
    assert sorted(keys) == ["finetune/scratch/50%/2", "pretrain/pcrl/2"]
    lease = runs.claim(session, None, "train", "w")
    assert lease.spec["experiment"]["cell"] == "pretrain/pcrl/2"
    _succeed(session, store, lease, "pretrain/pcrl/2", 0.5)  # killed before it planned
    assert states(session, made)["finetune/pcrl/50%/2"] == "waiting"
    session.commit()

    upkeep.plan(sessions)

    assert states(session, made)["finetune/pcrl/50%/2"] == "queued"
    session.commit()
    upkeep.plan(sessions)
    assert session.scalar(select(func.count()).select_from(db.Run)) == 9


def test_two_who_plan_at_once_make_every_run_once(session, sessions, store, world):
    made, _ = create(session, world)
    session.execute(db.ExperimentCell.__table__.update().values(run_id=None))
    session.commit()
    before = session.scalar(select(func.count()).select_from(db.Run))
    session.commit()
    counts, barrier = [], threading.Barrier(4)

    def plan_once():
        with sessions() as own:
            barrier.wait()
            counts.append(len(experiments.advance(own, made.id)))
            own.commit()

    threads = [threading.Thread(target=plan_once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(counts) == [0, 0, 0, 4]
    assert session.scalar(select(func.count()).select_from(db.Run)) == before + 4


def test_a_failed_pretraining_fails_what_needs_it_with_the_reason(session, store, world):
    made, _ = create(session, world)

    work(session, store, fails=("pretrain/pcrl/1",))

    found = {
        one.cell.key: one
        for one in experiments.standings(session, experiments.get(session, made.id))
    }
    failed = found["finetune/pcrl/50%/1"]
    assert (failed.state, failed.error["code"]) == ("failed", "pretraining_failed")
    assert "non_finite_loss" in failed.error["detail"] and failed.run is None
    assert found["finetune/pcrl/50%/0"].state == "succeeded"
    assert experiment_summary.summary(session, made).state == "failed"
    told, _ = experiment_reports.built(experiment_reports.read(session, made), store)
    assert [one.key for one in told.missing] == ["pretrain/pcrl/1", "finetune/pcrl/50%/1"]
    again = experiments.extend(session, made.id, retry=True)
    session.commit()
    assert [run.spec["experiment"]["cell"] for run in again] == ["pretrain/pcrl/1"]
    work(session, store)
    assert set(states(session, made).values()) == {"succeeded"}


def test_without_its_encoder_a_finetuning_fails_and_never_starts_from_nothing(
    session, store, world
):
    made, _ = create(session, world)
    lease = runs.claim(session, None, "train", "w")
    key = lease.spec["experiment"]["cell"]
    _succeed(session, store, lease, key, 0.5)
    session.execute(db.ModelVersion.__table__.delete())
    session.commit()

    experiments.advance_after(session, lease.run_id)

    tuned = f"finetune/pcrl/50%/{key.rpartition('/')[2]}"
    assert states(session, made)[tuned] == "failed"


def test_a_plan_of_a_newer_version_stops_nobody(session, sessions, store, world, caplog):
    made, _ = create(session, world)
    made.plan = {**made.plan, "of_a_newer_version": 1}
    session.add(db.ExperimentCell(experiment_id=made.id, key="x"))
    session.commit()

    upkeep.plan(sessions)

    assert "plan_unreadable" in caplog.text
    with pytest.raises(ServiceError) as refused:
        experiments.standings(session, made)
    assert refused.value.code == "plan_unreadable"
    session.commit()


def test_how_far_a_page_of_experiments_is_takes_one_count(session, store, world):
    made = [create(session, world)[0] for _ in range(3)]
    work(session, store, limit=3, fails=("pretrain/pcrl/1",))
    experiments.cancel(session, made[1].id)
    session.commit()
    slow = {one.id: Counter(s.state for s in experiments.standings(session, one)) for one in made}
    asked = []
    note = lambda _c, _cursor, statement, *_rest: asked.append(statement)  # noqa: E731
    event.listen(session.get_bind(), "before_cursor_execute", note)

    found = experiment_summary.summaries(session, made)

    event.remove(session.get_bind(), "before_cursor_execute", note)
    assert {key: one.counts for key, one in found.items()} == slow
    assert len(asked) == 1 and "spec" not in asked[0]
    assert [found[one.id].state for one in made].count("canceled") == 1
    assert {"succeeded", "canceled", "waiting"} <= {s for counts in slow.values() for s in counts}


def test_an_experiment_that_cannot_be_planned_holds_up_no_other(
    session, sessions, store, world, monkeypatch, caplog
):
    made = [create(session, world)[0] for _ in range(2)]
    session.execute(db.ExperimentCell.__table__.update().values(run_id=None))
    session.commit()
    broken, whole = experiments.waiting(session)
    session.commit()
    plan_of = experiments.plan_of

    def breaks(experiment):
        if experiment.id == broken:
            raise KeyError("patient Smith")
        return plan_of(experiment)

    monkeypatch.setattr(experiments, "plan_of", breaks)
    upkeep.plan(sessions)
    monkeypatch.undo()

    by_id = {one.id: one for one in made}
    assert "queued" in states(session, by_id[whole]).values()
    assert set(states(session, by_id[broken]).values()) == {"waiting"}
    assert broken in caplog.text and "KeyError" in caplog.text and "Smith" not in caplog.text


@pytest.mark.services
def test_upkeep_and_workers_pass_by_an_experiment_that_another_holds(postgres_url):
    migrate.upgrade(postgres_url)
    engine = db.connect(postgres_url)
    sessions = db.sessions(engine)
    with sessions() as session:
        world = (
            dataset(session, "LUNA", {"u1": "train"}, labelled=False),
            dataset(session, "LiTS", {"a": "train", "d": "test"}),
        )
        held, free = (create(session, world)[0].id for _ in range(2))
        session.execute(db.ExperimentCell.__table__.update().values(run_id=None))
        session.commit()
    with sessions() as other, sessions() as session:
        other.execute(select(db.Experiment).where(db.Experiment.id == held).with_for_update())
        session.execute(text("SET lock_timeout = '2s'"))  # else what is wrong would hang here

        assert experiments.advance(session, held) == []
        session.commit()
        upkeep.plan(sessions)

        begun = select(db.ExperimentCell.experiment_id).where(db.ExperimentCell.run_id.is_not(None))
        assert set(session.scalars(begun)) == {free}
        with pytest.raises(OperationalError):  # the control: the row is locked
            experiments.cancel(session, held)
    engine.dispose()


def test_a_canceled_experiment_begins_nothing_and_keeps_what_is_done(session, store, world):
    made, _ = create(session, world)
    (first,) = work(session, store, limit=1)

    experiments.cancel(session, made.id)
    session.commit()

    found = states(session, made)
    assert found.pop(first) == "succeeded"
    assert set(found.values()) == {"canceled"}
    assert experiments.waiting(session) == []
    with pytest.raises(ServiceError) as ended:
        experiments.cancel(session, made.id)
    assert ended.value.code == "run_already_ended"
    with pytest.raises(ServiceError) as refused:
        experiments.extend(session, made.id, seeds=(7,))
    assert refused.value.code == "experiment_canceled"
    experiments.extend(session, made.id, retry=True)
    session.commit()
    work(session, store)
    assert set(states(session, made).values()) == {"succeeded"}


def test_a_retry_waits_for_what_is_being_canceled_and_then_loses_nothing(session, store, world):
    made, _ = create(session, world)
    lease = runs.claim(session, None, "train", "w")
    runs.started(session, lease)
    experiments.cancel(session, made.id)
    session.commit()
    before = states(session, made)
    assert before[lease.spec["experiment"]["cell"]] == "canceling"

    with pytest.raises(ServiceError) as refused:
        experiments.extend(session, made.id, retry=True)

    session.rollback()
    assert (refused.value.status, refused.value.code) == (409, "experiment_canceling")
    assert states(session, made) == before
    runs.finish(session, lease, RunState.CANCELED, outcome="canceled")
    experiments.advance_after(session, lease.run_id)
    experiments.extend(session, made.id, retry=True)
    session.commit()
    work(session, store)
    assert set(states(session, made).values()) == {"succeeded"}


def test_the_report_is_the_same_however_the_runs_came(session, store, world, tmp_path):
    told = []
    for interrupted in (False, True):
        made, _ = create(session, world)
        if interrupted:
            while work(session, store, limit=1):
                lost = runs.claim(session, None, "train", "lost")
                if lost is not None:  # its worker goes away and the run is taken again
                    runs.give_back(session, lost, "preempted")
                experiments.advance(session, made.id)
                session.commit()
        else:
            work(session, store)
        facts = experiment_reports.read(session, made)
        report, outcomes = experiment_reports.built(facts, store)
        told.append((report.model_dump_json(), render.cases_csv(report.plan, outcomes)))

    assert told[0] == told[1]
    report = json.loads(told[0][0])
    assert (report["source"], report["target"], report["num_patients"]) == ("LUNA", "LiTS", 2)


def test_an_extension_keeps_what_is_done(session, store, world):
    made, _ = create(session, world)
    work(session, store)

    experiments.extend(session, made.id, methods=(Method(name="late"),), ratios=(1.0,), seeds=(2,))
    session.commit()
    done = work(session, store)

    found = states(session, made)
    assert set(found.values()) == {"succeeded"} and len(found) == 3 + 3 * 2 * 3
    assert len(done) == len(found) - 6
    with pytest.raises(ServiceError) as refused:
        experiments.extend(session, made.id, methods=(Method(name="pcrl"),))
    assert refused.value.code == "invalid_request"


def test_a_pretraining_that_would_see_test_patients_is_refused(session, world):
    leaking = dataset(session, "all", {"c": "train", "u": "train"}, labelled=False)

    with pytest.raises(ServiceError) as refused:
        create(session, (leaking, world[1]))

    assert refused.value.code == "split_leaks_subject"
    create(session, (world[1], world[1]))  # the control: its own train split is fine
    only_scratch = plan(methods=[{"name": "scratch"}])
    create(session, (leaking, world[1]), only_scratch)


def test_a_target_that_cannot_judge_is_refused_and_one_in_use_stays(session, world):
    untested = dataset(session, "no test", {"a": "train", "b": "val"})

    with pytest.raises(ServiceError) as refused:
        create(session, (world[0], untested))
    assert refused.value.code == "dataset_without_labels"
    session.rollback()
    create(session, world)
    with pytest.raises(ServiceError) as kept:
        datasets.delete(session, world[1])
    assert kept.value.code == "dataset_in_use" and "1 experiments" in kept.value.detail


def test_the_last_reports_are_kept_and_no_more(monkeypatch):
    made = []
    monkeypatch.setattr(experiment_reports, "_texts", lambda facts, _: made.append(facts) or {})
    a, b, c = (experiment_reports.Facts(name, "s", "t", "{}", ()) for name in "abc")

    async def ask():
        reports = experiment_reports.Reports(kept=2)
        for facts in (a, b, a, c, a, b):
            await reports.texts(facts, None)

    anyio.run(ask)
    assert made == [a, b, c, b]  # b made room for c, and a was asked for since
