"""Cascades: a new version of a model, composed of registered segmenters."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from service import cascades, schemas
from service.idempotency import Answer
from service.routers import deps, docs, views

router = deps.router("models")


@router.post(
    "/models/{name}/versions:cascade",
    status_code=201,
    operation_id="create_cascade",
    summary="Compose a cascade",
    response_model=schemas.ModelVersion,
    responses=docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "request_too_large",
        "wrong_model_kind",
        "bundle_corrupt",
        "bundle_invalid",
        "insufficient_storage",
        "idempotency_mismatch",
        "idempotency_in_flight",
    ),
)
def create_cascade(
    name: schemas.ModelName,
    ask: schemas.CascadeCreate,
    caller: deps.Researcher,
    once: deps.OnceOf,
    store: deps.StoreOf,
) -> JSONResponse:
    """Register a segmenter of two passes; nothing is trained, the networks stay as they are."""

    def work(session: Session) -> Answer:
        version = cascades.create(session, store, name, ask)
        body = views.model_version(version)
        location = f"{deps.PREFIX}/models/{name}/versions/{version.version}"
        return Answer(201, {"Location": location}, body.model_dump(mode="json"))

    answer, is_new = once.answer(caller, work)
    return deps.reply(answer, is_new=is_new)
