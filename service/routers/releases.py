"""What makes a version live: history and rollback of aliases, golden cases, checks."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service import celery_app, golden, imports, moves, quota, registry, schemas, warming
from service.errors import ServiceError
from service.idempotency import Answer
from service.pagination import PageSize, PageToken, name_of, name_token_of
from service.routers import answers, deps, docs, receiving, views
from service.routers.models import WITH_ETAG, IfMatch, VersionNumber, expected_revision, with_etag
from service.storage import Receiver, Store

At = Annotated[AwareDatetime, Query(description="RFC 3339, with an offset from UTC.")]
CaseName = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9_-]{0,99}$")]
ARCHIVES = ("application/octet-stream", "application/zip", "application/x-tar")
_FILE = {
    "required": True,
    "description": "A zip or an uncompressed tar of one bundle, as `GET .../bundle` of another "
    "site gives it; or of `model.onnx` and a `manifest.json` without `files`.",
    "content": {one: {"schema": {"type": "string", "format": "binary"}} for one in ARCHIVES},
}

router = deps.router("models")


@router.get(
    "/models:resolve",
    operation_id="resolve_model",
    summary="What a reference means, or meant at a time",
    responses=docs.problems("invalid_request", "not_found"),
)
def resolve_model(
    ref: Annotated[schemas.ModelReference, Query()],
    _caller: deps.Viewer,
    session: deps.DbSession,
    at: At | None = None,
) -> schemas.ModelVersion:
    """The version of a model reference; with `at`, the one it had then."""
    if at is None:
        return views.model_version(registry.resolve(session, ref))
    return views.model_version(moves.resolve_at(session, ref, at))


@router.get(
    "/models/{name}/aliases/{alias}/history",
    operation_id="list_alias_moves",
    summary="Every move of an alias, newest first",
    responses=docs.problems("invalid_request", "not_found"),
)
def list_alias_moves(
    name: schemas.ModelName,
    alias: schemas.AliasName,
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> schemas.AliasMoves:
    """What was live when, and who made it so; a removed alias keeps its history."""
    registry.get(session, name)
    rows, after = moves.listing(session, name, alias, size=page_size, before=_seq_of(page_token))
    if not rows and page_token is None:
        raise ServiceError(404, "not_found", "the model never had such an alias")
    token = name_token_of(str(after)) if after is not None else None
    items = tuple(views.alias_move(row) for row in rows)
    return schemas.AliasMoves(items=items, next_page_token=token)


@router.post(
    "/models/{name}/aliases/{alias}:rollback",
    operation_id="rollback_alias",
    summary="Point an alias at the version before",
    response_model=schemas.Alias,
    responses=WITH_ETAG
    | docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "no_version_before",
        "precondition_failed",
        "precondition_required",
        "model_not_loadable",
        "model_not_warm",
    ),
)
def rollback_alias(
    *,
    name: schemas.ModelName,
    alias: schemas.AliasName,
    caller: deps.Researcher,
    session: deps.DbSession,
    sessions: deps.Sessions,
    settings: deps.SettingsOf,
    if_match: IfMatch = None,
) -> JSONResponse:
    """Undo the newest move that was not undone; `If-Match` is needed, so that it happens once.

    As every move it waits until the inference workers have the version loaded.
    """
    expected = expected_revision(session, name, alias, if_match)
    if expected is None:
        registry.get_alias(session, name, alias)
        raise ServiceError(
            428, "precondition_required", "If-Match must hold the alias' ETag: two could roll back"
        )
    if registry.get_alias(session, name, alias).revision == expected:  # else it is refused below
        version = moves.version_before(session, name, alias)
        digest = registry.get_version(session, name, version).digest
        session.rollback()  # nothing is locked while workers load the model
        warming.before_move(sessions, settings, digest)
    row = moves.rollback(session, name, alias, if_match=expected, principal=caller.id)
    session.commit()
    return with_etag(row)


@router.get(
    "/models/{name}/golden",
    operation_id="list_golden_cases",
    summary="List the golden cases of a model",
    responses=docs.problems("invalid_request", "not_found"),
)
def list_golden_cases(
    name: schemas.ModelName, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.GoldenCases:
    """All of them; there are at most 100."""
    registry.get(session, name)
    items = tuple(views.golden_case(row) for row in golden.cases(session, name))
    return schemas.GoldenCases(items=items)


@router.put(
    "/models/{name}/golden/{case}",
    operation_id="set_golden_case",
    summary="Make or replace a golden case",
    response_model=schemas.GoldenCase,
    responses=docs.also(201, schemas.GoldenCase, "It is new")
    | docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "request_too_large",
        "wrong_model_kind",
        "wrong_volume_kind",
        "label_shape_mismatch",
        "label_geometry_mismatch",
        "too_many_golden_cases",
    ),
)
def set_golden_case(
    name: schemas.ModelName,
    case: CaseName,
    ask: schemas.GoldenCaseSet,
    caller: deps.Researcher,
    session: deps.DbSession,
) -> JSONResponse:
    """What every version must answer; checks that were made before no longer count."""
    told = ask.model_dump(mode="json")
    wanted = ("labels",) if ask.labels_id is not None else ("vector", "min_cosine")
    row, is_new = golden.put(
        session,
        name,
        case,
        volume_id=ask.volume_id,
        labels_id=ask.labels_id,
        expected={key: told[key] for key in wanted},
        principal=caller.id,
    )
    session.commit()
    body = views.golden_case(row).model_dump(mode="json")
    return JSONResponse(body, 201 if is_new else 200)


@router.delete(
    "/models/{name}/golden/{case}",
    status_code=204,
    operation_id="delete_golden_case",
    summary="Remove a golden case",
    responses=docs.problems("forbidden", "invalid_request", "not_found"),
)
def delete_golden_case(
    name: schemas.ModelName, case: CaseName, _caller: deps.Researcher, session: deps.DbSession
) -> None:
    """Remove it; the scan stays. Checks that were made before no longer count."""
    golden.delete(session, name, case)
    session.commit()


@router.post(
    "/models/{name}/versions/{version}:check",
    status_code=202,
    operation_id="check_version",
    summary="Hold a version to the golden cases",
    response_model=schemas.Run,
    responses=docs.also(200, schemas.Run, "It ended within the time of `Prefer: wait`")
    | docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "no_golden_cases",
        "quota_exceeded",
        "idempotency_mismatch",
        "idempotency_in_flight",
    ),
)
async def check_version(
    *,
    name: schemas.ModelName,
    version: VersionNumber,
    caller: deps.Researcher,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
    prefer: answers.PreferOf = None,
) -> JSONResponse:
    """Queue a run of the version on every golden case."""

    def work(session: Session) -> Answer:
        row = registry.get_version(session, name, version)
        run = golden.start_check(session, row, principal=caller.id)
        return answers.accepted(run, "runs", views.run)

    return await answers.queue(once, caller, settings, work, view=views.run, prefer=prefer)


@router.get(
    "/models/{name}/versions/{version}/checks",
    operation_id="list_version_checks",
    summary="The newest checks of a version",
    responses=docs.problems("invalid_request", "not_found"),
)
def list_version_checks(
    name: schemas.ModelName, version: VersionNumber, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.VersionChecks:
    """The newest 50, with what each case scored."""
    row = registry.get_version(session, name, version)
    items = tuple(views.version_check(one) for one in golden.checks(session, row))
    return schemas.VersionChecks(items=items)


def _seq_of(token: str | None) -> int | None:
    text = name_of(token)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise ServiceError(422, "invalid_request", "page_token is not one of ours")
    return int(text)


@router.post(
    "/models:import",
    status_code=202,
    operation_id="import_model",
    summary="Take in a model from elsewhere",
    response_model=schemas.Run,
    openapi_extra={"requestBody": _FILE},
    responses=docs.problems(
        "forbidden",
        "invalid_request",
        "unsupported_media_type",
        "request_too_large",
        "insufficient_storage",
        "not_an_archive",
        "not_live",
        "quota_exceeded",
        "idempotency_mismatch",
        "idempotency_in_flight",
    ),
)
async def import_model(
    *,
    request: Request,
    caller: deps.Researcher,
    store: deps.StoreOf,
    settings: deps.SettingsOf,
    sessions: deps.Sessions,
    key: deps.KeyOf,
    name: Annotated[schemas.ModelName, Query(description="What it becomes a version of.")],
) -> JSONResponse:
    """Keep the file and queue a run that opens it, confined, on the worker and registers it.

    The same bytes sent again are another run, and another version of the same digest; with the
    same `Idempotency-Key` they are the first run.
    """
    receiving.check_media_type(request, ARCHIVES)
    announced = receiving.declared_size(request) or 0
    await run_in_threadpool(receiving.check_room, store, announced, settings.max_upload_bytes)
    await run_in_threadpool(receiving.check_quota, sessions, caller, settings, announced)
    writer = await run_in_threadpool(store.receive, max_bytes=settings.max_upload_bytes)
    with writer:
        await receiving.receive(request, writer)
        await run_in_threadpool(receiving.check_quota, sessions, caller, settings, writer.size)
        sha256, size = await run_in_threadpool(_committed, store, writer)

    def work(session: Session) -> Answer:
        quota.check_runs(session, caller.project_id, settings)
        run = imports.create(
            session, store, name=name, sha256=sha256, size=size, principal=caller.id
        )
        return answers.accepted(run, "runs", views.run)

    asked = deps.asked_sha256(caller, f"{name} {sha256}".encode())
    once = deps.Once(sessions, f"{request.method} {request.url.path}", key, asked)
    answer, is_new = await run_in_threadpool(once.answer, caller, work)
    if is_new:
        await run_in_threadpool(
            celery_app.ring, str(answer.body["id"]), "inference", settings=settings
        )
    return deps.reply(answer, is_new=is_new)


def _committed(store: Store, writer: Receiver) -> tuple[str, int]:
    """Publish a received file that begins like a zip or a tar."""
    writer.close()
    with writer.path.open("rb") as file:
        start = file.read(512)
    if start[:4] != b"PK\x03\x04" and start[257:262] != b"ustar":
        raise ServiceError(
            422, "not_an_archive", "the body must be a zip, or a tar without compression"
        )
    return store.commit_blob(writer)
