"""Voxels as they lie in a file, streamed slab by slab into the narrowest type that holds them.

Shared by the formats whose header says all (NIfTI, NRRD, MetaImage). The header is judged before
memory is taken, so a file that lies about its size costs nothing.

Axes: A B C as stored, A fastest.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from imaging.checks import narrowed
from imaging.errors import ScanError
from imaging.limits import MAX_SIDE, MAX_VOXELS
from imaging.volume import Affine, Array, Shape

Packing = Literal["raw", "gzip", "zlib"]

MAX_HEADER_BYTES = 64 << 10
"""Of a header in text."""

MAX_OFFSET_BYTES = 64 << 20
SLAB_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class StoredHeader:
    """What a header in text says, checked."""

    shape: Shape
    affine: Affine
    """Voxel (A, B, C) to RAS+ mm."""
    dtype: np.dtype[Any]
    packing: Packing
    offset_bytes: int | None
    """Where the voxels start in their file; None: they are its last bytes."""
    is_detached: bool
    """The voxels are in another file."""

    @property
    def num_bytes(self) -> int:
        """Of the voxels, unpacked."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def starting_at(self, offset_bytes: int) -> StoredHeader:
        """The same header with a known place of the voxels."""
        return replace(self, offset_bytes=offset_bytes)


def read_voxels(
    file: BinaryIO, shape: Shape, dtype: np.dtype[Any], *, slope: float = 1, intercept: float = 0
) -> Array:
    """Stream voxels (A, B, C), in Fortran order, scaled: uint8, int16 or float32.

    Raises:
        ScanError: `truncated_file`, `non_finite_voxels`.
    """
    a, b, c = shape
    is_plain = (slope, intercept) == (1.0, 0.0)
    holder: np.dtype[Any] = np.dtype(np.float32)
    if is_plain and dtype == np.uint8:
        holder = np.dtype(np.uint8)
    elif is_plain and np.can_cast(dtype, np.int16):
        holder = np.dtype(np.int16)
    voxels = np.empty(shape, dtype=holder, order="F")
    rows = max(1, SLAB_BYTES // (a * b * dtype.itemsize))
    for start in range(0, c, rows):
        stop = min(c, start + rows)
        slab = _read_slab(file, dtype, (a, b, stop - start))
        if holder.kind == "f":
            slab = slab.astype(np.float64) * slope + intercept
            if not np.isfinite(slab).all():
                raise ScanError("non_finite_voxels", "some voxels are NaN or infinite")
        with np.errstate(over="ignore"):
            voxels[:, :, start:stop] = slab
    return narrowed(voxels)


def read_detached(file: BinaryIO, header: StoredHeader) -> Array:
    """The voxels (A, B, C) of a header in text, from a file that stands at its first byte.

    Raises:
        ScanError: `truncated_file`, `non_finite_voxels`, `unsupported_format`.
    """
    if header.offset_bytes is None:
        raise ScanError("unsupported_format", "voxels counted from the end of a separate file")
    skip(file, header.offset_bytes)
    with unpacked(file, header.packing) as voxels:
        found = read_voxels(voxels, header.shape, header.dtype)
        if header.packing != "raw":
            drain(voxels)
        return found


def skip(file: BinaryIO, num_bytes: int) -> None:
    """Read past so many bytes."""
    while num_bytes > 0:
        chunk = file.read(min(num_bytes, SLAB_BYTES))
        if not chunk:
            raise ScanError("truncated_file", "the file ends before its voxels start")
        num_bytes -= len(chunk)


def drain(file: BinaryIO) -> None:
    """Read on to the end of a packed stream, where its checksum stands; gives up on long tails."""
    for _ in range(MAX_OFFSET_BYTES // SLAB_BYTES):
        if not file.read(SLAB_BYTES):
            return


@contextmanager
def unpacked(file: BinaryIO, packing: Packing) -> Iterator[BinaryIO]:
    """The bytes behind a packing; damage in it becomes a `truncated_file`."""
    try:
        if packing == "gzip":
            with gzip.GzipFile(fileobj=file) as stream:
                yield cast(BinaryIO, stream)
        elif packing == "zlib":
            yield cast(BinaryIO, _ZlibFile(file))
        else:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScanError("truncated_file", f"the {packing} stream is damaged or cut off") from error


class _ZlibFile:
    """A zlib stream (RFC 1950), read forward."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._unpacker = zlib.decompressobj()

    def read(self, size: int) -> bytes:
        while True:
            if self._unpacker.eof:
                return b""
            packed = self._unpacker.unconsumed_tail or self._file.read(1 << 20)
            if not packed:
                return self._unpacker.flush()  # at most what one match left behind
            if data := self._unpacker.decompress(packed, size):
                return data


def check_shape(sizes: list[int]) -> Shape:
    """Three sizes that make a volume of bearable size."""
    if len(sizes) != 3 or min(sizes) < 2:
        raise ScanError(
            "not_three_dimensional", f"shape is {sizes}; expected one volume of three dimensions"
        )
    a, b, c = sizes
    if a * b * c > MAX_VOXELS:
        raise ScanError("too_large", f"{a} x {b} x {c} voxels; at most {MAX_VOXELS} are read")
    if max(a, b, c) > MAX_SIDE:
        raise ScanError("too_large", f"{a} x {b} x {c} voxels; at most {MAX_SIDE} along an axis")
    return a, b, c


def _read_slab(file: BinaryIO, dtype: np.dtype[Any], shape: Shape) -> Array:
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    parts = bytearray()
    while len(parts) < num_bytes:
        chunk = file.read(num_bytes - len(parts))
        if not chunk:
            raise ScanError("truncated_file", "the voxels end early")
        parts += chunk
    return np.frombuffer(parts, dtype=dtype).reshape(shape, order="F")
