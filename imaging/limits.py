"""Absolute caps on what a scan may be, checked before work is done on it.

Absolute and not ratios: an honest all-zero mask compresses a thousandfold, like a bomb
(reliability.md, S5).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import BinaryIO

from imaging.errors import ScanError

MAX_VOXELS = 512 * 512 * 2048
"""Voxels of one volume: 1 GiB in int16."""

MAX_SIDE = 8192
"""Voxels along one axis of a volume; slices are handled one by one, so their number costs time."""

MAX_CHANNELS = 64
"""Of a file that holds several images of one place; MR protocols have four."""

MAX_PIXELS = 1 << 26
"""Pixels of one 2D image: four times a large mammogram; stitched long-leg radiographs have 3e7."""

MAX_PIXELS_SIDE = 1 << 15
"""Pixels along one side of a 2D image."""

MAX_FILE_BYTES = 640 << 20
"""Unpacked size of one DICOM file: 1000 frames of 512 x 512 take 500 MiB."""

MAX_INFLATED_BYTES = 256 << 20
"""Data set of one DICOM file in the deflated transfer syntax, which inflates slowly."""

MAX_READS = 1_500_000
"""Pieces that a DICOM parser may ask for in one file: two an element, so an enhanced object of
5,000 frames of 150 elements passes; millions of empty elements, a few MiB packed, take minutes."""

READS_PER_FILE = 2_000
"""What each file of a series adds to `MAX_READS` for the whole of it: a slice takes some 300."""

MAX_UNPACKED_BYTES = 4 << 30
"""Unpacked size of all members of a zip together."""

MAX_MEMBERS = 20_000
"""Files in a zip or a folder."""

CHUNK_BYTES = 8 << 20


def read_capped(file: BinaryIO, cap_bytes: int, *, start: bytes = b"") -> bytes:
    """The rest of a file, counted while it is read; what a header declares is not trusted.

    Args:
        file: Open for reading.
        cap_bytes: The most that may come out of it.
        start: What was read of it before; the result begins with it.

    Raises:
        ScanError: `too_large` when more than `cap_bytes` come out.
    """
    if getattr(file, "declared_bytes", 0) > cap_bytes:
        raise ScanError("too_large", f"a file declares more than {cap_bytes} bytes")
    chunks, num_bytes = [start], len(start)
    while chunk := file.read(CHUNK_BYTES):
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > cap_bytes:
            raise ScanError("too_large", f"a file unpacks to more than {cap_bytes} bytes")
    return b"".join(chunks)


class Metered(io.BytesIO):
    """Bytes in memory for a parser, with caps on how often it may read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._own = ReadBudget(MAX_READS)
        self._shared = _shared_budget.get()

    def read(self, size: int | None = -1, /) -> bytes:
        """As `io.BytesIO.read`.

        Raises:
            ScanError: `too_large` after `MAX_READS` calls, or when a shared budget is spent.
        """
        self._own.spend()
        if self._shared is not None:
            self._shared.spend()
        return super().read(size)


class ReadBudget:
    """How often parsers may still read."""

    def __init__(self, num_reads: int) -> None:
        self._left = num_reads

    def spend(self) -> None:
        """Take one; `too_large` when there is none."""
        self._left -= 1
        if self._left < 0:
            raise ScanError("too_large", "more elements in the DICOM headers than are read")


_shared_budget: ContextVar[ReadBudget | None] = ContextVar("shared_budget", default=None)


@contextmanager
def shared_reads(num_files: int) -> Iterator[None]:
    """Have the parsers of so many files share one budget, so that many bad files cost as one."""
    token = _shared_budget.set(ReadBudget(MAX_READS + READS_PER_FILE * num_files))
    try:
        yield
    finally:
        _shared_budget.reset(token)
