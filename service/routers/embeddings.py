"""Embeddings: ask for one, look, stop."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from fastapi.responses import JSONResponse

from service import db, runs, schemas
from service.pagination import PageSize, PageToken, cursor_of, token_of
from service.routers import answers, deps, docs, inference, views

KIND = db.RunKind.EMBED

router = deps.router("embeddings")


@router.post(
    "/embeddings",
    status_code=202,
    operation_id="create_embedding",
    summary="Embed a volume",
    response_model=schemas.Embedding,
    responses=docs.also(200, schemas.Embedding, "It ended within the time of `Prefer: wait`")
    | docs.problems(*inference.CREATE_PROBLEMS),
)
async def create_embedding(
    ask: schemas.InferenceCreate,
    caller: deps.Annotator,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
    prefer: answers.PreferOf = None,
) -> JSONResponse:
    """Queue an encoder on an image volume."""
    work = inference.work_of(
        ask,
        caller,
        kind=KIND,
        model_kind="encoder",
        collection="embeddings",
        view=views.embedding,
    )
    return await answers.queue(once, caller, settings, work, view=views.embedding, prefer=prefer)


@router.get(
    "/embeddings",
    operation_id="list_embeddings",
    summary="List embeddings, newest first",
    responses=docs.problems("invalid_request"),
)
def list_embeddings(
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
    volume_id: Annotated[schemas.VolumeId | None, Query()] = None,
    state: Annotated[schemas.State | None, Query()] = None,
) -> schemas.EmbeddingPage:
    """Embeddings, perhaps of one volume or in one state."""
    page = runs.listing(
        session,
        size=page_size,
        after=cursor_of(page_token),
        kinds=[KIND],
        states=[state] if state is not None else None,
        volume_id=volume_id,
    )
    items = tuple(views.embedding(row) for row in page.items)
    return schemas.EmbeddingPage(items=items, next_page_token=token_of(page.next))


@router.get(
    "/embeddings/{embedding_id}",
    operation_id="get_embedding",
    summary="Get an embedding",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_embedding(
    embedding_id: schemas.EmbeddingId, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.Embedding:
    """An embedding as it is now."""
    return views.embedding(runs.get(session, embedding_id, kinds=[KIND]))


@router.post(
    "/embeddings/{embedding_id}:cancel",
    status_code=202,
    operation_id="cancel_embedding",
    summary="Stop an embedding",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "run_already_ended"),
)
def cancel_embedding(
    embedding_id: schemas.EmbeddingId, _caller: deps.Annotator, session: deps.DbSession
) -> schemas.Embedding:
    """Ask an embedding to end; asked again, the same answer."""
    return views.embedding(inference.cancel(session, embedding_id, KIND))
