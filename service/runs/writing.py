"""The one conditional UPDATE under a fence, and the rows that go with a change of state."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    and_,
    true,
    update,
)
from sqlalchemy.orm import Session

from service.db import (
    HELD,
    Artifact,
    Blob,
    Run,
    RunAttempt,
    RunEvent,
    RunState,
    db_now,
    insert_if_absent,
)
from service.runs.words import Fenced, Lease, NewArtifact, Outcome


def is_ours(lease: Lease, states: frozenset[RunState] = HELD) -> Any:
    """The run's row as long as nobody has claimed it after us."""
    return and_(Run.id == lease.run_id, Run.fence == lease.fence, Run.state.in_(states))


def write(
    session: Session,
    lease: Lease,
    *,
    states: frozenset[RunState] = HELD,
    extra: ColumnElement[bool] | None = None,
    **values: Any,
) -> RunState:
    """Change the run's row if it is still ours, and lock it until the commit."""
    state = session.execute(
        update(Run)
        .where(is_ours(lease, states), true() if extra is None else extra)
        .values(**values)
        .returning(Run.state),
        execution_options={"synchronize_session": False},
    ).scalar_one_or_none()
    if state is None:
        session.rollback()
        raise Fenced(lease.run_id)
    return RunState(state)


def ended(state: RunState) -> dict[str, Any]:
    """The columns of a run that has ended for good: nobody holds it, nobody rings for it."""
    return {
        "state": state,
        "finished_at": db_now(),
        "lease_owner": None,
        "lease_until": None,
        "suspect_at": None,
        "publish_after": None,
    }


def attach(session: Session, lease: Lease, new: NewArtifact) -> None:
    """Record a file that lies in the store as the run's."""
    insert_if_absent(session, Blob, sha256=new.sha256, size_bytes=new.size)
    session.add(
        Artifact(
            run_id=lease.run_id,
            name=new.name,
            sha256=new.sha256,
            media_type=new.media_type,
            fence=lease.fence,
        )
    )


def end_attempt(
    session: Session,
    run_id: str,
    fence: int,
    outcome: Outcome,
    *,
    exit_code: int | None = None,
    detail: str | None = None,
) -> None:
    """Say of a claim when and how it ended."""
    session.execute(
        update(RunAttempt)
        .where(RunAttempt.run_id == run_id, RunAttempt.fence == fence)
        .values(ended_at=db_now(), outcome=outcome, exit_code=exit_code, detail=detail),
        execution_options={"synchronize_session": False},
    )


def state_event(
    session: Session,
    run_id: str,
    state: RunState,
    attempt: int,
    error: dict[str, Any] | None = None,
) -> None:
    """Tell the listeners; the caller has changed the run's row in this transaction."""
    data: dict[str, Any] = {"state": state.value, "attempt": attempt}
    if error is not None:
        data["error"] = error
    session.add(RunEvent(run_id=run_id, type="state", data=data))
    session.flush()
