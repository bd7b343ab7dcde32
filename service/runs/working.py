"""While a worker holds a run: it begins, keeps its lease, tells how far it is. Each commits."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import (
    case,
    update,
)
from sqlalchemy.orm import Session

from service import faults
from service.db import (
    Run,
    RunEvent,
    RunState,
    db_now,
)
from service.runs import writing
from service.runs.words import Beat, Lease
from service.runs.writing import state_event, write


def started(session: Session, lease: Lease) -> None:
    """The work itself begins: starting -> running (a run that is canceling stays so).

    Raises:
        Fenced: The run is no longer ours.
    """
    state = write(
        session,
        lease,
        state=case((Run.state == RunState.STARTING, RunState.RUNNING), else_=Run.state),
    )
    if state is RunState.RUNNING:
        state_event(session, lease.run_id, state, lease.attempt)
    session.commit()
    faults.point("started.after_commit")


def heartbeat(session: Session, lease: Lease) -> Beat:
    """Keep the lease, and learn whether to stop."""
    row = session.execute(
        update(Run)
        .where(writing.is_ours(lease))
        .values(lease_until=db_now(lease.lease_s), suspect_at=None)
        .returning(Run.cancel_requested_at),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    faults.point("heartbeat.before_commit")
    session.commit()
    return Beat(alive=row is not None, cancel_requested=row is not None and row[0] is not None)


def record(
    session: Session,
    lease: Lease,
    type: Literal["progress", "metric", "log"],
    data: dict[str, Any],
) -> None:
    """Append an event; a `progress` event also becomes the run's progress.

    Args:
        session: Database session.
        lease: The claim under which this is written.
        type: `progress` {stage, step, total, fraction, eta_s}; `metric` {step, values: {name:
            value}}; `log` {level, message}.
        data: The event, JSON-able, without NaN.

    Raises:
        Fenced: The run is no longer ours; nothing was written.
    """
    change: dict[str, Any] = {"progress": data} if type == "progress" else {"fence": Run.fence}
    write(session, lease, **change)
    session.add(RunEvent(run_id=lease.run_id, type=type, data=data))
    faults.point("record.before_commit")
    session.commit()
    faults.point("record.after_commit")
