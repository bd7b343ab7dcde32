"""Uploads in pieces: begin, send, look, complete, give up.

For files that take long to send. `POST /uploads` says what will come; `PUT` sends it piece by
piece; `:complete` reads the scan and answers as `POST /volumes` does. Whatever breaks,
`offset_bytes` tells where to go on.
"""

from __future__ import annotations

import base64
import re
from contextlib import ExitStack
from datetime import timedelta
from typing import Annotated

from fastapi import Header, Request
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service import db, quota, schemas, uploads
from service.auth import Principal, site_pseudonyms
from service.errors import ServiceError
from service.idempotency import Answer
from service.routers import deps, docs, receiving
from service.routers.volumes import size_of
from service.settings import Settings
from service.storage import Piece, Store

MEDIA_TYPE = "application/octet-stream"
_RANGE = r"^bytes [0-9]{1,15}-[0-9]{1,15}/[0-9]{1,15}$"
_DIGEST = r"^sha-256=:[A-Za-z0-9+/]{43}=:$"
_BODY = {
    "required": True,
    "description": "The bytes of the piece.",
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}

router = deps.router("uploads")


@router.post(
    "/uploads",
    status_code=201,
    operation_id="begin_upload",
    summary="Begin an upload in pieces, or find it again",
    response_model=schemas.Upload,
    responses=docs.also(200, schemas.Upload, "Begun before: go on at `offset_bytes`")
    | docs.problems(
        "forbidden",
        "invalid_request",
        "request_too_large",
        "digest_mismatch",
        "idempotency_mismatch",
        "idempotency_in_flight",
        "insufficient_storage",
        "quota_exceeded",
    ),
)
async def begin_upload(
    body: schemas.UploadCreate,
    caller: deps.Annotator,
    once: deps.OnceOf,
    store: deps.StoreOf,
    settings: deps.SettingsOf,
) -> JSONResponse:
    """Announce a file; the same file of the same caller is the same upload, wherever it has got."""
    await run_in_threadpool(receiving.check_room, store, body.size_bytes, settings.max_upload_bytes)
    wanted = uploads.Wanted(
        sha256=body.sha256,
        size_bytes=body.size_bytes,
        kind=body.kind,
        subject=body.subject,
        series_uid=_kept_uid(body.series_uid, store, settings),
    )

    def work(session: Session) -> Answer:
        upload, is_new = uploads.begin(session, wanted, caller)
        if is_new:
            _check_quota(session, upload, settings)
        headers = {"Location": f"{deps.PREFIX}/uploads/{upload.id}"}
        shown = _view(upload, store, settings).model_dump(mode="json")
        return Answer(201 if is_new else 200, headers, shown)

    answer, is_new = await run_in_threadpool(once.answer, caller, work)
    return deps.reply(answer, is_new=is_new)


@router.get(
    "/uploads/{upload_id}",
    operation_id="get_upload",
    summary="Get an upload in pieces",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_upload(
    upload_id: schemas.UploadId,
    caller: deps.Viewer,
    session: deps.DbSession,
    store: deps.StoreOf,
    settings: deps.SettingsOf,
) -> schemas.Upload:
    """How far an upload of the caller's has got."""
    return _view(uploads.get(session, upload_id, caller), store, settings)


@router.put(
    "/uploads/{upload_id}",
    operation_id="send_piece",
    summary="Send the next piece of an upload",
    openapi_extra={"requestBody": _BODY},
    responses=docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "unsupported_media_type",
        "request_too_large",
        "upload_offset_mismatch",
        "upload_busy",
        "digest_mismatch",
        "insufficient_storage",
    ),
)
async def send_piece(
    *,
    upload_id: schemas.UploadId,
    request: Request,
    caller: deps.Annotator,
    store: deps.StoreOf,
    settings: deps.SettingsOf,
    sessions: deps.Sessions,
    content_range: Annotated[
        str,
        Header(
            pattern=_RANGE,
            description="Which bytes of the file these are, `bytes first-last/size` (RFC 9110).",
            examples=["bytes 0-8388607/268435456"],
        ),
    ],
    content_digest: Annotated[
        str,
        Header(
            pattern=_DIGEST,
            description="SHA-256 of the piece, `sha-256=:base64:` (RFC 9530).",
            examples=["sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"],
        ),
    ],
) -> schemas.Upload:
    """Append a piece that begins at `offset_bytes`: it is kept whole, or not at all."""
    receiving.check_media_type(request, (MEDIA_TYPE,))
    offset, size, total = _range_of(content_range)
    announced = receiving.declared_size(request)
    if announced is not None and announced != size:
        raise _invalid(f"Content-Range holds {size} bytes, Content-Length says {announced}")
    digest = _digest_of(content_digest)
    with sessions() as session:
        upload = await run_in_threadpool(_own, session, upload_id, caller)
        if total != upload.size_bytes:
            raise _invalid(f"Content-Range is of {total} bytes, the upload of {upload.size_bytes}")
        appending = uploads.Appending(session, store, upload).piece(offset, size, digest)
        held = ExitStack()
        piece: Piece = await run_in_threadpool(held.enter_context, appending)
        try:
            await receiving.receive(request, piece)
        except BaseException as error:
            # Not awaited: a request that is being canceled could not wait for a thread.
            held.__exit__(type(error), error, error.__traceback__)
            raise
        await run_in_threadpool(held.close)
        return await run_in_threadpool(_view, upload, store, settings)


@router.post(
    "/uploads/{upload_id}:complete",
    status_code=201,
    operation_id="complete_upload",
    summary="Make a volume of an upload",
    response_model=schemas.Volume,
    responses=docs.also(200, schemas.Volume, "The volume was there already")
    | docs.problems(
        "forbidden",
        "invalid_request",
        "not_found",
        "upload_incomplete",
        "upload_busy",
        "digest_mismatch",
        "insufficient_storage",
        "quota_exceeded",
        *receiving.SCAN_PROBLEMS,
    ),
)
async def complete_upload(
    *,
    upload_id: schemas.UploadId,
    request: Request,
    caller: deps.Annotator,
    store: deps.StoreOf,
    sessions: deps.Sessions,
    settings: deps.SettingsOf,
) -> JSONResponse:
    """Check the file's digest and read the scan in a child process; safe to repeat."""
    return await receiving.in_turn(
        request, lambda: _complete(sessions, store, upload_id, caller, settings)
    )


@router.delete(
    "/uploads/{upload_id}",
    status_code=204,
    operation_id="delete_upload",
    summary="Give an upload up",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "upload_busy"),
)
def delete_upload(
    upload_id: schemas.UploadId,
    caller: deps.Annotator,
    session: deps.DbSession,
    store: deps.StoreOf,
) -> None:
    """Forget an upload and its bytes; a volume that it became stays."""
    uploads.remove(session, store, uploads.get(session, upload_id, caller))


def _complete(
    sessions: sessionmaker[Session],
    store: Store,
    upload_id: str,
    caller: Principal,
    settings: Settings,
) -> JSONResponse:
    with sessions() as session:
        upload = uploads.get(session, upload_id, caller)
        if upload.volume_id is None:
            _check_quota(session, upload, settings)
        session.commit()
        volume, is_new = uploads.complete(session, store, upload, caller, policy=settings.policy())
        return receiving.volume_answer(volume, size_of(session, volume), is_new=is_new)


def _check_quota(session: Session, upload: db.Upload, settings: Settings) -> None:
    quota.check_bytes(
        session, upload.project_id, settings, more=upload.size_bytes, upload_id=upload.id
    )


def _kept_uid(series_uid: str | None, store: Store, settings: Settings) -> str | None:
    """What the database keeps of a series UID, which may identify the patient: its pseudonym."""
    if series_uid is None or not settings.deidentify:
        return series_uid
    return site_pseudonyms(store.data_dir).uid(series_uid)


def _own(session: Session, upload_id: str, caller: Principal) -> db.Upload:
    upload = uploads.get(session, upload_id, caller)
    session.commit()
    return upload


def _range_of(content_range: str) -> tuple[int, int, int]:
    """First byte, number of bytes, and size of the whole file."""
    first, last, total = (int(number) for number in re.findall(r"[0-9]+", content_range))
    if not first <= last < total:
        raise _invalid("Content-Range must be first-last/size with first <= last < size")
    size = last - first + 1
    if size > uploads.CHUNK_BYTES:
        raise ServiceError(
            413,
            "request_too_large",
            f"a piece of {size} bytes; at most {uploads.CHUNK_BYTES} are accepted",
        )
    return first, size, total


def _digest_of(content_digest: str) -> str:
    """Hexadecimal SHA-256."""
    return base64.b64decode(content_digest.removeprefix("sha-256=:").removesuffix(":")).hex()


def _invalid(detail: str) -> ServiceError:
    return ServiceError(422, "invalid_request", detail)


def _view(upload: db.Upload, store: Store, settings: Settings) -> schemas.Upload:
    expires_at = upload.updated_at + timedelta(hours=settings.upload_hours)
    return schemas.Upload.model_validate(
        {
            "id": upload.id,
            "state": "open" if upload.volume_id is None else "complete",
            "size_bytes": upload.size_bytes,
            "offset_bytes": uploads.offset_of(store, upload),
            "chunk_bytes": uploads.CHUNK_BYTES,
            "sha256": upload.sha256,
            "kind": upload.kind,
            "subject": upload.subject or None,
            "series_uid": upload.series_selector or None,
            "volume_id": upload.volume_id,
            "created_at": upload.created_at,
            "expires_at": expires_at,
        }
    )
