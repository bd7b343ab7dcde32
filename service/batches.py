"""Batches: one run for each scan of a dataset, at a priority below single requests.

The children are ordinary runs: leased, fenced, taken back when a worker is lost. A batch keeps the
list of them and nothing else; how far it is, is counted from their rows each time it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service import datasets, registry, runs
from service.db import (
    TERMINAL,
    Batch,
    BatchItem,
    Cursor,
    ModelVersion,
    Page,
    Run,
    RunState,
    Volume,
    new_id,
    page,
)
from service.errors import ServiceError

PRIORITY = -10
"""Of a child: a worker takes any single request before it."""
BLOCK = 200


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a batch is, by its runs."""

    counts: dict[str, int]
    finished_at: datetime | None
    """When the last run ended; None while one has not."""

    @property
    def num_ended(self) -> int:
        """Scans whose run has ended."""
        return sum(count for state, count in self.counts.items() if state in TERMINAL)

    @property
    def num_scans(self) -> int:
        """All scans."""
        return sum(self.counts.values())

    @property
    def state(self) -> str:
        """`queued`, `running`; once all have ended `succeeded`, `failed` (any did), `canceled`."""
        if self.num_ended < self.num_scans:
            return "queued" if set(self.counts) == {"queued"} else "running"
        if RunState.FAILED in self.counts:
            return "failed"
        return "canceled" if RunState.CANCELED in self.counts else "succeeded"


def create(
    session: Session,
    *,
    dataset_id: str,
    version: ModelVersion,
    kind: str,
    options: Mapping[str, Any],
    principal: str,
) -> Batch:
    """Queue a model on every scan of a dataset; the caller commits, then rings.

    Raises:
        ServiceError: 404 `not_found`; 422 `invalid_request` if no scan is in the split, 422
            `wrong_volume_kind` if the model does not read such scans.
    """
    datasets.get(session, dataset_id)
    reads = "image_2d" if registry.reads_2d(version) else "image"
    datasets.require_kind(session, dataset_id, reads)
    split = options.get("split")
    items = [one for one in datasets.items_of(session, dataset_id) if split in (None, one.split)]
    if not items:
        raise ServiceError(422, "invalid_request", "the dataset has no scan in this split")
    model = {"name": version.model_name, "version": version.version, "digest": version.digest}
    batch = Batch(
        id=new_id("bat"),
        dataset_id=dataset_id,
        kind=kind,
        model=model,
        options=dict(options),
        created_by=principal,
    )
    session.add(batch)
    session.flush()
    for position, one in enumerate(items):
        run = _child(session, batch, one.volume_id, principal)
        session.add(
            BatchItem(batch_id=batch.id, position=position, volume_id=one.volume_id, run_id=run.id)
        )
    session.flush()
    return batch


def get(session: Session, batch_id: str) -> Batch:
    """A batch by id.

    Raises:
        ServiceError: 404 `not_found`.
    """
    batch = session.get(Batch, batch_id)
    if batch is None:
        raise ServiceError(404, "not_found", "no batch has this id")
    return batch


def listing(
    session: Session,
    *,
    size: int = 50,
    after: Cursor | None = None,
    dataset_id: str | None = None,
) -> Page[Batch]:
    """Batches, newest first."""
    where = [] if dataset_id is None else [Batch.dataset_id == dataset_id]
    return page(session, Batch, *where, size=size, after=after)


def standings(session: Session, batch_ids: Sequence[str]) -> dict[str, Standing]:
    """How far batches are, by id; one query for all of them."""
    rows = session.execute(
        select(BatchItem.batch_id, Run.state, func.count(), func.max(Run.finished_at))
        .join(Run, Run.id == BatchItem.run_id)
        .where(BatchItem.batch_id.in_(batch_ids))
        .group_by(BatchItem.batch_id, Run.state)
    ).all()
    found = {}
    for batch_id in batch_ids:
        mine = [row for row in rows if row[0] == batch_id]
        has_ended = all(row[1] in TERMINAL for row in mine)
        ends = [row[3] for row in mine if row[3] is not None]
        counts = {str(row[1]): int(row[2]) for row in mine}
        found[batch_id] = Standing(counts, max(ends) if has_ended and ends else None)
    return found


def items(
    session: Session,
    batch_id: str,
    *,
    size: int,
    after: int = -1,
    states: Sequence[str] | None = None,
) -> list[tuple[BatchItem, Run]]:
    """Scans of a batch with their newest runs, in order, those after the position `after`."""
    statement = (
        select(BatchItem, Run)
        .join(Run, Run.id == BatchItem.run_id)
        .where(BatchItem.batch_id == batch_id, BatchItem.position > after)
    )
    if states is not None:
        statement = statement.where(Run.state.in_(states))
    return [
        (item, run)
        for item, run in session.execute(statement.order_by(BatchItem.position).limit(size))
    ]


def cancel(session: Session, batch_id: str) -> int:
    """Ask every run of a batch that has not ended to end; the caller commits.

    Returns:
        How many were asked.

    Raises:
        ServiceError: 409 `run_already_ended` if all have ended.
    """
    waiting = session.scalars(
        select(BatchItem.run_id)
        .join(Run, Run.id == BatchItem.run_id)
        .where(BatchItem.batch_id == batch_id, Run.state.not_in(TERMINAL))
        .order_by(BatchItem.position)
    ).all()
    if not waiting:
        raise ServiceError(409, "run_already_ended", "every scan of the batch has ended already")
    for run_id in waiting:
        try:
            runs.request_cancel(session, run_id)
        except ServiceError as error:
            if error.code != "run_already_ended":  # it ended meanwhile: fine
                raise
    return len(waiting)


def retry(session: Session, batch_id: str, *, principal: str) -> list[Run]:
    """Queue the failed and canceled scans of a batch anew; the caller commits and rings.

    The batch's row is locked meanwhile: of two who ask at once, one finds nothing left to do.

    Raises:
        ServiceError: 404 `not_found`; 409 `nothing_to_retry`.
    """
    batch = session.scalars(
        select(Batch).where(Batch.id == batch_id).with_for_update()
    ).one_or_none()
    if batch is None:
        raise ServiceError(404, "not_found", "no batch has this id")
    states = [RunState.FAILED, RunState.CANCELED]
    count = select(func.count()).select_from(BatchItem).where(BatchItem.batch_id == batch_id)
    num = session.scalar(count) or 0
    again = items(session, batch_id, size=num, states=states)
    if not again:
        raise ServiceError(409, "nothing_to_retry", "no scan of the batch failed or was canceled")
    made = []
    for item, _ended in again:
        run = _child(session, batch, item.volume_id, principal)
        item.run_id, item.tries = run.id, item.tries + 1
        made.append(run)
    session.flush()
    return made


def rows(session: Session, batch: Batch) -> Iterator[dict[str, Any]]:
    """What came of each scan, in order; some in memory at a time."""
    after = -1
    while found := items(session, batch.id, size=BLOCK, after=after):
        volume_ids = [item.volume_id for item, _ in found]
        wanted = select(Volume.id, Volume.subject).where(Volume.id.in_(volume_ids))
        subjects = {row.id: row.subject for row in session.execute(wanted)}
        for item, run in found:
            yield _row(item, run, subjects[item.volume_id])
        after = found[-1][0].position
        session.expunge_all()


def _row(item: BatchItem, run: Run, subject: str) -> dict[str, Any]:
    result = run.result or {}
    lesions = result.get("lesions")
    return {
        "position": item.position,
        "volume_id": item.volume_id,
        "subject": subject,
        "run_id": run.id,
        "state": run.state,
        "error_code": (run.error or {}).get("code"),
        "volumes_ml": result.get("volumes_ml"),
        "num_lesions": {name: one["num"] for name, one in lesions.items()} if lesions else None,
        "vector": result.get("vector"),
    }


def _child(session: Session, batch: Batch, volume_id: str, principal: str) -> Run:
    spec: dict[str, Any] = {"model": batch.model, "batch_id": batch.id}
    if batch.kind == "segment":
        spec["formats"] = batch.options.get("formats", [])
    return runs.create(
        session,
        kind=batch.kind,
        spec=spec,
        volume_id=volume_id,
        priority=PRIORITY,
        principal=principal,
    )
