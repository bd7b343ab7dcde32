"""A worker takes the run whose turn it is. Commits."""

from __future__ import annotations

from sqlalchemy import (
    ScalarSelect,
    func,
    select,
    true,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service import faults
from service import queue as turns
from service.db import (
    Project,
    Run,
    RunAttempt,
    RunKind,
    RunState,
    db_now,
)
from service.queue import ANYTHING, Able
from service.runs.words import Lease
from service.runs.writing import state_event

ROOM_WAIT_MS = 2000
"""The longest that a claim waits for another one of the same project, where there is a limit."""
LOCK_NOT_AVAILABLE = "55P03"
"""PostgreSQL's SQLSTATE where `lock_timeout` has passed."""


def claim(
    session: Session,
    run_id: str | None,
    queue: str,
    worker: str,
    *,
    lease_s: float = 30.0,
    able: Able = ANYTHING,
    max_running: int = 0,
    only: RunKind | None = None,
) -> Lease | None:
    """Take the run of a queue whose turn it is: priority, fair share, age (`service.queue`).

    A message may come never, late or several times; only one claim finds the row waiting.

    Args:
        session: Database session.
        run_id: What the doorbell said. A hint and no more: a better run goes first.
        queue: `train` or `inference`.
        worker: Who takes it.
        lease_s: How long it is held without a heartbeat.
        able: What the worker's device can do; a run that does not fit is left to others.
        max_running: A project with so many runs under way waits, unless it has a limit of its own;
            0 is no limit.
        only: Take it if it is of this kind, else nothing: never a worse one past a better.

    Returns:
        The run, now starting; None if nothing waits that this worker may take.
    """
    run = _next(
        session, queue, worker, lease_s=lease_s, able=able, max_running=max_running, only=only
    )
    if run is None:
        session.rollback()
        return None
    session.add(RunAttempt(run_id=run.id, fence=run.fence, worker=worker))
    state_event(session, run.id, RunState.STARTING, run.attempt)
    lease = Lease(
        run_id=run.id,
        project_id=run.project_id,
        fence=run.fence,
        attempt=run.attempt,
        kind=RunKind(run.kind),
        spec=run.spec,
        dataset_id=run.dataset_id,
        volume_id=run.volume_id,
        worker=worker,
        lease_s=lease_s,
    )
    faults.point("claim.before_commit")
    session.commit()
    faults.point("claim.after_commit")
    return lease


def _next(
    session: Session,
    queue: str,
    worker: str,
    *,
    lease_s: float,
    able: Able,
    max_running: int,
    only: RunKind | None,
) -> Run | None:
    """Take the best run, of a project that has room for it; not yet committed."""
    full: frozenset[str] = frozenset()
    while True:
        choices = [turns.turn(queue, able=able, max_running=max_running, without=full)]
        if only is None:  # the fallback knows no fair share: it'd pass a better run of another kind
            choices.append(turns.any_turn(queue, able=able, max_running=max_running, without=full))
        found = (
            _claimed(session, best, queue, worker, lease_s=lease_s, only=only) for best in choices
        )
        run = next((one for one in found if one is not None), None)
        if run is None or _has_room(session, run, max_running):
            return run
        full |= {run.project_id}
        session.rollback()


def _has_room(session: Session, run: Run, max_running: int) -> bool:
    """Whether a project may have a run under way that this transaction has just taken of it.

    A choice counts what was committed before it began: of two claims at once, both would pass the
    limit. Here the second waits for the first one's commit and counts with it; a claimer that is
    frozen holds another up once, for `ROOM_WAIT_MS`. Where there is no limit, nothing is locked.

    Returns:
        Whether the claim may be committed; if not, it is to be rolled back.
    """
    if session.get_bind().dialect.name != "postgresql":
        return True  # SQLite has one writer at a time (db.connect), who sees every claim
    limit = session.scalar(select(turns.limit_of(max_running)).where(Project.id == run.project_id))
    if not limit:
        return True
    key = func.hashtextextended(f"{run.queue} {run.project_id}", 0)
    session.execute(select(func.set_config("lock_timeout", str(ROOM_WAIT_MS), True)))
    try:
        session.execute(select(func.pg_advisory_xact_lock(key)))
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
            raise
        return False
    under_way = select(func.count()).where(
        Run.queue == run.queue, Run.project_id == run.project_id, turns.is_held(Run)
    )
    return (session.scalar(under_way) or 0) <= limit


def _claimed(
    session: Session,
    best: ScalarSelect[str],
    queue: str,
    worker: str,
    *,
    lease_s: float,
    only: RunKind | None,
) -> Run | None:
    return session.scalars(
        update(Run)
        .where(
            Run.id == best,
            turns.is_waiting(Run, queue),
            true() if only is None else Run.kind == only,
        )
        .values(
            state=RunState.STARTING,
            fence=Run.fence + 1,
            attempt=Run.attempt + 1,
            lease_owner=worker,
            lease_until=db_now(lease_s),
            suspect_at=None,
            publish_after=None,
            started_at=func.coalesce(Run.started_at, db_now()),
        )
        .returning(Run),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one_or_none()
