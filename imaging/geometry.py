"""The certificate that a mask lies on its source grid.

The mask file is read back by code that shares nothing with the writer: the NIfTI-1 header is
parsed here from its bytes. A mask that cannot be certified must not be handed out.

Axes: A B C as in the source files; corners are voxel centres in RAS+ mm.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imaging.volume import Affine, Array, Grid, Shape

MAX_CORNER_ERROR_MM = 1e-3

_UINT8 = 2
_MM = 2


class GeometryError(Exception):
    """A mask that is not where its source is, or not what was computed."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was proven about a mask file."""

    shape: Shape
    max_corner_error_mm: float
    num_labelled: int
    """Voxels that are not background."""


@dataclass(frozen=True, slots=True)
class _Parsed:
    shape: Shape
    sform: Affine
    qform: Affine | None
    voxels: NDArray[np.uint8]


def certify(mask_path: Path, source: Grid, labels: Array) -> Certificate:
    """Read a mask back and compare its shape, the place of its corners and every voxel.

    Args:
        mask_path: A written mask, NIfTI-1, gzipped or not.
        source: The grid that it must lie on.
        labels: What must be in it, (A, B, C), on the source's axes.

    Raises:
        GeometryError: It is not so; the message says what differs and by how much.
    """
    parsed = _parse(mask_path)
    if parsed.shape != source.shape or labels.shape != source.shape:
        raise GeometryError(
            f"mask is {parsed.shape}, labels are {labels.shape}, the source is {source.shape}"
        )
    error = _corner_error(parsed.sform, source)
    if parsed.qform is not None:
        error = max(error, _corner_error(parsed.qform, source))
    if not error < MAX_CORNER_ERROR_MM:
        raise GeometryError(f"a corner of the mask is {error:.4f} mm from the source's")
    differing = sum(
        int(np.count_nonzero(parsed.voxels[:, :, c] != labels[:, :, c]))
        for c in range(labels.shape[2])
    )
    if differing:
        raise GeometryError(f"{differing} voxels of the mask differ from the computed labels")
    return Certificate(parsed.shape, error, int(np.count_nonzero(parsed.voxels)))


def _corner_error(affine: Affine, source: Grid) -> float:
    """Largest distance between the eight corners of two grids of the source's shape, mm."""
    ends = [(0, size - 1) for size in source.shape]
    corners = np.array([[*corner, 1] for corner in product(*ends)], dtype=np.float64)  # (8, 4)
    apart = corners @ (affine - source.affine).T
    return float(np.linalg.norm(apart[:, :3], axis=1).max())


def _parse(path: Path) -> _Parsed:
    """Header fields at the offsets of the NIfTI-1 standard (nifti1.h), little endian."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, OSError) as error:
            raise GeometryError("the mask's gzip stream is damaged") from error
    if len(data) < 352 or data[:4] != struct.pack("<i", 348) or data[344:348] != b"n+1\0":
        raise GeometryError("the mask is not a NIfTI-1 file")
    dim = struct.unpack_from("<8h", data, 40)
    datatype, bits = struct.unpack_from("<2h", data, 70)
    pixdim = struct.unpack_from("<8f", data, 76)
    offset, slope, intercept = struct.unpack_from("<3f", data, 108)
    units = data[123]
    qform_code, sform_code = struct.unpack_from("<2h", data, 252)
    if dim[0] != 3 or min(dim[1:4]) < 1 or (datatype, bits) != (_UINT8, 8):
        raise GeometryError(f"the mask is not three-dimensional uint8 (dim {dim[: dim[0] + 1]})")
    if slope not in (0.0, 1.0) or intercept != 0.0 or units & 7 != _MM or sform_code < 1:
        raise GeometryError("the mask is scaled, not in mm, or without an sform")
    shape: Shape = (dim[1], dim[2], dim[3])
    num_voxels = shape[0] * shape[1] * shape[2]
    if len(data) != int(offset) + num_voxels:
        raise GeometryError(f"the mask holds {len(data) - int(offset)} voxels, not {num_voxels}")
    voxels = np.frombuffer(data, np.uint8, num_voxels, int(offset)).reshape(shape, order="F")
    rows = struct.unpack_from("<12f", data, 280)
    sform = np.vstack([np.reshape(rows, (3, 4)), [0, 0, 0, 1]]).astype(np.float64)
    quaternion = struct.unpack_from("<6f", data, 256)
    qform = _qform(quaternion, pixdim) if qform_code > 0 else None
    return _Parsed(shape, sform, qform, voxels)


def _qform(fields: tuple[float, ...], pixdim: tuple[float, ...]) -> Affine:
    """The matrix of a quaternion b, c, d with offsets (nifti1.h, method 2)."""
    b, c, d, x, y, z = fields
    a = np.sqrt(max(0.0, 1.0 - (b * b + c * c + d * d)))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    handedness = -1.0 if pixdim[0] < 0 else 1.0
    affine = np.eye(4)
    affine[:3, :3] = rotation * [pixdim[1], pixdim[2], pixdim[3] * handedness]
    affine[:3, 3] = (x, y, z)
    return affine
