"""Bodies that are scans: what is refused unread, streaming to the disk, and reading in turn.

A body goes to the disk in pieces of a megabyte, never on the event loop, so the memory of the API
does not grow with what is sent. Reading happens in child processes (`imaging.sandbox`) that may
take 4 GiB each: only `PCRL_READERS` of them at once, in threads that nothing else waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service import db, quota
from service.auth import Principal
from service.errors import ServiceError
from service.routers import deps, views
from service.settings import Settings
from service.storage import Store

PIECE_BYTES = 1 << 20
MEDIA_TYPES = (
    "application/octet-stream",
    "application/zip",
    "application/dicom",
    "application/gzip",
    "image/png",
    "image/jpeg",
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
    "not_two_dimensional",
    "constant_image",
    "missing_slices",
    "duplicate_slices",
    "uneven_spacing",
    "gantry_tilt",
    "bad_geometry",
    "non_finite_voxels",
    "labels_not_integers",
    "archive_unsafe",
    "burned_in_annotation",
    "too_large",
)

Result = TypeVar("Result")


class Writer(Protocol):
    """What takes the bytes of a body: a `storage.Receiver`, or a `storage.Piece`."""

    def write(self, chunk: bytes, /) -> None:
        """Append bytes."""


def check_media_type(request: Request, accepted: tuple[str, ...] = MEDIA_TYPES) -> None:
    """Refuse a body that is announced as something else (415)."""
    sent = request.headers.get("content-type", accepted[0]).partition(";")[0].strip().lower()
    if sent not in accepted:
        raise ServiceError(
            415,
            "unsupported_media_type",
            f"the body must be the scan's bytes, sent as one of {', '.join(accepted)}",
        )


def declared_size(request: Request) -> int | None:
    """The announced length of the body, where one is."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isascii() and declared.isdecimal() else None


def check_room(store: Store, size: int, max_bytes: int) -> None:
    """Refuse a file by its announced size, before anything is read (413, 507)."""
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


def check_quota(
    sessions: sessionmaker[Session], caller: Principal, settings: Settings, size: int
) -> None:
    """Refuse a file for which the caller's project has no room (429).

    To be asked by the announced size, before anything is read, and by what was received: a body in
    chunks announces none.
    """
    with sessions() as session:
        quota.check_bytes(session, caller.project_id, settings, more=size)


async def receive(request: Request, writer: Writer) -> None:
    """Write the body as it arrives, in pieces of a megabyte, never on the event loop."""
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += chunk
        if len(waiting) >= PIECE_BYTES:
            await run_in_threadpool(writer.write, bytes(waiting))
            waiting.clear()
    if waiting:
        await run_in_threadpool(writer.write, bytes(waiting))


async def in_turn(request: Request, read: Callable[[], Result]) -> Result:
    """Read a scan, when fewer than `PCRL_READERS` are being read."""
    state = request.app.state
    if not hasattr(state, "readers"):  # made on the running event loop
        state.readers = anyio.CapacityLimiter(state.settings.readers)
    limiter = cast(anyio.CapacityLimiter, state.readers)
    return await anyio.to_thread.run_sync(read, limiter=limiter)


def volume_answer(volume: db.Volume, size_bytes: int, *, is_new: bool) -> JSONResponse:
    """201 for a new volume, 200 for one that was there."""
    body = views.volume(volume, size_bytes).model_dump(mode="json")
    location = f"{deps.PREFIX}/volumes/{volume.id}"
    return JSONResponse(body, 201 if is_new else 200, headers={"Location": location})
