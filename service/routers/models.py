"""Models: look, download, and move aliases."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Header, Path, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AwareDatetime

from service import db, gate, moves, registry, schemas, warming
from service.auth import Role
from service.errors import ServiceError
from service.pagination import PageSize, PageToken, name_of, name_token_of
from service.routers import deps, docs, files, views

IfMatch = Annotated[
    str | None,
    Header(max_length=100, description="The alias' ETag as it was read; `*`: it must exist."),
]
VersionNumber = Annotated[int, Path(ge=1, lt=2**31)]
_ETAG = re.compile(r'"(\d{1,9})"')
WITH_ETAG: docs.Responses = {
    200: {"headers": {"ETag": {"description": "The revision", "schema": {"type": "string"}}}}
}
_ARCHIVE: docs.Responses = {
    200: {
        "description": "The bundle's folder as a zip archive",
        "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
    }
}

router = deps.router("models")


@router.get(
    "/models",
    operation_id="list_models",
    summary="List models by name",
    responses=docs.problems("invalid_request"),
)
def list_models(
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> schemas.ModelPage:
    """Registered models without their versions."""
    rows = registry.listing(session, size=page_size + 1, after=name_of(page_token))
    page = rows[:page_size]
    token = name_token_of(page[-1].name) if len(rows) > page_size else None
    items = tuple(views.model_summary(row) for row in page)
    return schemas.ModelPage(items=items, next_page_token=token)


@router.get(
    "/models/{name}",
    operation_id="get_model",
    summary="Get a model",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_model(
    name: schemas.ModelName, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.Model:
    """A model with its versions, newest first, and its aliases."""
    row = registry.get(session, name)
    return views.model(row, registry.versions(session, name), registry.aliases(session, name))


@router.get(
    "/models/{name}/versions/{version}",
    operation_id="get_model_version",
    summary="Get one version of a model",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_model_version(
    name: schemas.ModelName, version: VersionNumber, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.ModelVersion:
    """A version with its manifest: recipe, preprocessing, lineage, metrics, parity."""
    return views.model_version(registry.get_version(session, name, version))


@router.get(
    "/models/{name}/versions/{version}/bundle",
    operation_id="download_bundle",
    summary="Download a model",
    response_class=Response,
    responses=_ARCHIVE
    | docs.problems("invalid_request", "not_found", "bundle_corrupt", "bundle_invalid"),
)
def download_bundle(
    name: schemas.ModelName,
    version: VersionNumber,
    _caller: deps.Viewer,
    session: deps.DbSession,
    store: deps.StoreOf,
) -> Response:
    """The bundle (ONNX, manifest, card, weights), every file checked against its digest."""
    digest = registry.get_version(session, name, version).digest
    session.rollback()  # nothing is locked while the files are hashed
    filename = f"{name}-{version}"
    return StreamingResponse(
        files.zip_of(store.bundle_dir(digest), filename),
        media_type="application/zip",
        headers={"Content-Disposition": f'attachment; filename="{filename}.zip"'},
    )


@router.get(
    "/models/{name}/aliases/{alias}",
    operation_id="get_alias",
    summary="Get an alias",
    response_model=schemas.Alias,
    responses=WITH_ETAG | docs.problems("invalid_request", "not_found"),
)
def get_alias(
    name: schemas.ModelName,
    alias: schemas.AliasName,
    _caller: deps.Viewer,
    session: deps.DbSession,
    at: Annotated[
        AwareDatetime | None, Query(description="RFC 3339: where it pointed then, without ETag.")
    ] = None,
) -> JSONResponse:
    """Where an alias points now, or pointed at a time."""
    if at is not None:
        past = views.past_alias(moves.at(session, name, alias, at))
        return JSONResponse(past.model_dump(mode="json"))
    return with_etag(registry.get_alias(session, name, alias))


@router.put(
    "/models/{name}/aliases/{alias}",
    operation_id="set_alias",
    summary="Point an alias at a version",
    response_model=schemas.Alias,
    responses=WITH_ETAG
    | docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "request_too_large",
        "precondition_failed",
        "gate_failed",
        "model_not_loadable",
        "model_not_warm",
    ),
)
def set_alias(
    *,
    name: schemas.ModelName,
    alias: schemas.AliasName,
    ask: schemas.AliasSet,
    caller: deps.Researcher,
    session: deps.DbSession,
    sessions: deps.Sessions,
    settings: deps.SettingsOf,
    if_match: IfMatch = None,
) -> JSONResponse:
    """Make or move an alias; with `If-Match`, only if nobody moved it meanwhile.

    The version must pass the gate (parity, a complete card, the golden cases). It moves once every
    inference worker has the version loaded and has run it: no request waits.
    """
    expected = expected_revision(session, name, alias, if_match)
    version = registry.get_version(session, name, ask.version)
    reason = ask.override_reason
    if reason is not None and not caller.role.covers(Role.ADMIN):
        raise ServiceError(403, "forbidden", "only an admin moves an alias against the gate")
    gate.require(session, version, may_override=reason is not None)
    digest = version.digest  # read before the rollback: later it would begin a transaction
    session.rollback()  # nothing is locked while workers load the model
    warming.before_move(sessions, settings, digest)
    version = registry.get_version(session, name, ask.version)
    unmet = gate.require(session, version, may_override=reason is not None)
    row = registry.set_alias(
        session, name, alias, ask.version, principal=caller.id, if_match=expected
    )
    if unmet:
        move = moves.newest(session, name, alias)
        move.override_reason, move.unmet = reason, unmet
    session.commit()
    return with_etag(row)


@router.delete(
    "/models/{name}/aliases/{alias}",
    status_code=204,
    operation_id="delete_alias",
    summary="Remove an alias",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "precondition_failed"),
)
def delete_alias(
    name: schemas.ModelName,
    alias: schemas.AliasName,
    caller: deps.Researcher,
    session: deps.DbSession,
    if_match: IfMatch = None,
) -> None:
    """Remove an alias; the versions stay."""
    expected = expected_revision(session, name, alias, if_match)
    registry.delete_alias(session, name, alias, principal=caller.id, if_match=expected)
    session.commit()


def expected_revision(
    session: deps.DbSession, name: str, alias: str, if_match: str | None
) -> int | None:
    """The revision that `If-Match` asks for; None if it asks for nothing."""
    if if_match is None:
        return None
    registry.get(session, name)
    if if_match.strip() == "*":
        try:
            return registry.get_alias(session, name, alias).revision
        except ServiceError:
            raise ServiceError(
                412, "precondition_failed", "the alias was expected to exist; it does not"
            ) from None
    found = _ETAG.fullmatch(if_match.strip())
    if found is None:
        raise ServiceError(
            412, "precondition_failed", "If-Match holds no ETag that an alias ever had"
        )
    return int(found[1])


def with_etag(row: db.ModelAlias) -> JSONResponse:
    """An alias with its ETag."""
    body = views.alias(row).model_dump(mode="json")
    return JSONResponse(body, headers={"ETag": f'"{row.revision}"'})
