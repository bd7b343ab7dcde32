"""T-C10: cancel in every state."""

from __future__ import annotations

import pytest

from service import db, runs
from service.db import RunState
from service.errors import ServiceError


def brought_to(session, state):
    """A run in a state, and its lease if somebody has one."""
    run = runs.create(session, kind="segment", spec={}, principal="t")
    session.commit()
    if state is RunState.QUEUED:
        return run.id, None
    lease = runs.claim(session, run.id, "inference", "w")
    if state is RunState.STARTING:
        return run.id, lease
    runs.started(session, lease)
    if state is RunState.INTERRUPTED:
        runs.give_back(session, lease, "preempted")
        return run.id, None
    if state in (RunState.CANCELING, RunState.CANCELED):
        runs.request_cancel(session, run.id)
        session.commit()
    if state in db.TERMINAL:
        error = {"code": "x", "detail": "x"} if state is RunState.FAILED else None
        runs.finish(session, lease, state, outcome="done", error=error)
    return run.id, lease


@pytest.mark.parametrize("state", list(RunState))
def test_t_c10_a_run_is_canceled_once_from_any_state_or_has_ended(sessions, state):
    with sessions() as session:
        run_id, lease = brought_to(session, state)
        assert runs.get(session, run_id).state == state

        if state in db.TERMINAL:
            with pytest.raises(ServiceError) as refused:
                runs.request_cancel(session, run_id)
            assert refused.value.code == "run_already_ended"
            assert runs.get(session, run_id).state == state
            return
        runs.request_cancel(session, run_id)
        runs.request_cancel(session, run_id) if state in db.HELD else None  # asked twice: the same
        session.commit()
        if state in db.CLAIMABLE:
            assert runs.get(session, run_id).state == RunState.CANCELED
            assert runs.claim(session, run_id, "inference", "w") is None
        else:
            assert runs.heartbeat(session, lease).cancel_requested
            runs.finish(session, lease, RunState.CANCELED, outcome="canceled")

        assert runs.get(session, run_id).state == RunState.CANCELED
        events = [e.data["state"] for e in runs.events_after(session, run_id)]
        assert events.count("canceled") == 1
