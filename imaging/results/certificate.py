"""What was proven about a file that leaves, and the comparison that proves it.

A file is read back by code that shares nothing with its writer; what comes out is held against the
source: same grid, same labels, same place. A file that differs gets no certificate and must not be
handed out.

Axes: A B C of the mask as in the source files; C columns, R rows of a plane. Affines map to RAS+.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imaging import geometry
from imaging.geometry import MAX_CORNER_ERROR_MM, GeometryError
from imaging.volume import Affine, Array, Grid, Shape

BYTE_READER = "imaging.geometry (NIfTI-1 header by its bytes)"

Mapped = Literal["identity", "nearest"]
"""How voxels came onto the source's slices: as they are, or the nearest one (a resampled scan)."""

Labels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was proven about one file."""

    format: str
    readers: tuple[str, ...]
    """Who read it back, with versions; none of them wrote it."""
    shape: Shape
    """Of the source's grid."""
    affine: tuple[tuple[float, ...], ...]
    """Of the source's grid: voxel to RAS+ mm, (4, 4)."""
    mapping: Mapped
    max_corner_error_mm: float
    voxels: dict[str, int]
    """Found in the file for each label."""
    sha256: str
    """Of the file."""

    @property
    def num_labelled(self) -> int:
        """Voxels that are not background."""
        return sum(self.voxels.values())


@dataclass(frozen=True, slots=True)
class Reading:
    """A mask file as an independent reader found it."""

    reader: str
    """Name and version."""
    grid: Grid
    labels: Array
    """(A, B, C) in the file's own axes."""


@dataclass(frozen=True, slots=True)
class PlaneReading:
    """One image plane of a result as an independent reader found it."""

    affine: Affine
    """Pixel (column, row) to RAS+ mm, (4, 4); the third column is the normal."""
    labels: Labels
    """(R, C)."""


Reader = Callable[[Path], Reading]


def certify_nifti(
    path: Path, source: Grid, mask: Labels, names: Mapping[str, int], readers: Sequence[Reader]
) -> Certificate:
    """Read a NIfTI mask back, by its bytes and by every other reader, and compare.

    Args:
        path: The written file.
        source: The grid that it must lie on.
        mask: What must be in it, (A, B, C).
        names: Value of each label.
        readers: Independent readers beside the one of `imaging.geometry`.

    Raises:
        GeometryError: It is not so; the message says which reader found what.
    """
    proven = geometry.certify(path, source, mask)
    error, found = proven.max_corner_error_mm, [BYTE_READER]
    for read in readers:
        reading = read(path)
        try:
            error = max(error, compare(reading, source, mask, names))
        except GeometryError as failure:
            raise GeometryError(f"{reading.reader}: {failure}") from None
        found.append(reading.reader)
    voxels = counts(mask, names)
    return certificate("nifti", path, source, readers=found, error_mm=error, voxels=voxels)


def compare(reading: Reading, source: Grid, mask: Labels, names: Mapping[str, int]) -> float:
    """Hold a reading against the source grid and the computed mask; the corner error, mm.

    Raises:
        GeometryError: Shape, corners, the count of a label, or single voxels differ.
    """
    if reading.grid.shape != source.shape or mask.shape != source.shape:
        raise GeometryError(
            f"mask is {reading.grid.shape}, labels are {mask.shape}, the source is {source.shape}"
        )
    error = corner_error_mm(reading.grid.affine, source.affine, source.shape)
    _require_small(error, "the mask")
    for name, value in names.items():
        expected, is_there = _count(mask, value), _count(reading.labels, value)
        if expected != is_there:
            raise GeometryError(
                f"label {name!r} has {is_there} voxels in the file, {expected} were computed"
            )
    differing = sum(
        int(np.count_nonzero(reading.labels[:, :, c] != mask[:, :, c]))
        for c in range(mask.shape[2])
    )
    if differing:
        raise GeometryError(f"{differing} voxels of the mask differ from the computed labels")
    return error


def compare_planes(
    planes: Iterable[PlaneReading],
    *,
    source_planes: Sequence[Affine],
    plane_shape: tuple[int, int],
    source: Grid,
    mask: Labels,
    names: Mapping[str, int],
    mapping: Mapped,
) -> tuple[float, dict[str, int]]:
    """Hold planes that were read back against the source's slices and against the mask in space.

    Every pixel of a plane must have the label of the mask's voxel that lies nearest to it, as the
    reader's own geometry places it. Where voxels lie on slices (`identity`), no label may have more
    or fewer voxels than the mask.

    Args:
        planes: What was read; a source slice without labels need not be among them.
        source_planes: Affines of the source's slices, pixel (column, row) to RAS+ mm.
        plane_shape: Rows and columns of a slice.
        source: The mask's grid.
        mask: The computed labels, (A, B, C).
        names: Value of each label.
        mapping: How the writer was to bring voxels onto slices.

    Returns:
        The largest corner error, mm, and the voxels of each label.

    Raises:
        GeometryError: A plane, a label or a pixel is not where it belongs.
    """
    rows, columns = plane_shape
    extent = (columns, rows, 1)
    places = np.array([_corners(affine, extent) for affine in source_planes])  # (S, 8, 3)
    found = dict.fromkeys(names, 0)
    worst, seen = 0.0, set()
    for plane in planes:
        if plane.labels.shape != plane_shape:
            raise GeometryError(f"a plane is {plane.labels.shape}, the source's is {plane_shape}")
        apart = np.linalg.norm(places - _corners(plane.affine, extent), axis=2).max(axis=1)  # (S,)
        nearest = int(apart.argmin())
        _require_small(float(apart[nearest]), "a plane of the result")
        if nearest in seen:
            raise GeometryError("two planes of the result lie on one slice of the source")
        seen.add(nearest)
        worst = max(worst, float(apart[nearest]))
        differing = int(
            np.count_nonzero(plane.labels != sampled(mask, source, plane.affine, extent))
        )
        if differing:
            raise GeometryError(
                f"{differing} pixels of a plane differ from the mask at their place"
            )
        for name, value in names.items():
            found[name] += _count(plane.labels, value)
    _require_all_labels(
        found,
        source_planes=source_planes,
        seen=seen,
        extent=extent,
        source=source,
        mask=mask,
        names=names,
        mapping=mapping,
    )
    return worst, found


def _require_all_labels(
    found: Mapping[str, int],
    *,
    source_planes: Sequence[Affine],
    seen: set[int],
    extent: Shape,
    source: Grid,
    mask: Labels,
    names: Mapping[str, int],
    mapping: Mapped,
) -> None:
    """No label is lost: neither with a slice that was left out, nor off the slices."""
    for place, affine in enumerate(source_planes):
        if place not in seen and sampled(mask, source, affine, extent).any():
            raise GeometryError("a slice of the source with labels on it is missing in the result")
    if mapping == "identity":
        for name, value in names.items():
            expected = _count(mask, value)
            if found[name] != expected:
                raise GeometryError(
                    f"label {name!r} has {found[name]} voxels in the file, {expected} were computed"
                )


def sampled(mask: Labels, source: Grid, plane: Affine, extent: Shape) -> Labels:
    """The mask's nearest voxel at every pixel of a plane; background outside the mask.

    Args:
        mask: (A, B, C).
        source: Its grid.
        plane: Pixel (column, row) to RAS+ mm.
        extent: Columns, rows, 1.

    Returns:
        (R, C).
    """
    columns, rows, _ = extent
    step = np.linalg.inv(source.affine) @ plane  # pixel (column, row) to voxel
    column, row = np.arange(columns), np.arange(rows)[:, None]
    at = [
        np.rint(step[a, 0] * column + step[a, 1] * row + step[a, 3]).astype(int) for a in range(3)
    ]
    size = mask.shape
    inside = np.logical_and.reduce([(at[a] >= 0) & (at[a] < size[a]) for a in range(3)])
    clipped = tuple(np.clip(at[a], 0, size[a] - 1) for a in range(3))
    return np.where(inside, mask[clipped], 0).astype(np.uint8)


def certificate(
    form: str,
    path: Path,
    source: Grid,
    *,
    readers: Sequence[str],
    error_mm: float,
    voxels: dict[str, int],
    mapping: Mapped = "identity",
) -> Certificate:
    """Put together what was proven about the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = tuple(tuple(float(value) for value in row) for row in source.affine)
    return Certificate(form, tuple(readers), source.shape, rows, mapping, error_mm, voxels, digest)


def counts(mask: Labels, names: Mapping[str, int]) -> dict[str, int]:
    """Voxels of each label."""
    return {name: _count(mask, value) for name, value in names.items()}


def corner_error_mm(one: Affine, other: Affine, shape: Shape) -> float:
    """Largest distance between the eight corners of two grids of one shape, mm."""
    return float(np.linalg.norm(_corners(one, shape) - _corners(other, shape), axis=1).max())


def _corners(affine: Affine, shape: Shape) -> NDArray[np.float64]:
    ends = [(0, size - 1) for size in shape]
    corners = np.array([[*corner, 1] for corner in product(*ends)], dtype=np.float64)  # (8, 4)
    placed: NDArray[np.float64] = (corners @ affine.T)[:, :3]
    return placed


def _require_small(error_mm: float, what: str) -> None:
    if not error_mm < MAX_CORNER_ERROR_MM:
        raise GeometryError(f"a corner of {what} is {error_mm:.4f} mm from the source's")


def _count(labels: Array, value: int) -> int:
    return int(np.count_nonzero(labels == value))
