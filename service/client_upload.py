"""Sending a large file in pieces, through breaks of the connection and restarts of the service.

Nothing has to be remembered on this side: the service knows an upload by the file's digest and
tells where it has got to, so a client that was killed goes on as well.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from service import schemas
from service.answers import ApiError

Send = Callable[..., httpx.Response]
"""Sends one request (method, path, ...) once; raises `ApiError`."""
OnProgress = Callable[[int], None]

_READ_BYTES = 1 << 20
_PAUSE_S, _MAX_PAUSE_S = 0.25, 5.0
_WAIT_FOR = frozenset({"upload_busy", "idempotency_in_flight"})


def send_in_pieces(
    send: Send,
    path: Path,
    wanted: Mapping[str, str],
    *,
    on_progress: OnProgress | None = None,
    patience_s: float,
    complete_timeout: httpx.Timeout,
) -> schemas.Volume:
    """Upload a file.

    Args:
        send: Sends a request once.
        path: The file; it must not change meanwhile.
        wanted: `kind`, and perhaps `subject` and `series_uid`.
        on_progress: Told the number of bytes that have arrived.
        patience_s: How long to go on asking a service that does not answer.
        complete_timeout: For the request that waits until the scan is read.

    Raises:
        ApiError: What the service refused with, or `unreachable` after `patience_s`.
    """
    with path.open("rb") as file:
        sha256, size = _measured(file)
        body = {"size_bytes": size, "sha256": sha256, **wanted}
        upload = _shown(_patiently(patience_s, lambda: send("POST", "uploads", json=body)))
        tell = on_progress or (lambda _: None)
        tell(upload.offset_bytes)
        moved, pause_s = time.monotonic(), _PAUSE_S
        while upload.offset_bytes < upload.size_bytes:
            before = upload.offset_bytes
            upload, refusal = _next_piece(send, file, upload, patience_s)
            if upload.offset_bytes > before:
                moved, pause_s = time.monotonic(), _PAUSE_S
            elif refusal is not None:
                if time.monotonic() + pause_s - moved > patience_s:
                    raise refusal
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            tell(upload.offset_bytes)
    completed = _patiently(
        patience_s,
        lambda: send("POST", f"uploads/{upload.id}:complete", timeout=complete_timeout),
    )
    return schemas.Volume.model_validate_json(completed.content)


def _next_piece(
    send: Send, file: BinaryIO, upload: schemas.Upload, patience_s: float
) -> tuple[schemas.Upload, ApiError | None]:
    """Send the piece at the upload's offset; if that fails, ask where it has got to instead."""
    offset = upload.offset_bytes
    file.seek(offset)
    piece = file.read(min(upload.chunk_bytes, upload.size_bytes - offset))
    if not piece:
        raise ApiError(0, "file_changed", "the file became shorter while it was sent")
    digest = base64.b64encode(hashlib.sha256(piece).digest()).decode()
    address = f"uploads/{upload.id}"
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Range": f"bytes {offset}-{offset + len(piece) - 1}/{upload.size_bytes}",
        "Content-Digest": f"sha-256=:{digest}:",
    }
    try:
        return _shown(send("PUT", address, content=piece, headers=headers)), None
    except ApiError as error:
        refusal = error
        is_about_bytes = error.code in ("upload_offset_mismatch", "digest_mismatch", "upload_busy")
        if not (error.is_transient or is_about_bytes):
            raise
    return _shown(_patiently(patience_s, lambda: send("GET", address))), refusal


def _patiently(patience_s: float, ask: Callable[[], httpx.Response]) -> httpx.Response:
    """Ask until there is an answer, with growing pauses."""
    deadline, pause_s = time.monotonic() + patience_s, _PAUSE_S
    while True:
        try:
            return ask()
        except ApiError as error:
            may_help = error.is_transient or error.code in _WAIT_FOR
            if not may_help or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def _measured(file: BinaryIO) -> tuple[str, int]:
    """SHA-256 (hexadecimal) and size of the file."""
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_READ_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _shown(answer: httpx.Response) -> schemas.Upload:
    return schemas.Upload.model_validate_json(answer.content)


def described(**wanted: Any) -> dict[str, str]:
    """What was given of the kind, the subject and the series."""
    return {name: str(value) for name, value in wanted.items() if value is not None}
