"""MetaImage headers (`.mha`, and `.mhd` with its voxels in another file), as ITK writes them.

Positions in the file are LPS mm, `TransformMatrix` holds the direction of each axis in turn; they
become RAS+.

Axes: A B C as stored, A fastest.
"""

from __future__ import annotations

import re

import numpy as np

from imaging.checks import check_affine
from imaging.errors import ScanError
from imaging.stored import MAX_HEADER_BYTES, MAX_OFFSET_BYTES, StoredHeader, check_shape
from imaging.volume import Affine

_START = re.compile(rb"\s*(Comment|ObjectType|NDims|ID|Name)\s*=[^\0]*?NDims\s*=")
_DTYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
    "MET_UINT": "u4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def is_metaimage(start: bytes) -> bool:
    """Whether a file that begins with these bytes looks like MetaImage."""
    return _START.match(start) is not None


def read_header(start: bytes) -> StoredHeader:
    """Parse and judge the header at the start of a file.

    Args:
        start: The first `MAX_HEADER_BYTES` of the file, or all of it.

    Raises:
        ScanError: `not_a_scan`, `truncated_file`, `unsupported_format`, `bad_geometry`,
            `not_three_dimensional`, `too_large`.
    """
    fields, end = _fields(start)
    try:
        return _judge(fields, end)
    except (ValueError, OverflowError, KeyError) as error:
        raise ScanError("not_a_scan", "the MetaImage header contradicts itself") from error


def _fields(start: bytes) -> tuple[dict[str, str], int]:
    """The header's fields, and where it ends: after `ElementDataFile`, which is the last one."""
    last = re.search(rb"(?:^|\n)[ \t]*ElementDataFile[ \t]*=[^\n]*(\n|\Z)", start)
    if last is None:
        if len(start) >= MAX_HEADER_BYTES:
            raise ScanError("not_a_scan", "the MetaImage header does not end")
        raise ScanError("truncated_file", "the MetaImage header ends early")
    fields = {}
    for line in start[: last.end()].decode("utf-8", errors="replace").splitlines():
        name, separator, value = line.partition("=")
        if separator:
            fields[name.strip()] = value.strip()
    return fields, last.end()


def _judge(fields: dict[str, str], end: int) -> StoredHeader:
    sizes = [int(size) for size in fields["DimSize"].split()]
    if len(sizes) != int(fields["NDims"]) or not 1 <= len(sizes) <= 10:
        raise ScanError("not_a_scan", "the MetaImage header's DimSize does not match its NDims")
    if any(size != 1 for size in sizes[3:]):
        raise ScanError(
            "not_three_dimensional", f"shape is {sizes}; expected one volume of three dimensions"
        )
    shape = check_shape(sizes[:3])
    if not _is_true(fields, "BinaryData", default=True):
        raise ScanError("unsupported_format", "voxels in text")
    if int(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise ScanError("unsupported_format", "more than one value a voxel")
    place = fields["ElementDataFile"]
    if place.upper().startswith("LIST") or "%" in place:
        raise ScanError("unsupported_format", "voxels spread over several files")
    is_detached = place.upper() != "LOCAL"
    skipped = int(fields.get("HeaderSize", "0")) if is_detached else 0
    if not -1 <= skipped <= MAX_OFFSET_BYTES:
        raise ScanError("not_a_scan", f"voxels cannot start at byte {skipped}")
    is_packed = _is_true(fields, "CompressedData")
    if skipped == -1:
        raise ScanError("unsupported_format", "voxels counted from the end of a separate file")
    return StoredHeader(
        shape=shape,
        affine=_affine(fields, len(sizes)),
        dtype=_dtype(fields),
        packing="zlib" if is_packed else "raw",
        offset_bytes=skipped if is_detached else end,
        is_detached=is_detached,
    )


def _affine(fields: dict[str, str], num_axes: int) -> Affine:
    spacing = _numbers(fields, ("ElementSpacing",))
    matrix = _numbers(fields, ("TransformMatrix", "Rotation", "Orientation"))
    origin = _numbers(fields, ("Offset", "Position", "Origin"))
    if not (len(spacing) == len(origin) == num_axes and len(matrix) == num_axes**2):
        raise ScanError(
            "bad_geometry", "no ElementSpacing, TransformMatrix and Offset: no place is known"
        )
    axes = np.reshape(matrix, (num_axes, num_axes))[:3, :3]  # a row is the direction of an axis
    affine = np.eye(4)
    affine[:3, :3] = axes.T * spacing[:3]
    affine[:3, 3] = origin[:3]
    affine = _LPS_TO_RAS @ affine
    check_affine(affine, "MetaImage geometry")
    return affine


def _numbers(fields: dict[str, str], names: tuple[str, ...]) -> list[float]:
    text = next((fields[name] for name in names if name in fields), "")
    return [float(number) for number in text.split()]


def _dtype(fields: dict[str, str]) -> np.dtype[np.generic]:
    code = _DTYPES.get(fields["ElementType"])
    if code is None:
        raise ScanError("unsupported_format", "voxels of a MetaImage type that is not read here")
    is_big = _is_true(fields, "BinaryDataByteOrderMSB") or _is_true(fields, "ElementByteOrderMSB")
    return np.dtype((">" if is_big else "<") + code)


def _is_true(fields: dict[str, str], name: str, *, default: bool = False) -> bool:
    value = fields.get(name)
    return default if value is None else value.lower() in ("true", "t", "1")
