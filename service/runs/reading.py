"""A run and what it wrote, as the database has it now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    select,
)
from sqlalchemy.orm import Session

from service.db import (
    Artifact,
    Cursor,
    Page,
    Run,
    RunAttempt,
    RunEvent,
    page,
)
from service.errors import ServiceError
from service.runs.words import MetricPoint


def get(session: Session, run_id: str, *, kinds: Sequence[str] | None = None) -> Run:
    """A run by id, as it is in the database now.

    Args:
        session: Database session.
        run_id: The run.
        kinds: Only these kinds exist for the caller (segmentations, for example).

    Raises:
        ServiceError: 404 `not_found`.
    """
    run = session.get(Run, run_id, populate_existing=True)
    if run is None or (kinds is not None and run.kind not in kinds):
        raise ServiceError(404, "not_found", "no run has this id")
    return run


def listing(
    session: Session,
    *,
    size: int = 50,
    after: Cursor | None = None,
    kinds: Sequence[str] | None = None,
    states: Sequence[str] | None = None,
    dataset_id: str | None = None,
    volume_id: str | None = None,
) -> Page[Run]:
    """Runs, newest first."""
    where: list[Any] = []
    if kinds is not None:
        where.append(Run.kind.in_(kinds))
    if states is not None:
        where.append(Run.state.in_(states))
    if dataset_id is not None:
        where.append(Run.dataset_id == dataset_id)
    if volume_id is not None:
        where.append(Run.volume_id == volume_id)
    return page(session, Run, *where, size=size, after=after)


def attempts(session: Session, run_id: str) -> Sequence[RunAttempt]:
    """Every claim of the run and how it ended, oldest first."""
    return session.scalars(
        select(RunAttempt).where(RunAttempt.run_id == run_id).order_by(RunAttempt.fence)
    ).all()


def artifacts(session: Session, run_id: str) -> Sequence[Artifact]:
    """The files that the run produced, by name."""
    return session.scalars(
        select(Artifact).where(Artifact.run_id == run_id).order_by(Artifact.name)
    ).all()


def artifact(session: Session, run_id: str, name: str) -> Artifact:
    """One file of the run.

    Raises:
        ServiceError: 404 `not_found`.
    """
    found = session.get(Artifact, (run_id, name))
    if found is None:
        raise ServiceError(404, "not_found", "the run has no such artifact")
    return found


def events_after(
    session: Session, run_id: str, seq: int = 0, *, limit: int = 500
) -> Sequence[RunEvent]:
    """What happened in the run after event `seq`, in order.

    Every writer updates the run's row first, so that for one run a later `seq` is never visible
    before an earlier one and a reader that resumes by `seq` misses nothing.
    """
    return session.scalars(
        select(RunEvent)
        .where(RunEvent.run_id == run_id, RunEvent.seq > seq)
        .order_by(RunEvent.seq)
        .limit(limit)
    ).all()


def metrics(
    session: Session, run_id: str, *, names: Sequence[str] | None = None
) -> list[MetricPoint]:
    """The run's metrics by name and step; a step done again after a resume replaces the first."""
    found: dict[tuple[str, int], float] = {}
    for event in session.scalars(
        select(RunEvent)
        .where(RunEvent.run_id == run_id, RunEvent.type == "metric")
        .order_by(RunEvent.seq)
    ):
        for name, value in event.data.get("values", {}).items():
            if names is None or name in names:
                found[name, int(event.data["step"])] = float(value)
    return [MetricPoint(name, step, value) for (name, step), value in sorted(found.items())]
