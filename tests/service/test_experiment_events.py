"""An experiment's events out of its runs' own: none is missed, however runs are committed."""

from datetime import timedelta

import pytest

from service import db, experiment_events, runs
from service.db import RunState, horizon
from service.errors import ServiceError
from service.runs.writing import state_event

KEYS = ("pretrain/pcrl/0", "pretrain/pcrl/1", "finetune/pcrl/100%/0", "finetune/pcrl/100%/1")


@pytest.fixture
def made(sessions):
    """The id of an experiment whose two pretrainings are queued, and these runs' ids."""
    with sessions() as session:
        dataset = db.Dataset(id=db.new_id("ds"), name="d", digest="0" * 64, created_by="t")
        session.add(dataset)
        session.flush()
        experiment = db.Experiment(
            id=db.new_id("exp"), name="e", source_dataset_id=dataset.id,
            target_dataset_id=dataset.id, plan={}, created_by="t",
        )  # fmt: skip
        session.add(experiment)
        session.flush()
        run_ids = []
        for key in KEYS:
            run_id = None
            if key.startswith("pretrain"):
                run_id = runs.create(session, kind="pretrain", spec={}, principal="t").id
                run_ids.append(run_id)
            session.add(db.ExperimentCell(experiment_id=experiment.id, key=key, run_id=run_id))
        session.commit()
        return experiment.id, run_ids


@pytest.fixture(autouse=True)
def _no_margin(monkeypatch):
    monkeypatch.setattr(horizon, "_MARGIN", timedelta(0))


def look(sessions, experiment_id, after=0):
    return experiment_events.read(sessions, experiment_id, after)


def test_how_far_the_whole_is_by_stage_and_by_state(sessions, made):
    experiment_id, (first, _) = made
    with sessions() as session:
        lease = runs.claim(session, first, "train", "w")
        runs.started(session, lease)
        runs.record(session, lease, "progress", {"stage": "pretrain", "fraction": 0.25})
        going = look(sessions, experiment_id).progress
        error = {"code": "non_finite_loss", "detail": "of step 3"}
        runs.finish(session, lease, RunState.FAILED, outcome="error", error=error)
        cell = session.get(db.ExperimentCell, (experiment_id, KEYS[2]))
        cell.error = {"code": "pretraining_failed", "detail": "x"}
        session.commit()
    found = look(sessions, experiment_id)

    (held,) = going.running
    assert (held.key, held.run_id, held.progress.fraction) == (KEYS[0], first, 0.25)
    assert going.counts == {"running": 1, "queued": 1, "waiting": 2}
    assert (going.stage, going.num_ended, going.finished_at) == ("pretrain", 0, None)
    now = found.progress
    assert now.counts == {"failed": 2, "queued": 1, "waiting": 1} and now.running == ()
    stages = {name: (one.num_ended, one.num_trainings) for name, one in now.stages.items()}
    assert stages == {"pretrain": (1, 2), "finetune": (1, 2)} and now.fraction == 0.5
    told = [(one.key, one.state) for one in found.trainings]
    assert told == [(KEYS[0], "queued"), (KEYS[1], "queued")] + [
        (KEYS[0], state) for state in ("starting", "running", "failed")
    ]
    assert found.trainings[-1].error.code == "non_finite_loss"
    assert found.id == found.trainings[-1].id
    assert look(sessions, experiment_id, found.id).trainings == ()


def test_what_is_committed_out_of_turn_is_told_to_who_resumes(sessions, made):
    experiment_id, (one, other) = made
    before = look(sessions, experiment_id)
    with sessions() as slow, sessions() as fast:
        if slow.get_bind().dialect.name != "postgresql":
            pytest.skip("SQLite has one writer at a time")
        state_event(slow, one, RunState.STARTING, 1)  # numbered, and not there yet
        state_event(fast, other, RunState.STARTING, 1)
        fast.commit()
        early = look(sessions, experiment_id, before.id)
        slow.commit()
    late = look(sessions, experiment_id, early.id)

    (quick,) = early.trainings
    assert quick.run_id == other and early.id == before.id  # told, and not yet behind us
    assert [event.run_id for event in late.trainings] == [one, other]
    assert late.trainings[0].id < quick.id == late.id
    naive = look(sessions, experiment_id, quick.id)  # the control: what its own number would lose
    assert naive.trainings == ()


def test_nobody_sees_an_experiment_that_is_not_there(sessions, made):
    with pytest.raises(ServiceError, match="no experiment has this id"):
        look(sessions, f"exp_{'0' * 32}")
    with db.of_project(sessions, "prj_other")() as session, pytest.raises(ServiceError):
        experiment_events.look(session, made[0], 0)
    with db.of_project(sessions, db.DEFAULT_PROJECT)() as session:  # the control
        assert len(experiment_events.look(session, made[0], 0).trainings) == 2
