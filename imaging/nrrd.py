"""NRRD headers (teem's format definition, versions 1 to 5), attached or detached (`.nhdr`).

Only what says where its voxels lie is read: a `space` that is a patient's, `space directions` and
a `space origin`. Positions become RAS+ mm.

Axes: A B C as stored, A fastest.
"""

from __future__ import annotations

import re

import numpy as np

from imaging.checks import check_affine
from imaging.errors import ScanError
from imaging.stored import MAX_HEADER_BYTES, MAX_OFFSET_BYTES, Packing, StoredHeader, check_shape
from imaging.volume import Affine

_MAGIC = re.compile(rb"NRRD000[1-5]\r?\n")
_TO_RAS = {
    "right-anterior-superior": (1.0, 1.0, 1.0),
    "ras": (1.0, 1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0),
    "las": (-1.0, 1.0, 1.0),
    "left-posterior-superior": (-1.0, -1.0, 1.0),
    "lps": (-1.0, -1.0, 1.0),
}
_PACKINGS: dict[str, Packing] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {name: code for code, names in _TYPES.items() for name in names}
_VECTOR = re.compile(r"none|\(([^()]*)\)")


def is_nrrd(start: bytes) -> bool:
    """Whether a file that begins with these bytes looks like NRRD."""
    return _MAGIC.match(start) is not None


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
        raise ScanError("not_a_scan", "the NRRD header contradicts itself") from error


def _fields(start: bytes) -> tuple[dict[str, str], int | None]:
    """The header's fields by name, and where the voxels start; None where no blank line ends it."""
    if not is_nrrd(start):
        raise ScanError("not_a_scan", "no NRRD header at the start of the file")
    blank = re.search(rb"\r?\n\r?\n", start)
    if blank is None and len(start) >= MAX_HEADER_BYTES:
        raise ScanError("not_a_scan", "the NRRD header does not end")
    text = start[: blank.start() if blank else len(start)].decode("utf-8", errors="replace")
    fields = {}
    for line in text.splitlines()[1:]:
        name, separator, value = line.partition(": ")
        if not line.startswith("#") and separator:  # "key:=value" is for people
            fields[name.strip().lower()] = value.strip()
    return fields, blank.end() if blank else None


def _judge(fields: dict[str, str], end: int | None) -> StoredHeader:
    is_detached = "data file" in fields or "datafile" in fields
    if end is None and not is_detached:
        raise ScanError("truncated_file", "the NRRD header ends early")
    sizes = [int(size) for size in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]) or len(sizes) > 16:
        raise ScanError("not_a_scan", "the NRRD header's sizes do not match its dimension")
    directions = _directions(fields)
    if len(directions) != len(sizes):
        raise ScanError("bad_geometry", "not one direction for each axis")
    spatial = [axis for axis, direction in enumerate(directions) if direction is not None]
    others = [size for axis, size in enumerate(sizes) if axis not in spatial]
    if any(size != 1 for size in others):
        raise ScanError(
            "not_three_dimensional", f"shape is {sizes}; expected one volume of three dimensions"
        )
    shape = check_shape([sizes[axis] for axis in spatial])
    dtype, packing = _dtype(fields), _packing(fields)
    skipped = int(fields.get("byte skip", fields.get("byteskip", "0")))
    if int(fields.get("line skip", fields.get("lineskip", "0"))) != 0:
        raise ScanError("unsupported_format", "lines to skip before the voxels")
    if not -1 <= skipped <= MAX_OFFSET_BYTES or (skipped and packing != "raw"):
        raise ScanError("unsupported_format", "bytes to skip before packed voxels")
    if skipped == -1 and is_detached:
        raise ScanError("unsupported_format", "voxels counted from the end of a separate file")
    offset = None if skipped == -1 else (0 if is_detached else int(end or 0)) + skipped
    affine = _affine([d for d in directions if d is not None], fields)
    return StoredHeader(shape, affine, dtype, packing, offset, is_detached)


def _directions(fields: dict[str, str]) -> list[tuple[float, ...] | None]:
    """A vector for each axis that lies in space, None for others."""
    if "space directions" not in fields:
        raise ScanError("bad_geometry", "no space directions: no orientation is known")
    found: list[tuple[float, ...] | None] = []
    for match in _VECTOR.finditer(fields["space directions"]):
        inside = match.group(1)
        found.append(None if inside is None else tuple(float(x) for x in inside.split(",")))
    return found


def _affine(directions: list[tuple[float, ...]], fields: dict[str, str]) -> Affine:
    space = fields.get("space", "").lower()
    if space not in _TO_RAS:
        raise ScanError("bad_geometry", "the space is not right- or left-..., so not a patient's")
    units = fields.get("space units", "")
    if units and set(re.findall(r'"([^"]*)"', units)) - {"mm", ""}:
        raise ScanError("bad_geometry", "space units are not mm")
    origin = _VECTOR.fullmatch(fields.get("space origin", ""))
    if origin is None or origin.group(1) is None:
        raise ScanError("bad_geometry", "no space origin: no position is known")
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions, dtype=np.float64).T
    affine[:3, 3] = [float(x) for x in origin.group(1).split(",")]
    affine = np.diag([*_TO_RAS[space], 1.0]) @ affine
    check_affine(affine, "NRRD space")
    return affine


def _dtype(fields: dict[str, str]) -> np.dtype[np.generic]:
    code = _DTYPES.get(fields["type"].lower())
    if code is None:
        raise ScanError("unsupported_format", "voxels of an NRRD type that is not read here")
    if code[1:] == "1":
        return np.dtype(code)
    return np.dtype({"little": "<", "big": ">"}[fields["endian"].lower()] + code)


def _packing(fields: dict[str, str]) -> Packing:
    packing = _PACKINGS.get(fields["encoding"].lower())
    if packing is None:
        raise ScanError("unsupported_format", "an NRRD encoding other than raw and gzip")
    return packing
