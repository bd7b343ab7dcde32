"""Volumes: upload, look, download, delete."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service import db, schemas, volumes
from service.auth import Principal
from service.errors import ServiceError
from service.pagination import PageSize, PageToken, cursor_of, token_of
from service.routers import deps, docs, files, views
from service.storage import Receiver, Store

CHUNK_BYTES = 1 << 20
MEDIA_TYPES = (
    "application/octet-stream",
    "application/zip",
    "application/dicom",
    "application/gzip",
)
SCAN_PROBLEMS = (
    "not_a_scan",
    "truncated_file",
    "empty_archive",
    "several_series",
    "no_such_series",
    "mixed_patients",
    "unsupported_transfer_syntax",
    "unsupported_format",
    "not_three_dimensional",
    "missing_slices",
    "duplicate_slices",
    "uneven_spacing",
    "gantry_tilt",
    "bad_geometry",
    "non_finite_voxels",
    "labels_not_integers",
    "archive_unsafe",
    "too_large",
)
_BODY = {
    "required": True,
    "description": "The scan's bytes as they are: NIfTI (.nii, .nii.gz), NRRD, MetaImage (.mha), a "
    "zip of DICOM files or of a header and its voxels (.mhd and .raw, .nhdr and .raw), or one "
    "multi-frame DICOM file. The content decides, not the media type.",
    "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES},
}

router = deps.router("volumes")


@router.post(
    "/volumes",
    status_code=201,
    operation_id="upload_volume",
    summary="Upload a scan or a label volume",
    response_model=schemas.Volume,
    openapi_extra={"requestBody": _BODY},
    responses=docs.also(200, schemas.Volume, "The same bytes were there already")
    | docs.problems(
        "forbidden",
        "invalid_request",
        "unsupported_media_type",
        "request_too_large",
        "insufficient_storage",
        *SCAN_PROBLEMS,
    ),
)
async def upload_volume(
    *,
    request: Request,
    caller: deps.Annotator,
    store: deps.StoreOf,
    settings: deps.SettingsOf,
    sessions: deps.Sessions,
    kind: Annotated[schemas.VolumeKind, Query(description="What the voxels are.")] = "image",
    subject: Annotated[schemas.Subject | None, Query()] = None,
    series_uid: Annotated[
        schemas.SeriesUid | None, Query(description="Which series of an archive with several.")
    ] = None,
) -> JSONResponse:
    """Stream a scan into the store and read it in a child process; all or nothing is kept."""
    _check_media_type(request)
    await run_in_threadpool(_check_room, request, store, settings.max_upload_bytes)
    writer = await run_in_threadpool(store.receive, max_bytes=settings.max_upload_bytes)
    with writer:
        await _receive(request, writer)
        if writer.size == 0:
            raise ServiceError(422, "not_a_scan", "the request has no body; a scan was expected")
        sha256, size = await run_in_threadpool(store.commit_blob, writer)
    volume, is_new = await run_in_threadpool(
        _ingest,
        sessions,
        store,
        sha256,
        size,
        kind=kind,
        subject=subject,
        series_uid=series_uid,
        caller=caller,
    )
    body = views.volume(volume, size).model_dump(mode="json")
    location = f"{deps.PREFIX}/volumes/{volume.id}"
    return JSONResponse(body, 201 if is_new else 200, headers={"Location": location})


@router.get(
    "/volumes",
    operation_id="list_volumes",
    summary="List volumes, newest first",
    responses=docs.problems("invalid_request"),
)
def list_volumes(
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
    kind: Annotated[schemas.VolumeKind | None, Query()] = None,
    subject: Annotated[schemas.Subject | None, Query()] = None,
) -> schemas.VolumePage:
    """Volumes, perhaps of one kind or of one subject."""
    page = volumes.listing(
        session, size=page_size, after=cursor_of(page_token), kind=kind, subject=subject
    )
    items = tuple(views.volume(row, _size_of(session, row)) for row in page.items)
    return schemas.VolumePage(items=items, next_page_token=token_of(page.next))


@router.get(
    "/volumes/{volume_id}",
    operation_id="get_volume",
    summary="Get a volume",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_volume(
    volume_id: schemas.VolumeId, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.Volume:
    """What is known of a volume."""
    row = volumes.get(session, volume_id)
    return views.volume(row, _size_of(session, row))


@router.get(
    "/volumes/{volume_id}/file",
    operation_id="download_volume",
    summary="Download a volume",
    response_class=Response,
    responses=docs.file("The file", files.BYTES)
    | docs.problems("invalid_request", "not_found", "blob_corrupt"),
)
def download_volume(
    volume_id: schemas.VolumeId,
    _caller: deps.Viewer,
    session: deps.DbSession,
    store: deps.StoreOf,
    format: Annotated[
        Literal["nifti", "original"],
        Query(description="RAS+ NIfTI without identifiers, or the bytes as they were sent."),
    ] = "nifti",
) -> Response:
    """The canonical NIfTI, or the original bytes."""
    row = volumes.get(session, volume_id)
    if format == "nifti":
        return files.attachment(store.path_of(row.voxels_sha256), f"{row.id}.nii")
    return files.attachment(store.path_of(row.original_sha256), f"{row.id}.original")


@router.delete(
    "/volumes/{volume_id}",
    status_code=204,
    operation_id="delete_volume",
    summary="Delete a volume",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "volume_in_use"),
)
def delete_volume(
    volume_id: schemas.VolumeId,
    _caller: deps.Researcher,
    session: deps.DbSession,
    store: deps.StoreOf,
) -> None:
    """Delete a volume that no dataset and no run refers to, and its files."""
    volumes.delete(session, store, volume_id)


def _check_media_type(request: Request) -> None:
    sent = request.headers.get("content-type", MEDIA_TYPES[0]).partition(";")[0].strip().lower()
    if sent not in MEDIA_TYPES:
        raise ServiceError(
            415,
            "unsupported_media_type",
            f"the body must be the scan's bytes, sent as one of {', '.join(MEDIA_TYPES)}",
        )


def _check_room(request: Request, store: Store, max_bytes: int) -> None:
    """Refuse by the declared length, before anything is read."""
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isascii() and declared.isdecimal() else 0
    if size > max_bytes:
        raise ServiceError(
            413,
            "request_too_large",
            f"{size} bytes were announced; at most {max_bytes} are accepted",
        )
    if store.free_bytes() - size < store.min_free_bytes:
        raise ServiceError(
            507, "insufficient_storage", "too little disk space would stay free after the upload"
        )


async def _receive(request: Request, writer: Receiver) -> None:
    """Write the body as it arrives, in pieces of a megabyte, never on the event loop."""
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += chunk
        if len(waiting) >= CHUNK_BYTES:
            await run_in_threadpool(writer.write, bytes(waiting))
            waiting.clear()
    if waiting:
        await run_in_threadpool(writer.write, bytes(waiting))


def _ingest(
    sessions: sessionmaker[Session],
    store: Store,
    sha256: str,
    size: int,
    *,
    kind: str,
    subject: str | None,
    series_uid: str | None,
    caller: Principal,
) -> tuple[db.Volume, bool]:
    with sessions() as session:
        found = volumes.ingest(
            session,
            store,
            sha256,
            size,
            kind=kind,
            subject=subject,
            series_uid=series_uid,
            principal=caller.id,
        )
        session.commit()
        return found


def _size_of(session: Session, row: db.Volume) -> int:
    blob = session.get(db.Blob, row.original_sha256)
    assert blob is not None  # a foreign key
    return blob.size_bytes
