"""Datasets: make, look, delete; there is no change."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from service import datasets, schemas
from service.idempotency import Answer
from service.pagination import PageSize, PageToken, cursor_of, token_of
from service.routers import deps, docs, views

router = deps.router("datasets")


@router.post(
    "/datasets",
    status_code=201,
    operation_id="create_dataset",
    summary="Make a dataset",
    response_model=schemas.Dataset,
    responses=docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "request_too_large",
        "wrong_volume_kind",
        "label_shape_mismatch",
        "label_geometry_mismatch",
        "split_leaks_subject",
        "idempotency_mismatch",
        "idempotency_in_flight",
    ),
)
def create_dataset(
    ask: schemas.DatasetCreate, caller: deps.Researcher, once: deps.OnceOf, request: Request
) -> JSONResponse:
    """Freeze a list of scans with labels or classes, split by subject."""

    def work(session: Session) -> Answer:
        drawn = ask.split or schemas.SplitCreate()
        dataset = datasets.create(
            session,
            name=ask.name,
            items=[
                datasets.Item(item.volume_id, item.labels_id, item.split, item.classes)
                for item in ask.items
            ],
            split=datasets.Split(
                train=drawn.train, val=drawn.val, test=drawn.test, seed=drawn.seed
            ),
            principal=caller.id,
        )
        body = views.dataset(dataset, datasets.items_of(session, dataset.id))
        location = f"{deps.PREFIX}/datasets/{dataset.id}"
        return Answer(201, {"Location": location}, body.model_dump(mode="json"))

    answer, is_new = once.answer(caller, work)
    return deps.reply(answer, is_new=is_new)


@router.get(
    "/datasets",
    operation_id="list_datasets",
    summary="List datasets, newest first",
    responses=docs.problems("invalid_request"),
)
def list_datasets(
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> schemas.DatasetPage:
    """Datasets without their items."""
    page = datasets.listing(session, size=page_size, after=cursor_of(page_token))
    items = tuple(views.dataset_summary(row) for row in page.items)
    return schemas.DatasetPage(items=items, next_page_token=token_of(page.next))


@router.get(
    "/datasets/{dataset_id}",
    operation_id="get_dataset",
    summary="Get a dataset",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_dataset(
    dataset_id: schemas.DatasetId, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.Dataset:
    """A dataset with its items."""
    row = datasets.get(session, dataset_id)
    return views.dataset(row, datasets.items_of(session, dataset_id))


@router.delete(
    "/datasets/{dataset_id}",
    status_code=204,
    operation_id="delete_dataset",
    summary="Delete a dataset",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "dataset_in_use"),
)
def delete_dataset(
    dataset_id: schemas.DatasetId, _caller: deps.Researcher, session: deps.DbSession
) -> None:
    """Delete a dataset that no run refers to; its volumes stay."""
    datasets.delete(session, dataset_id)
    session.commit()
