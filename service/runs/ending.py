"""A worker ends its run, or its attempt alone. Each commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    case,
    literal,
    or_,
)
from sqlalchemy.orm import Session

from service import embeddings, faults, registry
from service.db import (
    TERMINAL,
    Run,
    RunState,
    db_now,
    within,
)
from service.embeddings import NewEmbedding
from service.patience import patiently
from service.runs.words import Lease, NewArtifact, NewVersion, Outcome
from service.runs.writing import attach, end_attempt, ended, state_event, write


def finish(
    session: Session,
    lease: Lease,
    state: RunState,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    outcome: Outcome,
    exit_code: int | None = None,
    artifacts: Sequence[NewArtifact] = (),
    register: NewVersion | None = None,
    vectors: Sequence[NewEmbedding] = (),
) -> None:
    """End a run for good: its state, result, files and model version in one transaction.

    Args:
        session: Database session.
        lease: The claim under which this is written.
        state: `succeeded`, `failed`, or `canceled` (only if that was requested).
        result: What the run gives (JSON-able).
        error: `{code, detail}` of a failed run.
        outcome: How the attempt ended.
        exit_code: Of the child process.
        artifacts: Files in the store that now belong to the run.
        register: The bundle that becomes a model version; its `{name, version}` is added to
            the result as `model`.
        vectors: Of the run's volume and its regions, to be found by a search, or no longer.

    Raises:
        Fenced: The run is no longer ours; nothing was written.
        ServiceError: The registry refuses; nothing was written.
    """
    if state not in TERMINAL:
        raise ValueError(f"{state} is not an end")

    def end() -> None:
        _finish(
            session,
            lease,
            state,
            result=result,
            error=error,
            outcome=outcome,
            exit_code=exit_code,
            artifacts=artifacts,
            register=register,
            vectors=vectors,
        )

    patiently(session, end, for_s=lease.lease_s)


def _finish(
    session: Session,
    lease: Lease,
    state: RunState,
    *,
    result: dict[str, Any] | None,
    error: dict[str, Any] | None,
    outcome: Outcome,
    exit_code: int | None,
    artifacts: Sequence[NewArtifact],
    register: NewVersion | None,
    vectors: Sequence[NewEmbedding],
) -> None:
    try:
        if state is RunState.CANCELED:
            write(session, lease, extra=Run.cancel_requested_at.is_not(None), **ended(state))
        else:
            write(session, lease, **ended(state))
        for new in artifacts:
            attach(session, lease, new)
        for vector in vectors:
            assert lease.volume_id is not None  # an embedding is of a volume
            embeddings.record(session, lease.run_id, lease.volume_id, vector)
        if register is not None:
            with within(session, lease.project_id):
                version = registry.register(
                    session,
                    register.name,
                    kind=register.kind,
                    digest=register.digest,
                    manifest=register.manifest,
                    run_id=lease.run_id,
                )
            model = {"name": version.model_name, "version": version.version}
            result = {**(result or {}), "model": {**model, "digest": version.digest}}
        write(session, lease, states=TERMINAL, result=result, error=error)
        detail = error["code"] if error is not None else None
        end_attempt(session, lease.run_id, lease.fence, outcome, exit_code=exit_code, detail=detail)
        state_event(session, lease.run_id, state, lease.attempt, error)
        faults.point("finish.before_commit")
        session.commit()
    except BaseException:
        session.rollback()
        raise
    faults.point("finish.after_commit")


def give_back(
    session: Session,
    lease: Lease,
    outcome: Outcome,
    *,
    exit_code: int | None = None,
    error: dict[str, Any] | None = None,
    max_attempts: int = 3,
) -> RunState:
    """End an attempt but not the run: it will resume by itself, here or on another worker.

    A preempted attempt does not count. Any other does: after `max_attempts` of them the run
    fails with `error`. A run that was asked to stop is canceled instead.

    Returns:
        `interrupted`, `failed` or `canceled`.

    Raises:
        Fenced: The run is no longer ours.
    """
    return patiently(
        session,
        lambda: _give_back(
            session,
            lease,
            outcome,
            exit_code=exit_code,
            error=error,
            max_attempts=max_attempts,
        ),
        for_s=lease.lease_s,
    )


def _give_back(
    session: Session,
    lease: Lease,
    outcome: Outcome,
    *,
    exit_code: int | None,
    error: dict[str, Any] | None,
    max_attempts: int,
) -> RunState:
    counts = outcome != "preempted"
    is_spent = counts and lease.attempt >= max_attempts
    after = RunState.FAILED if is_spent else RunState.INTERRUPTED
    next_state = case((Run.cancel_requested_at.is_not(None), RunState.CANCELED), else_=after)
    is_end = or_(Run.cancel_requested_at.is_not(None), literal(is_spent))
    state = write(
        session,
        lease,
        state=next_state,
        attempt=Run.attempt - (0 if counts else 1),
        error=error if is_spent else None,
        finished_at=case((is_end, db_now()), else_=None),
        publish_after=case((is_end, None), else_=db_now()),
        lease_owner=None,
        lease_until=None,
        suspect_at=None,
    )
    detail = error["code"] if error is not None else None
    end_attempt(session, lease.run_id, lease.fence, outcome, exit_code=exit_code, detail=detail)
    state_event(
        session, lease.run_id, state, lease.attempt, error if state is RunState.FAILED else None
    )
    faults.point("give_back.before_commit")
    session.commit()
    faults.point("give_back.after_commit")
    return state
