"""NIfTI-1 and NIfTI-2 files in and out.

The header is parsed and judged before any memory is taken for voxels; voxels are then streamed
slab by slab (the last axis is the slowest in a file), so a file that lies about its size costs
nothing. Only nibabel's NIfTI headers are used, never `nib.load`, which would hand hostile bytes to
a dozen other parsers (reliability.md, S4).

Axes: A B C as stored in the file, I J K after `canonical` (RAS+). Affines map voxels to RAS+ mm.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from imaging.checks import check_affine
from imaging.errors import ScanError
from imaging.limits import MAX_CHANNELS, MAX_SIDE, MAX_VOXELS
from imaging.orientation import canonical
from imaging.stored import MAX_OFFSET_BYTES, drain, read_voxels, skip, unpacked
from imaging.volume import Affine, Array, Grid, Shape, Volume, corner_distance_mm, spacing_of

_HEADERS: dict[int, tuple[type[Any], bytes]] = {
    348: (nib.Nifti1Header, b"n+1\0"),
    540: (nib.Nifti2Header, b"n+2\0"),
}

_QFORM_TOLERANCE_MM = 2e-4
_SAME_PLACE_MM = 0.01
"""Of a volume's corners; a quaternion in float32 is not exacter than this."""


@dataclass(frozen=True, slots=True)
class NiftiHeader:
    """What a NIfTI header says, checked."""

    shape: Shape
    affine: Affine
    affine_from: Literal["sform", "qform"]
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    offset_bytes: int
    notes: tuple[str, ...] = ()
    """What a reader of the volume should know of the header."""


def read(path: Path) -> tuple[Volume, Grid]:
    """Read a NIfTI file, gzipped or not (by content, not by name).

    Voxels are int16 where that holds every value, else float32; bytes stored unscaled stay uint8.

    Args:
        path: A single-file NIfTI-1 or NIfTI-2 with one 3D volume.

    Returns:
        The volume in RAS+ and the grid of the file.

    Raises:
        ScanError: `not_a_scan`, `truncated_file`, `unsupported_format`, `bad_geometry`,
            `not_three_dimensional`, `non_finite_voxels`, `too_large`.
    """
    voxels, header = read_stored(path)
    return canonical(voxels, header.affine), Grid(header.shape, header.affine)


def read_stored(path: Path, *, channel: int | None = None) -> tuple[Array, NiftiHeader]:
    """Read a NIfTI file in its own axis order (A, B, C), with its header; see `read`.

    With `channel`, the file is (A, B, C, channels) and one of them is read.
    """
    with _unpacked(path) as (file, size):
        header = read_header(file, channel=channel)
        _check_size(header, size)
        if file.tell() > header.offset_bytes:
            file.seek(header.offset_bytes)
        skip(file, header.offset_bytes - file.tell())
        voxels = read_voxels(
            file, header.shape, header.dtype, slope=header.slope, intercept=header.intercept
        )
        if size is None:
            drain(file)
        return voxels, header


def open_canonical(path: Path) -> Volume:
    """Open a volume that the intake wrote (RAS+, uncompressed) without reading its voxels.

    Returns:
        The volume; its voxels are a read-only memory map.

    Raises:
        ScanError: `unsupported_format` for a file that the intake would not have written.
    """
    with path.open("rb") as file:
        header = read_header(file)
    is_plain = (header.slope, header.intercept) == (1.0, 0.0)
    if not is_plain or nib.aff2axcodes(header.affine) != ("R", "A", "S"):
        raise ScanError("unsupported_format", "not a canonical volume written by the intake")
    _check_size(header, path.stat().st_size)
    voxels = np.memmap(path, header.dtype, "r", header.offset_bytes, header.shape, order="F")
    return Volume(voxels, header.affine)


def write(path: Path, voxels: Array, affine: Affine, *, description: str = "") -> None:
    """Write a NIfTI-1 file; gzipped when the name ends in `.gz`.

    The affine goes into the sform as float32, and into the qform too where that holds it: a qform
    has no shear, and its float32 quaternion is coarse near half a turn (a sagittal or coronal scan
    of 300 mm would be off by 0.2 mm). The bytes depend on the arguments alone: no time stamp, no
    file name.

    Args:
        path: Where to write.
        voxels: (A, B, C), uint8, int16, uint16, int32 or float32.
        affine: Voxel-to-RAS+ matrix, (4, 4), mm.
        description: At most 79 ASCII characters; never a patient's name or id.
    """
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1.0, 0.0)
    header.set_zooms(spacing_of(affine))
    header.set_qform(affine, code="scanner")
    if not all(_holds(qform, affine, voxels.shape) for qform in _qforms(header)):
        header.set_qform(None, code="unknown")
    header.set_sform(affine, code="scanner")
    header["descrip"] = description.encode("ascii")
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", 4, raw, mtime=0) as packed:
                _write_body(cast(BinaryIO, packed), header, voxels)
        else:
            _write_body(raw, header, voxels)


def _qforms(header: Any) -> Iterator[Affine]:
    """The header's qform as readers take it: near half a turn some round the angle, others not."""
    rounded: Affine = header.get_qform()
    yield rounded
    b, c, d = (float(header[f"quatern_{name}"]) for name in "bcd")
    a = np.sqrt(max(0.0, 1.0 - (b * b + c * c + d * d)))  # nifti1.h, method 2
    strict = rounded.copy()
    rotation = nib.quaternions.quat2mat((a, b, c, d))
    handed = -1.0 if float(header["pixdim"][0]) < 0 else 1.0
    strict[:3, :3] = rotation * header.get_zooms() * (1.0, 1.0, handed)
    yield strict


def _holds(qform: Affine, affine: Affine, shape: tuple[int, ...]) -> bool:
    """Whether a qform places every corner within 0.2 micrometres of the affine's place."""
    apart = np.abs(qform - affine)
    return bool((apart[:3, :3] @ shape + apart[:3, 3]).max() < _QFORM_TOLERANCE_MM)


def _write_body(file: BinaryIO, header: Any, voxels: Array) -> None:
    file.write(header.binaryblock + b"\0\0\0\0")  # no extensions
    for c in range(voxels.shape[2]):
        slab = np.asarray(voxels[:, :, c], dtype=header.get_data_dtype())
        file.write(slab.tobytes(order="F"))


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The file's NIfTI bytes, and how many there are (None when gzipped: only reading tells)."""
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with unpacked(raw, "gzip" if is_gzip else "raw") as file:
            yield file, None if is_gzip else path.stat().st_size


def read_header(file: BinaryIO, *, channel: int | None = None) -> NiftiHeader:
    """Parse and judge the header at the start of a (decompressed) file; see `read_stored`."""
    start = file.read(4)
    size = _header_size(start)
    if size is None:
        raise ScanError("not_a_scan", "no NIfTI header at the start of the file")
    kind, single_magic = _HEADERS[size]
    block = start + file.read(size - 4)
    if len(block) < size:
        raise ScanError("truncated_file", f"the header ends after {len(block)} of {size} bytes")
    try:
        header = kind(block, check=False)
        magic = bytes(header["magic"].tobytes())[:4]
        if magic != single_magic:
            raise ScanError("unsupported_format", "only single-file NIfTI (n+1, n+2) is read")
        shape = _shape_of(header, channel)
        dtype = _dtype_of(header)
        affine, affine_from = _affine_of(header)
        slope, intercept = header.get_slope_inter()
    except (HeaderDataError, WrapStructError, ValueError, OverflowError, KeyError) as error:
        raise ScanError("not_a_scan", "the NIfTI header contradicts itself") from error
    offset = float(header["vox_offset"])
    if not size <= offset <= MAX_OFFSET_BYTES:
        raise ScanError("not_a_scan", f"voxels cannot start at byte {offset:g}")
    return NiftiHeader(
        shape=shape,
        affine=affine,
        affine_from=affine_from,
        dtype=dtype,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        offset_bytes=int(offset) + (channel or 0) * int(np.prod(shape)) * dtype.itemsize,
        notes=_disagreement(header, shape, affine, affine_from),
    )


def _header_size(start: bytes) -> int | None:
    """348 (NIfTI-1) or 540 (NIfTI-2) in either byte order; None for anything else."""
    for order in ("little", "big"):
        size = int.from_bytes(start, order)
        if size in _HEADERS:
            return size
    return None


def is_nifti(start: bytes) -> bool:
    """Whether a file that begins with these (decompressed) bytes looks like NIfTI."""
    size = _header_size(start[:4])
    at = 344 if size == 348 else 4
    return size is not None and start[at : at + 2] in (b"n+", b"ni")


def _shape_of(header: Any, channel: int | None) -> Shape:
    rank = int(header["dim"][0])
    if not 1 <= rank <= 7:
        raise ScanError("not_a_scan", f"the NIfTI header declares {rank} dimensions")
    sizes = [int(size) for size in header["dim"][1 : rank + 1]]
    if min(sizes) < 1:
        raise ScanError("not_a_scan", f"the NIfTI header declares the shape {sizes}")
    if channel is not None:
        num_channels = sizes.pop(3) if len(sizes) == 4 else 0
        if not 0 <= channel < min(num_channels, MAX_CHANNELS):
            raise ScanError(
                "not_three_dimensional",
                f"channel {channel} was asked for; the file has {num_channels} along a fourth axis",
            )
    if len(sizes) < 3 or min(sizes[:3]) < 2 or any(size > 1 for size in sizes[3:]):
        raise ScanError(
            "not_three_dimensional", f"shape is {sizes}; expected one volume of three dimensions"
        )
    a, b, c = sizes[:3]
    if max(a, b, c) > MAX_SIDE:
        raise ScanError("too_large", f"{a} x {b} x {c} voxels; at most {MAX_SIDE} along an axis")
    if a * b * c > MAX_VOXELS:
        raise ScanError("too_large", f"{a} x {b} x {c} voxels; at most {MAX_VOXELS} are read")
    return a, b, c


def _dtype_of(header: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ScanError("unsupported_format", f"voxels of NIfTI data type {header['datatype']}")
    return dtype


def _affine_of(header: Any) -> tuple[Affine, Literal["sform", "qform"]]:
    """The sform where its code is set, else the qform; refuses what is not a box in mm."""
    units = int(header["xyzt_units"]) & 7
    if units not in (0, 2):
        raise ScanError("bad_geometry", f"spatial unit code is {units}; expected 2 (mm)")
    if int(header["sform_code"]) > 0:
        affine, source = np.asarray(header.get_sform(), dtype=np.float64), "sform"
    elif int(header["qform_code"]) > 0:
        try:
            affine, source = np.asarray(header.get_qform(), dtype=np.float64), "qform"
        except (HeaderDataError, ValueError) as error:
            raise ScanError("bad_geometry", "the qform is not a rotation") from error
    else:
        raise ScanError("bad_geometry", "neither sform nor qform is set: no orientation is known")
    check_affine(affine, source)
    return affine, cast(Literal["sform", "qform"], source)


def _disagreement(header: Any, shape: Shape, affine: Affine, used: str) -> tuple[str, ...]:
    """A note where sform and qform are both set and do not say the same."""
    if used != "sform" or int(header["qform_code"]) < 1:
        return ()
    try:
        other = np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return ("the sform was used; the qform is set but is not a rotation",)
    apart = corner_distance_mm(affine, other, shape)
    if apart < _SAME_PLACE_MM:
        return ()
    codes = f"code {int(header['sform_code'])} against {int(header['qform_code'])}"
    return (f"sform and qform differ by {apart:.3g} mm at a corner; the sform was used ({codes})",)


def _check_size(header: NiftiHeader, size: int | None) -> None:
    needed = header.offset_bytes + int(np.prod(header.shape)) * header.dtype.itemsize
    if size is not None and size < needed:
        raise ScanError("truncated_file", f"{size} bytes; the header declares {needed}")
