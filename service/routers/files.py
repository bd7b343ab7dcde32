"""Files going out: as attachments of no guessable type, from the store or zipped on the way."""

from __future__ import annotations

import base64
import io
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from models import bundle
from service.storage import Store

CHUNK_BYTES = 1 << 20
BYTES = "application/octet-stream"
LARGE_BYTES = 64 << 20
REMEMBER_S = 600.0
_checked: dict[Path, tuple[tuple[int, int, int, int], float]] = {}
"""Large files that were hashed lately, as they were then."""
_SIMPLE_RANGE = re.compile(rb"bytes=(\d{1,18}-\d{0,18}|-\d{1,18})")


class Download(FileResponse):
    """A file with byte ranges; a `Range` header it does not understand is ignored (RFC 9110)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or the part of it that was asked for."""
        headers = [
            (name, value)
            for name, value in scope["headers"]
            if name != b"range" or _SIMPLE_RANGE.fullmatch(value)
        ]
        await super().__call__({**scope, "headers": headers}, receive, send)


def attachment(store: Store, sha256: str, name: str, media_type: str = BYTES) -> Download:
    """A stored file under a name of ours, hashed before its first byte leaves.

    Blocking. The digest goes along (RFC 9530), so that the receiver can check what arrived.

    Raises:
        BlobCorrupt: The file is missing or has changed.
    """
    path = _verified(store, sha256)
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    headers = {"Repr-Digest": f"sha-256=:{digest}:"}
    return Download(path, filename=name, media_type=media_type, headers=headers)


def _verified(store: Store, sha256: str) -> Path:
    """The file's path; one that is large is hashed again only after a while or a change.

    A client fetches a large file in many ranges; each would cost the hash of the whole.
    """
    path = store.path_of(sha256)
    try:
        found = path.stat()
    except FileNotFoundError:
        return store.verify(sha256)  # raises
    state = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    now = time.monotonic()
    known = _checked.get(path)
    if known is not None and known[0] == state and now - known[1] < REMEMBER_S:
        return path
    store.verify(sha256)
    if found.st_size >= LARGE_BYTES:
        for other in [key for key, (_, at) in list(_checked.items()) if now - at >= REMEMBER_S]:
            _checked.pop(other, None)
        _checked[path] = (state, now)
    return path


def zip_of(folder: Path, prefix: str) -> Iterator[bytes]:
    """A bundle as a zip archive, stored without compression, made while it is sent.

    Every file is checked first, so what is sent is what was registered.

    Args:
        folder: The bundle.
        prefix: Folder inside the archive.

    Raises:
        BundleError: The bundle is not what was stored.
    """
    manifest = bundle.load(folder)
    return _zipped(folder, [bundle.MANIFEST, *sorted(manifest.files)], prefix)


def _zipped(folder: Path, names: list[str], prefix: str) -> Iterator[bytes]:
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            entry = zipfile.ZipInfo(f"{prefix}/{name}")  # dated 1980: the same bytes every time
            entry.external_attr = 0o644 << 16
            with (
                (folder / name).open("rb") as source,
                archive.open(entry, "w", force_zip64=True) as member,
            ):
                while chunk := source.read(CHUNK_BYTES):
                    member.write(chunk)
                    yield sink.taken()
    yield sink.taken()


class _Sink(io.RawIOBase):
    """Where `zipfile` writes; holds what has not been sent yet."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # zipfile writes bytes alone
        self._waiting += data
        return len(data)

    def taken(self) -> bytes:
        taken = bytes(self._waiting)
        self._waiting.clear()
        return taken
