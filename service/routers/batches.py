"""Batches: one request over a dataset, its progress by scan, retry, and one table at the end."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import Query, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service import batches, celery_app, db, quota, registry, schemas
from service.errors import ServiceError
from service.idempotency import Answer
from service.pagination import (
    PageSize,
    PageToken,
    cursor_of,
    name_of,
    name_token_of,
    token_of,
)
from service.routers import deps, docs, inference
from service.routers.runs import require_kind

MODEL_KIND = {"segment": "segmenter", "embed": "encoder"}
RETRY_AFTER_S = "5"
_TABLE: docs.Responses = {
    200: {
        "description": "One row for each scan",
        "content": {"text/csv": {"schema": {"type": "string"}}},
    }
}

router = deps.router("batches")


@router.post(
    "/batches",
    status_code=202,
    operation_id="create_batch",
    summary="Run a model on every scan of a dataset",
    response_model=schemas.Batch,
    responses=docs.problems(*inference.CREATE_PROBLEMS),
)
async def create_batch(
    ask: schemas.BatchCreate,
    caller: deps.Annotator,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
) -> JSONResponse:
    """Queue a run for each scan, behind single requests. The reference is resolved now."""

    def work(session: Session) -> Answer:
        quota.check_runs(session, caller.project_id, settings)
        version = registry.resolve(session, ask.model)
        require_kind(version, MODEL_KIND[ask.kind])
        if ask.kind == "segment":
            inference.require_volumes(version)
        inference.require_one_label_a_voxel(version)
        batch = batches.create(
            session,
            dataset_id=ask.dataset_id,
            version=version,
            kind=ask.kind,
            options=ask.options.model_dump(mode="json"),
            principal=caller.id,
        )
        session.refresh(batch)
        headers = {
            "Location": f"{deps.PREFIX}/batches/{batch.id}",
            "Retry-After": RETRY_AFTER_S,
        }
        return Answer(202, headers, _views(session, [batch])[0].model_dump(mode="json"))

    answer, is_new = await run_in_threadpool(once.answer, caller, work)
    if is_new:  # one doorbell: a worker goes on until nothing waits, and upkeep wakes others
        await run_in_threadpool(
            celery_app.ring, str(answer.body["id"]), "inference", settings=settings
        )
    return deps.reply(answer, is_new=is_new)


@router.get(
    "/batches",
    operation_id="list_batches",
    summary="List batches, newest first",
    responses=docs.problems("invalid_request"),
)
def list_batches(
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
    dataset_id: Annotated[schemas.DatasetId | None, Query()] = None,
) -> schemas.BatchPage:
    """Batches, perhaps over one dataset."""
    page = batches.listing(
        session, size=page_size, after=cursor_of(page_token), dataset_id=dataset_id
    )
    items = tuple(_views(session, list(page.items)))
    return schemas.BatchPage(items=items, next_page_token=token_of(page.next))


@router.get(
    "/batches/{batch_id}",
    operation_id="get_batch",
    summary="Get a batch",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_batch(
    batch_id: schemas.BatchId, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.Batch:
    """How far it is: the number of scans in each state."""
    return _views(session, [batches.get(session, batch_id)])[0]


@router.get(
    "/batches/{batch_id}/items",
    operation_id="list_batch_items",
    summary="List the scans of a batch",
    responses=docs.problems("invalid_request", "not_found"),
)
def list_batch_items(
    *,
    batch_id: schemas.BatchId,
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
    state: Annotated[schemas.State | None, Query()] = None,
) -> schemas.BatchItems:
    """The scans in the dataset's order, perhaps those in one state, each with its newest run."""
    batches.get(session, batch_id)
    found = batches.items(
        session,
        batch_id,
        size=page_size + 1,
        after=_position_of(page_token),
        states=[state] if state is not None else None,
    )
    shown = found[:page_size]
    token = name_token_of(str(shown[-1][0].position)) if len(found) > page_size else None
    items = tuple(
        schemas.BatchItem.model_validate(
            {
                "position": item.position,
                "volume_id": item.volume_id,
                "run_id": run.id,
                "state": run.state,
                "tries": item.tries,
                "progress": run.progress,
                "error": run.error,
            }
        )
        for item, run in shown
    )
    return schemas.BatchItems(items=items, next_page_token=token)


@router.post(
    "/batches/{batch_id}:cancel",
    status_code=202,
    operation_id="cancel_batch",
    summary="Stop a batch",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "run_already_ended"),
)
def cancel_batch(
    batch_id: schemas.BatchId, _caller: deps.Annotator, session: deps.DbSession
) -> schemas.Batch:
    """Ask every scan's run that has not ended to end; what is done stays."""
    batch = batches.get(session, batch_id)
    batches.cancel(session, batch_id)
    session.commit()
    return _views(session, [batch])[0]


@router.post(
    "/batches/{batch_id}:retry",
    status_code=202,
    operation_id="retry_batch",
    summary="Do the failed scans of a batch again",
    response_model=schemas.Batch,
    responses=docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "nothing_to_retry",
        "quota_exceeded",
        "idempotency_mismatch",
        "idempotency_in_flight",
    ),
)
async def retry_batch(
    batch_id: schemas.BatchId,
    caller: deps.Annotator,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
) -> JSONResponse:
    """Queue the scans that failed or were canceled, by the same version of the model."""

    def work(session: Session) -> Answer:
        quota.check_runs(session, caller.project_id, settings)
        batches.retry(session, batch_id, principal=caller.id)
        headers = {"Location": f"{deps.PREFIX}/batches/{batch_id}", "Retry-After": RETRY_AFTER_S}
        view = _views(session, [batches.get(session, batch_id)])[0]
        return Answer(202, headers, view.model_dump(mode="json"))

    answer, is_new = await run_in_threadpool(once.answer, caller, work)
    if is_new:
        await run_in_threadpool(celery_app.ring, batch_id, "inference", settings=settings)
    return deps.reply(answer, is_new=is_new)


@router.get(
    "/batches/{batch_id}/table",
    operation_id="get_batch_table",
    summary="What came of every scan",
    response_model=schemas.BatchTable,
    responses=_TABLE | docs.problems("invalid_request", "not_found", "not_ready"),
)
def get_batch_table(
    batch_id: schemas.BatchId,
    _caller: deps.Viewer,
    session: deps.DbSession,
    format: Annotated[Literal["json", "csv"], Query()] = "json",
) -> Response:
    """Volumes in ml and numbers of lesions, or vectors, of a batch that has ended."""
    batch = batches.get(session, batch_id)
    standing = batches.standings(session, [batch_id])[batch_id]
    if standing.finished_at is None:
        raise ServiceError(
            409,
            "not_ready",
            f"there is a table once every scan has ended; {standing.num_ended} of "
            f"{standing.num_scans} have",
            extra={"state": standing.state},
            headers={"Retry-After": RETRY_AFTER_S},
        )
    rows = list(batches.rows(session, batch))
    if format == "json":
        return JSONResponse(
            schemas.BatchTable.model_validate({"rows": rows}).model_dump(mode="json")
        )
    headers = {"Content-Disposition": f'attachment; filename="{batch_id}.csv"'}
    return Response("".join(_csv(rows)), media_type="text/csv", headers=headers)


def _csv(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of the table: a column for each label's volume and lesions, or for each number."""
    facts = ("volume_id", "subject", "run_id", "state", "error_code")
    found: dict[str, None] = {}
    flat = []
    for row in rows:
        cells = {name: row[name] for name in facts}
        for key, unit in (("volumes_ml", "volume_ml"), ("num_lesions", "num_lesions")):
            cells |= {f"{unit}:{name}": value for name, value in (row[key] or {}).items()}
        cells |= {f"v{place}": value for place, value in enumerate(row["vector"] or ())}
        found |= dict.fromkeys(cells)
        flat.append(cells)
    line = io.StringIO()
    writer = csv.DictWriter(line, [*found] or [*facts], restval="", lineterminator="\r\n")
    writer.writeheader()
    for cells in flat:
        writer.writerow(cells)
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _views(session: Session, rows: list[db.Batch]) -> list[schemas.Batch]:
    standings = batches.standings(session, [row.id for row in rows])
    return [_view(row, standings[row.id]) for row in rows]


def _view(row: db.Batch, standing: batches.Standing) -> schemas.Batch:
    return schemas.Batch.model_validate(
        {
            "id": row.id,
            "dataset_id": row.dataset_id,
            "kind": row.kind,
            "model": row.model,
            "options": row.options,
            "state": standing.state,
            "num_scans": standing.num_scans,
            "counts": standing.counts,
            "fraction": round(standing.num_ended / max(standing.num_scans, 1), 4),
            "created_at": row.created_at,
            "finished_at": standing.finished_at,
        }
    )


def _position_of(token: str | None) -> int:
    text = name_of(token)
    if text is None:
        return -1
    if not text.isdecimal() or len(text) > 9:
        raise ServiceError(422, "invalid_request", "page_token is not one of ours")
    return int(text)
