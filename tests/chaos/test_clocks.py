"""T-C11: the database's clock jumps: live workers keep their runs, dead ones do not."""

from __future__ import annotations

import time

import pytest

from service import db, runs
from service.lease import Keeper

HOUR_S = 3600.0


@pytest.fixture
def shift(monkeypatch):
    """Moves the clock of the database, as every statement of ours sees it."""
    offset = {"s": 0.0}
    plain = db.db_now.__init__

    def shifted(self, offset_s: float = 0.0) -> None:
        plain(self, offset_s + offset["s"])

    monkeypatch.setattr(db.db_now, "__init__", shifted)

    def move(seconds: float) -> None:
        offset["s"] += seconds

    return move


def claimed(sessions):
    with sessions() as session:
        run = runs.create(session, kind="segment", spec={}, principal="t")
        session.commit()
        return runs.claim(session, run.id, "inference", "w", lease_s=30.0)


def sweeps(sessions, *, pause_s: float) -> list[str]:
    """Two sweeps of upkeep, with a pause in between that is longer than a suspicion lasts."""
    taken = []
    for _ in range(2):
        with sessions() as session:
            taken += runs.reap(session, suspect_s=pause_s / 2, lease_s=30.0)
        time.sleep(pause_s)
    return taken


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_t_c11_a_jump_of_the_clock_takes_nothing_from_a_live_worker(sessions, shift, jump_s):
    lease = claimed(sessions)
    with Keeper(sessions, lease, heartbeat_s=0.05) as keeper:
        shift(jump_s)
        assert sweeps(sessions, pause_s=0.6) == []
        assert not keeper.fenced
    with sessions() as session:
        runs.finish(session, lease, db.RunState.SUCCEEDED, outcome="done")
        assert [one.outcome for one in runs.attempts(session, lease.run_id)] == ["done"]


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_t_c11_a_jump_of_the_clock_leaves_no_run_with_a_dead_worker(sessions, shift, jump_s):
    lease = claimed(sessions)
    assert sweeps(sessions, pause_s=0.1) == []  # the control: without a jump it is still leased

    shift(jump_s)

    assert sweeps(sessions, pause_s=0.1) == [lease.run_id]


def test_t_c11_a_waiting_run_is_rung_for_although_the_clock_was_set_back(sessions, shift):
    with sessions() as session:
        run = runs.create(session, kind="segment", spec={}, principal="t")
        session.commit()
        assert runs.due(session) == []  # the control: the request itself has rung

        shift(-HOUR_S)

        assert runs.due(session) == [(run.id, "inference")]
        assert runs.due(session) == []
