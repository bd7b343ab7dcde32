"""The pixels of ordered image planes into one array, a file at a time.

Uncompressed pixels are read from their place in the file into one buffer of a slice, and scaled
from there into the volume, which is allocated once, in RAS+; so the peak is one volume and one
file. Compressed ones go through pydicom's decoders.

Axes: C columns, R rows, S slices in order; I J K RAS+.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from imaging.checks import narrowed
from imaging.dicom_header import Header, Native, read_pixels
from imaging.dicom_stack import Plane
from imaging.errors import ScanError
from imaging.limits import MAX_FILE_BYTES, MAX_VOXELS, read_capped
from imaging.orientation import empty_canonical, on_source_grid
from imaging.volume import Array, Grid

Source = Path | Callable[[], BinaryIO]
"""A file, or a function that opens one (the member of an archive)."""

_INT16 = np.iinfo(np.int16)


def read_voxels(files: Sequence[Source], planes: list[Plane], source: Grid) -> Array:
    """Rescaled values of the planes, (I, J, K): int16 where that holds every value, else float32.

    Args:
        files: What was sent; a plane's header names its place.
        planes: In the order of S.
        source: Their grid, (C, R, S).

    Raises:
        ScanError: `too_large`, `truncated_file`, `non_finite_voxels`.
    """
    if int(np.prod(source.shape)) > MAX_VOXELS:
        raise ScanError("too_large", f"{source.shape} voxels; at most {MAX_VOXELS} are read")
    places: dict[int, list[tuple[int, Plane]]] = {}
    for s, plane in enumerate(planes):
        places.setdefault(plane.header.member, []).append((s, plane))

    voxels, on_source = empty_canonical(source, np.int16)
    for member, wanted in places.items():
        frames = stored_frames(files[member], wanted[0][1].header, [p for _, p in wanted])
        for (s, plane), stored in zip(wanted, frames, strict=True):
            slope, intercept = plane.frame.slope, plane.frame.intercept
            if voxels.dtype == np.int16:
                if _put_exactly(stored, slope, intercept, on_source[:, :, s].T):
                    continue
                voxels = voxels.astype(np.float32)
                on_source = on_source_grid(voxels, source)
            on_source[:, :, s] = (stored.astype(np.float64) * slope + intercept).T
    return narrowed(voxels)


def stored_frames(file: Source, header: Header, planes: Sequence[Plane]) -> Iterator[Array]:
    """Stored values (R, C) of some planes of one file; valid until the next one is asked for."""
    indices = [plane.frame.index for plane in planes]
    if header.native is None:
        yield from read_pixels(whole_file(file), header, indices)
        return
    shape = (header.rows, header.columns)
    num_bytes = header.rows * header.columns * header.native.dtype.itemsize
    spare = 8 * header.native.dtype.itemsize - header.native.bits_stored
    _check_size(header, header.native.size_bytes, num_bytes)
    with _at_pixels(file, header.native) as (stream, offset):
        for index in indices:
            stream.seek(offset + index * num_bytes)
            stored = np.empty(shape, dtype=header.native.dtype)
            found = _fill(stream, stored.data.cast("B"))
            _check_size(header, index * num_bytes + found, num_bytes, upto=index + 1)
            if spare:  # above the stored bits: an overlay, or no sign (PS3.5, 8.1.1)
                np.left_shift(stored, spare, out=stored)
                np.right_shift(stored, spare, out=stored)
            yield stored


def whole_file(file: Source) -> bytes:
    """All bytes of a file, under the cap."""
    with file.open("rb") if isinstance(file, Path) else file() as stream:
        return read_capped(stream, MAX_FILE_BYTES)


@contextmanager
def _at_pixels(file: Source, native: Native) -> Iterator[tuple[BinaryIO, int]]:
    """A stream that can seek, and where in it the pixels start."""
    if isinstance(file, Path):
        with file.open("rb", buffering=0) as raw:
            yield raw, native.offset_bytes
    else:
        yield BytesIO(whole_file(file)), native.offset_bytes


def _fill(stream: BinaryIO, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends; how many bytes came."""
    found = 0
    while found < len(buffer):
        num_read = stream.readinto(buffer[found:])  # type: ignore[attr-defined]
        if not num_read:
            break
        found += num_read
    return found


def _check_size(header: Header, found: int, frame_bytes: int, *, upto: int = 0) -> None:
    declared = frame_bytes * (upto or len(header.frames))
    if found < declared:
        raise ScanError(
            "truncated_file",
            f"the pixel data are {found} bytes; the header declares {declared}",
            {"members": [header.member], "sop_uids": [header.sop_uid]},
        )


def _put_exactly(stored: Array, slope: float, intercept: float, slot: Array) -> bool:
    """Rescale into an int16 slice (R, C); False, and nothing put, where int16 is not exact."""
    if not (slope.is_integer() and intercept.is_integer()):
        return False
    ends = [int(stored.min()) * int(slope), int(stored.max()) * int(slope)]
    if min(ends) + intercept < _INT16.min or max(ends) + intercept > _INT16.max:
        return False
    if slope == 1 and stored.dtype.itemsize == 2 and -(1 << 15) <= intercept < 1 << 15:
        # Arithmetic modulo 2^16, exact since the result fits.
        np.add(stored.view(f"{stored.dtype.byteorder}i2"), np.int16(intercept), out=slot)
        return True
    slot[...] = stored.astype(np.int64) * int(slope) + int(intercept)
    return True
