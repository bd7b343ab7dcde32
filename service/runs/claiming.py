"""A worker takes the run whose turn it is. Commits."""

from __future__ import annotations

from sqlalchemy import (
    ScalarSelect,
    func,
    true,
    update,
)
from sqlalchemy.orm import Session

from service import faults
from service import queue as turns
from service.db import (
    Run,
    RunAttempt,
    RunKind,
    RunState,
    db_now,
)
from service.queue import ANYTHING, Able
from service.runs.words import Lease
from service.runs.writing import state_event


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
    choices = [turns.turn(queue, able=able, max_running=max_running)]
    if only is None:  # the fallback knows no fair share: it would pass a better run of another kind
        choices.append(turns.any_turn(queue, able=able, max_running=max_running))
    for best in choices:
        run = _claimed(session, best, queue, worker, lease_s=lease_s, only=only)
        if run is not None:
            break
    else:
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
