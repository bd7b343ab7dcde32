"""Upkeep's side: lost runs come back, lost doorbells ring again. Each commits."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import (
    and_,
    case,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from service import faults
from service import queue as turns
from service.db import (
    CLAIMABLE,
    Run,
    RunState,
    db_now,
)
from service.runs.writing import end_attempt, state_event

FIRST_REMINDER_S = 5.0
REMINDER_S = 30.0
LATE_REMINDER_S = 300.0
"""Doorbells of a run that stays queued: after 5 s, every 30 s, and every 5 min once it is old, so
that a long training does not let thousands of messages pile up behind it."""


def reap(
    session: Session, *, suspect_s: float = 15.0, max_attempts: int = 3, lease_s: float = 30.0
) -> list[str]:
    """Take back runs whose worker is gone, in two sweeps.

    A lease that has run out makes a run suspect; one that is still out `suspect_s` later loses
    it. A live worker's heartbeat in between clears the suspicion, so a jump of the clock alone
    takes nothing away. A lease longer than any that is given (`lease_s`, twice) is out as well:
    the clock was set back, and a dead worker's run would wait for it to come again.

    Returns:
        Ids of the runs that were taken back: interrupted, canceled if that was requested, failed
        with `worker_lost` after `max_attempts`.
    """
    is_over = or_(Run.lease_until < db_now(), Run.lease_until > db_now(2 * lease_s))
    is_out = and_(turns.is_held(Run), is_over)
    is_confirmed = or_(Run.suspect_at < db_now(-suspect_s), Run.suspect_at > db_now(2 * lease_s))
    is_canceled = Run.cancel_requested_at.is_not(None)
    is_spent = Run.attempt >= max_attempts
    error = {
        "code": "worker_lost",
        "detail": f"the worker was lost {max_attempts} times while it worked on this run",
    }
    taken = session.scalars(
        update(Run)
        .where(is_out, is_confirmed)
        .values(
            state=case(
                (is_canceled, RunState.CANCELED),
                (is_spent, RunState.FAILED),
                else_=RunState.INTERRUPTED,
            ),
            finished_at=case((or_(is_canceled, is_spent), db_now()), else_=None),
            publish_after=case((or_(is_canceled, is_spent), None), else_=db_now()),
            lease_owner=None,
            lease_until=None,
            suspect_at=None,
        )
        .returning(Run),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).all()
    for run in taken:
        state = RunState(run.state)
        if state is RunState.FAILED:
            run.error = error
        end_attempt(session, run.id, run.fence, "lost")
        state_event(session, run.id, state, run.attempt, run.error)
    session.execute(
        update(Run).where(is_out, Run.suspect_at.is_(None)).values(suspect_at=db_now()),
        execution_options={"synchronize_session": False},
    )
    faults.point("reap.before_commit")
    session.commit()
    faults.point("reap.after_commit")
    return [run.id for run in taken]


def due(session: Session, *, limit: int = 50) -> list[tuple[str, str]]:
    """Waiting runs whose doorbell may have been lost, as (id, queue); ring for each of them.

    This makes the table the outbox: an accepted run is rung for until a worker takes it.
    """
    is_time = or_(  # the second: the clock was set back
        Run.publish_after <= db_now(), Run.publish_after > db_now(2 * LATE_REMINDER_S)
    )
    is_due = and_(turns.is_open(Run), is_time)
    picked = (
        select(Run.id)
        .where(is_due)
        .order_by(Run.publish_after)  # whichever rings, the best run is claimed
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = session.execute(
        update(Run)
        .where(Run.id.in_(select(picked.cte("picked").c.id)), is_due)
        .values(
            publish_after=case(
                (Run.created_at < db_now(-LATE_REMINDER_S), db_now(LATE_REMINDER_S)),
                else_=db_now(REMINDER_S),
            )
        )
        .returning(Run.id, Run.queue),
        execution_options={"synchronize_session": False},
    ).all()
    faults.point("due.before_commit")
    session.commit()
    faults.point("due.after_commit")
    return [(run_id, queue) for run_id, queue in rows]


def not_rung(session: Session, run_ids: Sequence[str]) -> None:
    """The broker did not take their messages: try again soon, not at the next reminder."""
    session.execute(
        update(Run)
        .where(Run.id.in_(run_ids), Run.state.in_(CLAIMABLE))
        .values(publish_after=db_now(FIRST_REMINDER_S)),
        execution_options={"synchronize_session": False},
    )
    session.commit()
