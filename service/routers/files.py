"""Files going out: as attachments of no guessable type, from the store or zipped on the way."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from models import bundle
from service.errors import ServiceError

CHUNK_BYTES = 1 << 20
BYTES = "application/octet-stream"
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


def attachment(path: Path, name: str, media_type: str = BYTES) -> Download:
    """A stored file under a name of ours.

    Raises:
        ServiceError: 500 `blob_corrupt`; the file is missing.
    """
    if not path.is_file():
        raise ServiceError(500, "blob_corrupt", "the stored file is missing")
    return Download(path, filename=name, media_type=media_type)


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
