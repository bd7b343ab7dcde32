"""Runs: every accepted run ends exactly once, whatever workers, messages and clocks do."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text, update

from service import db, runs
from service.db import Run, RunState, db_now
from service.errors import ServiceError
from service.runs import Fenced, NewArtifact, NewVersion

ERROR = {"code": "training_error", "detail": "it failed"}


@pytest.fixture
def session(sessions):
    with sessions() as session:
        yield session


def queue_run(session, kind="segment", **changes):
    run = runs.create(session, kind=kind, spec={"n": 1}, principal="tok_test", **changes)
    session.commit()
    return run.id


def claim(session, queue="inference", worker="w1", lease_s=30.0):
    return runs.claim(session, None, queue, worker, lease_s=lease_s)


def state_of(session, run_id):
    return runs.get(session, run_id).state


def expire(session, run_id, *, seconds=60.0):
    """As if the worker had been silent for so long."""
    session.execute(
        update(Run)
        .where(Run.id == run_id)
        .values(
            lease_until=db_now(-seconds),
            suspect_at=None if seconds < 1 else Run.suspect_at,
        )
    )
    session.commit()


def lose(session, run_id):
    """Two sweeps with the suspicion in between."""
    expire(session, run_id)
    runs.reap(session, suspect_s=0.0)
    time.sleep(0.01)
    return runs.reap(session, suspect_s=0.0)


def test_a_run_goes_from_queued_to_succeeded(session):
    run_id = queue_run(session)
    lease = claim(session)
    assert state_of(session, run_id) == "starting"
    runs.started(session, lease)
    assert state_of(session, run_id) == "running"

    runs.finish(session, lease, RunState.SUCCEEDED, result={"x": 1}, outcome="done")

    run = runs.get(session, run_id)
    assert (run.state, run.result, run.lease_owner) == ("succeeded", {"x": 1}, None)
    assert run.finished_at >= run.started_at >= run.created_at
    states = [event.data["state"] for event in runs.events_after(session, run_id)]
    assert states == ["queued", "starting", "running", "succeeded"]
    (attempt,) = runs.attempts(session, run_id)
    assert (attempt.fence, attempt.outcome) == (1, "done")


def test_four_workers_claim_two_hundred_runs_once_each(sessions):
    with sessions() as session:
        expected = {
            runs.create(session, kind="segment", spec={}, principal="t").id for _ in range(200)
        }
        session.commit()
    start = threading.Barrier(4)

    def work(name):
        start.wait()
        taken = []
        while True:
            with sessions() as session:
                lease = runs.claim(session, None, "inference", name)
            if lease is None:
                return taken
            taken.append(lease.run_id)

    with ThreadPoolExecutor(4) as pool:
        taken = [run_id for part in pool.map(work, "abcd") for run_id in part]

    assert Counter(taken) == Counter(expected)


def test_the_best_run_goes_first_whatever_the_message_says(session):
    late = queue_run(session)
    urgent = queue_run(session, priority=5)
    queue_run(session, kind="pretrain", priority=9)

    order = [runs.claim(session, late, "inference", "w").run_id for _ in range(2)]

    assert order == [urgent, late]
    assert claim(session) is None


def test_a_message_delivered_five_times_is_claimed_once(session):
    run_id = queue_run(session)

    claims = [runs.claim(session, run_id, "inference", "w") for _ in range(5)]

    assert sum(lease is not None for lease in claims) == 1
    assert runs.get(session, run_id).attempt == 1


def test_a_late_worker_can_write_nothing(session):
    run_id = queue_run(session)
    late = claim(session, worker="frozen")
    runs.started(session, late)
    assert lose(session, run_id) == [run_id]
    fresh = claim(session, worker="fresh")
    runs.started(session, fresh)

    assert runs.heartbeat(session, late) == runs.Beat(alive=False, cancel_requested=False)
    for write in (
        lambda: runs.started(session, late),
        lambda: runs.record(session, late, "progress", {"step": 1}),
        lambda: runs.give_back(session, late, "preempted"),
        lambda: runs.finish(session, late, RunState.SUCCEEDED, outcome="done"),
        lambda: runs.finish(session, late, RunState.FAILED, error=ERROR, outcome="error"),
    ):
        with pytest.raises(Fenced):
            write()
    assert runs.heartbeat(session, fresh).alive  # the control: the fence in force may write
    runs.finish(session, fresh, RunState.SUCCEEDED, result={"by": "fresh"}, outcome="done")

    assert runs.get(session, run_id).result == {"by": "fresh"}
    assert [attempt.outcome for attempt in runs.attempts(session, run_id)] == ["lost", "done"]


def test_a_late_worker_is_fenced_even_before_the_next_claim(session):
    run_id = queue_run(session)
    late = claim(session)
    lose(session, run_id)

    with pytest.raises(Fenced):
        runs.finish(session, late, RunState.SUCCEEDED, outcome="done")
    assert state_of(session, run_id) == "interrupted"


def test_a_heartbeat_between_two_sweeps_clears_the_suspicion(session):
    run_id = queue_run(session)
    lease = claim(session)
    expire(session, run_id)
    assert runs.reap(session, suspect_s=0.0) == []  # the first sweep only suspects
    assert runs.get(session, run_id).suspect_at is not None

    assert runs.heartbeat(session, lease).alive
    time.sleep(0.01)

    assert runs.reap(session, suspect_s=0.0) == []
    assert runs.get(session, run_id).suspect_at is None


def test_a_suspect_run_is_not_taken_before_its_time(session):
    run_id = queue_run(session)
    claim(session)
    expire(session, run_id)
    runs.reap(session, suspect_s=15.0)

    assert runs.reap(session, suspect_s=15.0) == []
    assert state_of(session, run_id) == "starting"


def test_a_run_that_loses_three_workers_fails(session):
    poison, other = queue_run(session), queue_run(session)
    for _ in range(3):
        assert claim(session).run_id == poison
        lose(session, poison)

    run = runs.get(session, poison)
    assert (run.state, run.error["code"], run.attempt) == ("failed", "worker_lost", 3)
    assert [attempt.outcome for attempt in runs.attempts(session, poison)] == ["lost"] * 3
    assert claim(session).run_id == other


def test_a_crashing_run_is_tried_three_times(session):
    run_id = queue_run(session, kind="pretrain")
    after = []
    for _ in range(3):
        lease = claim(session, "train")
        crash = {"code": "native_crash", "detail": "signal 11"}
        after.append(runs.give_back(session, lease, "crash", error=crash, exit_code=-11))

    assert after == ["interrupted", "interrupted", "failed"]
    assert runs.get(session, run_id).error["code"] == "native_crash"
    assert claim(session, "train") is None


def test_preemption_does_not_count_as_an_attempt(session):
    run_id = queue_run(session, kind="pretrain")
    for _ in range(5):
        runs.give_back(session, claim(session, "train"), "preempted", exit_code=75)

    run = runs.get(session, run_id)
    assert (run.state, run.attempt, run.fence) == ("interrupted", 0, 5)
    assert run.error is None


def test_a_waiting_run_is_canceled_at_once(session):
    run_id = queue_run(session)

    assert runs.request_cancel(session, run_id).state == "canceled"
    session.commit()

    assert claim(session) is None
    assert runs.get(session, run_id).finished_at is not None


def test_a_held_run_learns_with_its_heartbeat_that_it_is_canceled(session):
    run_id = queue_run(session)
    lease = claim(session)
    runs.started(session, lease)
    assert runs.heartbeat(session, lease) == runs.Beat(alive=True, cancel_requested=False)

    assert runs.request_cancel(session, run_id).state == "canceling"
    assert runs.request_cancel(session, run_id).state == "canceling"  # asked twice: the same
    session.commit()

    assert runs.heartbeat(session, lease) == runs.Beat(alive=True, cancel_requested=True)
    runs.finish(session, lease, RunState.CANCELED, outcome="canceled")
    assert state_of(session, run_id) == "canceled"


def test_a_canceling_run_whose_worker_is_lost_or_stops_is_canceled(session):
    for end in (
        lambda lease: lose(session, lease.run_id),
        lambda lease: runs.give_back(session, lease, "preempted"),
    ):
        run_id = queue_run(session)
        lease = claim(session)
        runs.request_cancel(session, run_id)
        session.commit()
        end(lease)
        assert state_of(session, run_id) == "canceled"


def test_a_run_that_starts_while_it_is_canceled_stays_canceling(session):
    run_id = queue_run(session)
    lease = claim(session)
    runs.request_cancel(session, run_id)
    session.commit()

    runs.started(session, lease)

    assert state_of(session, run_id) == "canceling"


@pytest.mark.parametrize("state", sorted(db.TERMINAL))
def test_an_ended_run_never_changes(session, state):
    run_id = queue_run(session)
    lease = claim(session)
    if state == "canceled":
        runs.request_cancel(session, run_id)
    runs.finish(session, lease, state, error=ERROR if state == "failed" else None, outcome="done")

    with pytest.raises(ServiceError) as refused:
        runs.request_cancel(session, run_id)
    assert (refused.value.status, refused.value.code) == (409, "run_already_ended")
    for write in (
        lambda: runs.finish(session, lease, RunState.FAILED, error=ERROR, outcome="error"),
        lambda: runs.give_back(session, lease, "lost"),
        lambda: runs.record(session, lease, "log", {"level": "info", "message": "x"}),
    ):
        with pytest.raises(Fenced):
            write()
    assert lose(session, run_id) == []
    assert claim(session) is None
    assert state_of(session, run_id) == state


def test_a_run_that_nobody_canceled_cannot_end_as_canceled(session):
    queue_run(session)
    lease = claim(session)

    with pytest.raises(Fenced):
        runs.finish(session, lease, RunState.CANCELED, outcome="canceled")
    with pytest.raises(ValueError, match="not an end"):
        runs.finish(session, lease, RunState.RUNNING, outcome="done")


def test_an_unknown_state_is_refused_by_the_database(session):
    run_id = queue_run(session)

    with pytest.raises(Exception, match="ck_run_state"):
        session.execute(text("UPDATE run SET state = 'lost' WHERE id = :id"), {"id": run_id})


def test_events_come_in_order_and_resume_after_any_of_them(session):
    run_id = queue_run(session)
    lease = claim(session)
    for step in range(5):
        runs.record(session, lease, "progress", {"step": step})

    events = runs.events_after(session, run_id)

    assert [event.seq for event in events] == sorted({event.seq for event in events})
    for index, event in enumerate(events):
        rest = runs.events_after(session, run_id, event.seq)
        assert [later.seq for later in rest] == [later.seq for later in events[index + 1 :]]
    assert runs.get(session, run_id).progress == {"step": 4}


def test_a_metric_that_is_measured_again_after_a_resume_replaces_the_first(session):
    run_id = queue_run(session, kind="pretrain")
    lease = claim(session, "train")
    for step, loss in ((1, 3.0), (2, 2.0), (2, 1.5), (3, 1.0)):
        runs.record(session, lease, "metric", {"step": step, "values": {"loss": loss, "lr": 0.1}})

    points = [
        (point.name, point.step, point.value)
        for point in runs.metrics(session, run_id, names=["loss"])
    ]

    assert points == [("loss", 1, 3.0), ("loss", 2, 1.5), ("loss", 3, 1.0)]
    assert len(runs.metrics(session, run_id)) == 6


def test_finishing_registers_the_model_and_the_files_or_nothing(session):
    run_id = queue_run(session, kind="finetune")
    lease = claim(session, "train")
    session.add(db.Model(name="taken", kind="encoder"))
    session.commit()
    files = [NewArtifact("mask.nii.gz", "a" * 64, 10, "application/gzip")]
    version = NewVersion("taken", "segmenter", "b" * 64, {"kind": "segmenter"})

    with pytest.raises(ServiceError, match="wrong_model_kind"):
        runs.finish(
            session, lease, RunState.SUCCEEDED, outcome="done", artifacts=files, register=version
        )
    assert state_of(session, run_id) == "starting"
    assert runs.artifacts(session, run_id) == []

    version = NewVersion("liver", "segmenter", "b" * 64, {"kind": "segmenter"})
    runs.finish(
        session, lease, RunState.SUCCEEDED, outcome="done", artifacts=files, register=version
    )

    assert runs.artifact(session, run_id, "mask.nii.gz").fence == lease.fence
    assert runs.get(session, run_id).result["model"] == {
        "name": "liver",
        "version": 1,
        "digest": "b" * 64,
    }


def test_a_waiting_run_is_rung_for_again_until_it_is_claimed(session):
    run_id = queue_run(session)
    assert runs.due(session) == []  # the request itself has just rung
    session.execute(update(Run).values(publish_after=db_now(-1)))
    session.commit()

    assert runs.due(session) == [(run_id, "inference")]
    assert runs.due(session) == []  # not again before its time
    session.execute(update(Run).values(publish_after=db_now(-1)))
    session.commit()
    claim(session)
    assert runs.due(session) == []


def test_a_run_that_was_given_back_is_rung_for_at_once(session):
    run_id = queue_run(session)
    runs.give_back(session, claim(session), "preempted")

    assert runs.due(session) == [(run_id, "inference")]


def test_reading_first_and_writing_later_does_not_fail_beside_other_writers(sessions):
    with sessions() as session:
        ids = [queue_run(session) for _ in range(4)]

    def read_then_write(run_id):
        for _ in range(20):
            with sessions() as session:
                run = session.get(Run, run_id)
                time.sleep(0.001)
                run.priority += 1
                session.commit()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_then_write, ids))

    with sessions() as session:
        assert session.scalars(select(Run.priority)).all() == [20] * 4


def test_listings_page_newest_first_without_gaps(session):
    ids = [queue_run(session) for _ in range(7)]
    queue_run(session, kind="embed")

    seen, after = [], None
    while True:
        page = runs.listing(session, size=3, after=after, kinds=["segment"])
        seen += [run.id for run in page.items]
        after = page.next
        if after is None:
            break

    assert sorted(seen) == sorted(ids)
    assert len(seen) == 7
    times = [runs.get(session, run_id).created_at for run_id in seen]
    assert times == sorted(times, reverse=True)
