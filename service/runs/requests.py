"""The API's side of the state machine: queue a run, ask it to end. The caller commits."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    case,
    update,
)
from sqlalchemy.orm import Session

from service.db import (
    CLAIMABLE,
    ID_PREFIX_OF,
    QUEUE_OF,
    TERMINAL,
    Run,
    RunKind,
    RunState,
    db_now,
    new_id,
)
from service.errors import ServiceError
from service.queue import ANYTHING, Able
from service.runs.reading import get
from service.runs.reaping import FIRST_REMINDER_S
from service.runs.writing import state_event


def create(
    session: Session,
    *,
    kind: RunKind | str,
    spec: dict[str, Any],
    dataset_id: str | None = None,
    volume_id: str | None = None,
    priority: int = 0,
    needs: Able = ANYTHING,
    principal: str,
) -> Run:
    """Queue a run; the caller commits, then calls `celery_app.ring(run.id, run.queue)`.

    `needs` says which workers may take it.
    """
    kind = RunKind(kind)
    run = Run(
        id=new_id(ID_PREFIX_OF[kind]),
        kind=kind,
        state=RunState.QUEUED,
        queue=QUEUE_OF[kind],
        priority=priority,
        needs_device=needs.kind,
        needs_memory_bytes=needs.memory_bytes,
        spec=spec,
        dataset_id=dataset_id,
        volume_id=volume_id,
        publish_after=db_now(FIRST_REMINDER_S),
        created_by=principal,
    )
    session.add(run)
    session.flush()
    state_event(session, run.id, RunState.QUEUED, run.attempt)
    return run


def request_cancel(session: Session, run: Run | str) -> Run:
    """Ask a run to end: at once if nobody holds it, else with its worker's next heartbeat.

    Asked again while it is canceling, it changes nothing. The caller commits.

    Raises:
        ServiceError: 404 `not_found`; 409 `run_already_ended`.
    """
    run_id = run if isinstance(run, str) else run.id
    is_waiting = Run.state.in_(CLAIMABLE)
    canceled = session.scalars(
        update(Run)
        .where(Run.id == run_id, Run.state.not_in([*TERMINAL, RunState.CANCELING]))
        .values(
            state=case((is_waiting, RunState.CANCELED), else_=RunState.CANCELING),
            finished_at=case((is_waiting, db_now()), else_=None),
            publish_after=None,
            cancel_requested_at=db_now(),
        )
        .returning(Run),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if canceled is not None:
        state_event(session, run_id, RunState(canceled.state), canceled.attempt)
        session.flush()
        return canceled
    current = get(session, run_id)
    if current.state in TERMINAL:
        raise ServiceError(
            409,
            "run_already_ended",
            f"the run has ended already; its state is {current.state}",
            extra={"state": current.state},
        )
    return current
