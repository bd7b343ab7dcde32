"""Volumes and 2D images: upload, look, download, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from imaging.identity import Policy
from service import db, retention, schemas, volumes
from service.auth import Principal
from service.errors import ServiceError
from service.pagination import PageSize, PageToken, cursor_of, token_of
from service.routers import deps, docs, files, receiving, views
from service.storage import Store

_BODY = {
    "required": True,
    "description": "The scan's bytes as they are: NIfTI (.nii, .nii.gz), NRRD, MetaImage (.mha), a "
    "zip of DICOM files or of a header and its voxels (.mhd and .raw, .nhdr and .raw), or one "
    "multi-frame DICOM file; with `kind=image_2d` a PNG, a JPEG, or a radiograph as one DICOM "
    "file. The content decides, not the media type.",
    "content": {
        name: {"schema": {"type": "string", "format": "binary"}} for name in receiving.MEDIA_TYPES
    },
}

router = deps.router("volumes")


@router.post(
    "/volumes",
    status_code=201,
    operation_id="upload_volume",
    summary="Upload a scan, a label volume or a 2D image",
    response_model=schemas.Volume,
    openapi_extra={"requestBody": _BODY},
    responses=docs.also(200, schemas.Volume, "The same bytes were there already")
    | docs.problems(
        "forbidden",
        "invalid_request",
        "unsupported_media_type",
        "request_too_large",
        "insufficient_storage",
        "quota_exceeded",
        *receiving.SCAN_PROBLEMS,
    ),
)
async def upload_volume(
    *,
    request: Request,
    caller: deps.Annotator,
    store: deps.StoreOf,
    settings: deps.SettingsOf,
    sessions: deps.Sessions,
    kind: Annotated[schemas.VolumeKind, Query(description="What the file is.")] = "image",
    subject: Annotated[schemas.Subject | None, Query()] = None,
    series_uid: Annotated[
        schemas.SeriesUid | None, Query(description="Which series of an archive with several.")
    ] = None,
) -> JSONResponse:
    """Stream a scan into the store and read it in a child process; all or nothing is kept."""
    receiving.check_media_type(request)
    announced = receiving.declared_size(request) or 0
    await run_in_threadpool(receiving.check_room, store, announced, settings.max_upload_bytes)
    await run_in_threadpool(receiving.check_quota, sessions, caller, settings, announced)
    writer = await run_in_threadpool(store.receive, max_bytes=settings.max_upload_bytes)
    with writer:
        await receiving.receive(request, writer)
        if writer.size == 0:
            raise ServiceError(422, "not_a_scan", "the request has no body; a scan was expected")
        await run_in_threadpool(receiving.check_quota, sessions, caller, settings, writer.size)
        sha256 = await run_in_threadpool(writer.close)
        volume, size, is_new = await receiving.in_turn(
            request,
            lambda: _ingest(
                sessions,
                store,
                writer.path,
                sha256,
                writer.size,
                kind=kind,
                subject=subject,
                series_uid=series_uid,
                caller=caller,
                policy=settings.policy(),
            ),
        )
    return receiving.volume_answer(volume, size, is_new=is_new)


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
    items = tuple(views.volume(row, size_of(session, row)) for row in page.items)
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
    return views.volume(row, size_of(session, row))


@router.get(
    "/volumes/{volume_id}/file",
    operation_id="download_volume",
    summary="Download a volume",
    response_class=Response,
    responses=docs.file("The file", files.BYTES)
    | docs.problems(
        "invalid_request", "not_found", "format_not_made", "no_longer_kept", "blob_corrupt"
    ),
)
def download_volume(
    volume_id: schemas.VolumeId,
    _caller: deps.Viewer,
    session: deps.DbSession,
    store: deps.StoreOf,
    format: Annotated[
        Literal["nifti", "png", "original"] | None,
        Query(
            description="RAS+ NIfTI (of a volume, and its default), grey PNG (of a 2D image, and "
            "its default), or what was sent, without identities."
        ),
    ] = None,
) -> Response:
    """What is read of a scan: RAS+ NIfTI or grey PNG; or the file it was read from."""
    row = volumes.get(session, volume_id)
    if format != "original":
        made, ending = ("png", "png") if row.kind == "image_2d" else ("nifti", "nii")
        if format not in (None, made):
            raise ServiceError(409, "format_not_made", f"this scan is kept as {made}")
        session.rollback()  # nothing is locked while the file is hashed
        return files.attachment(store, row.voxels_sha256, f"{row.id}.{ending}")
    retention.require_original(row)
    session.rollback()
    return files.attachment(store, row.original_sha256, f"{row.id}.original")


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


def _ingest(
    sessions: sessionmaker[Session],
    store: Store,
    path: Path,
    sha256: str,
    size: int,
    *,
    kind: str,
    subject: str | None,
    series_uid: str | None,
    caller: Principal,
    policy: Policy | None,
) -> tuple[db.Volume, int, bool]:
    with sessions() as session:
        volume, is_new = volumes.ingest(
            session,
            store,
            sha256,
            size,
            kind=kind,
            subject=subject,
            series_uid=series_uid,
            principal=caller.id,
            policy=policy,
            path=path,
        )
        session.commit()
        return volume, size_of(session, volume), is_new


def size_of(session: Session, row: db.Volume) -> int:
    """Size in bytes of the kept file."""
    blob = session.get(db.Blob, row.original_sha256)
    assert blob is not None  # a foreign key
    return blob.size_bytes
