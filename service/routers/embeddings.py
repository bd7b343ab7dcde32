"""Embeddings: ask for one, look, stop; search for similar cases."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import Query
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from service import db, embeddings, region_sources, registry, runs, schemas, spaces, volumes
from service.pagination import PageSize, PageToken, cursor_of, token_of
from service.routers import answers, deps, docs, inference, views
from service.routers.runs import require_kind

KIND = db.RunKind.EMBED

router = deps.router("embeddings")


@router.post(
    "/embeddings",
    status_code=202,
    operation_id="create_embedding",
    summary="Embed a volume or a 2D image",
    response_model=schemas.Embedding,
    responses=docs.also(200, schemas.Embedding, "It ended within the time of `Prefer: wait`")
    | docs.problems(*inference.CREATE_PROBLEMS, "no_feature_map", "no_longer_kept", "not_ready"),
)
async def create_embedding(
    ask: schemas.EmbeddingCreate,
    caller: deps.Annotator,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
    prefer: answers.PreferOf = None,
) -> JSONResponse:
    """Queue an encoder on a volume or a 2D image, as it reads.

    Of a volume also on regions, where their source is named.
    """
    work = inference.work_of(
        ask,
        caller,
        kind=KIND,
        model_kind="encoder",
        collection="embeddings",
        view=views.embedding,
        more=lambda session, version: _regions(session, ask, version),
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


@router.post(
    "/embeddings:search",
    operation_id="search_embeddings",
    summary="Find similar cases",
    responses=docs.problems(
        "invalid_request",
        "not_found",
        "not_embedded",
        "not_ready",
        "request_too_large",
        "wrong_model_kind",
        "wrong_volume_kind",
    ),
)
def search_embeddings(
    ask: schemas.EmbeddingSearch,
    _caller: deps.Viewer,
    session: deps.DbSession,
    settings: deps.SettingsOf,
) -> schemas.SimilarCases:
    """The scans whose embeddings by one model have the largest cosine to a given one."""
    model, query, subject = _question(session, ask)
    is_same_left_out = ask.filters.exclude_same_subject
    found = spaces.search(
        session,
        query,
        model.digest,
        limit=ask.limit,
        filters=embeddings.Filters(
            modality=ask.filters.modality,
            kind=ask.filters.kind,
            not_subject=subject if is_same_left_out else None,
        ),
        max_bytes=settings.search_cache_bytes,
        region=ask.region,
    )
    items = tuple(
        schemas.SimilarCase(
            rank=rank,
            volume_id=one.volume_id,
            embedding_id=one.run_id,
            subject=one.subject,
            modality=one.modality,
            cosine=one.cosine,
        )
        for rank, one in enumerate(found.items, start=1)
    )
    return schemas.SimilarCases(
        model=model, region=ask.region, num_compared=found.num_compared, items=items
    )


def _regions(
    session: Session, ask: schemas.EmbeddingCreate, version: db.ModelVersion
) -> dict[str, Any]:
    """What the run's spec says of its regions; empty where none are asked for."""
    if ask.segmentation_id is None and ask.segmenter is None:
        return {}
    region_sources.require_feature_map(version)
    if ask.segmentation_id is not None:
        return {
            "regions": region_sources.of_segmentation(session, ask.segmentation_id, ask.volume_id)
        }
    segmenter = registry.resolve(session, str(ask.segmenter))
    require_kind(segmenter, "segmenter")
    inference.require_volumes(segmenter)
    inference.require_one_label_a_voxel(segmenter)
    return {"regions": region_sources.of_segmenter(segmenter)}


def _question(
    session: Session, ask: schemas.EmbeddingSearch
) -> tuple[schemas.ModelPointer, embeddings.Vector, str | None]:
    """Whose vectors are compared, with which (E,), and of which subject that one is."""
    if ask.embedding_id is not None:
        run = runs.get(session, ask.embedding_id, kinds=[KIND])
        query = embeddings.of_run(run, ask.region)
        pointer = schemas.ModelPointer.model_validate(run.spec["model"])
        return pointer, query, volumes.get(session, str(run.volume_id)).subject
    assert ask.model is not None  # the request's own check
    volume = None
    if ask.volume_id is not None:
        volume = volumes.get(session, ask.volume_id)
        if volume.kind == "labels":
            raise volumes.wrong_kind(volume, "image")
    version = registry.resolve(session, ask.model)
    require_kind(version, "encoder")
    pointer = schemas.ModelPointer(
        name=version.model_name, version=version.version, digest=version.digest
    )
    if volume is None:
        return pointer, np.array(ask.vector, dtype=np.float64), None
    reference = f"{version.model_name}/{version.version}"
    query = embeddings.of_volume(session, volume.id, version.digest, reference, ask.region)
    return pointer, query, volume.subject
