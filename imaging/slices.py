"""Parallel slices that fill no box by themselves (gantry tilt, uneven gaps), and the way to one.

An uncorrected tilt moves every slice in its own plane; uneven gaps leave some layers thicker than
others. Stacking such slices as they come would shear or stretch the patient. Here they are put on
a regular grid by the place of every pixel alone, and labels found on that grid go back to the
pixels of the slices that were sent.

Axes: C columns, R rows, S slices as sent; A B K the regular grid, A along columns, B along rows, K
along the normal. Positions are RAS+ mm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import ScanError
from imaging.limits import MAX_VOXELS
from imaging.volume import Affine, Array, Grid, Shape

Vector = NDArray[np.float64]

_EXACT = 1e-6
"""Pixels; a place this close to a pixel's or a slice's centre is taken to be there."""


@dataclass(frozen=True, slots=True)
class Slices:
    """Where the pixels of parallel slices lie, slices in the order of their depth."""

    shape: Shape
    """Columns, rows, slices."""
    column_step_mm: Vector
    """From a pixel to the next column, (3,)."""
    row_step_mm: Vector
    """From a pixel to the next row, (3,)."""
    positions_mm: NDArray[np.float64]
    """Centre of the first pixel of each slice, (S, 3)."""

    def affine_of(self, s: int) -> Affine:
        """From (column, row, 0) of one slice to RAS+ mm, (4, 4)."""
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1] = self.column_step_mm, self.row_step_mm
        affine[:3, 2] = _unit(np.cross(self.column_step_mm, self.row_step_mm))
        affine[:3, 3] = self.positions_mm[s]
        return affine

    def coordinates(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """First pixels as columns and rows from the first slice's, (S, 2), and depths, (S,) mm."""
        steps = np.linalg.inv(self.affine_of(0))
        found = (self.positions_mm - self.positions_mm[0]) @ steps[:3, :3].T
        return found[:, :2], found[:, 2]

    def as_json(self) -> dict[str, Any]:
        """For the volume's record; `slices_of` reads it again."""
        return {
            "shape": list(self.shape),
            "column_step_mm": self.column_step_mm.tolist(),
            "row_step_mm": self.row_step_mm.tolist(),
            "positions_mm": self.positions_mm.tolist(),
        }


def slices_of(record: Mapping[str, Any]) -> Slices:
    """The slices that `Slices.as_json` wrote down."""
    columns, rows, num_slices = (int(size) for size in record["shape"])
    return Slices(
        (columns, rows, num_slices),
        np.asarray(record["column_step_mm"], dtype=np.float64),
        np.asarray(record["row_step_mm"], dtype=np.float64),
        np.asarray(record["positions_mm"], dtype=np.float64),
    )


def regular_grid(slices: Slices) -> Grid:
    """The box that holds every pixel, with the slices' pixel size and direction.

    Its layers are as far apart as the two closest slices, yet no closer than half the usual gap,
    and a little less where that is what lets the first and the last layer lie on the first and the
    last slice; slices at even gaps keep their places, one layer each.

    Raises:
        ScanError: `too_large`.
    """
    in_plane, depth = slices.coordinates()
    low, high = np.floor(in_plane.min(axis=0) + _EXACT), np.ceil(in_plane.max(axis=0) - _EXACT)
    extent = float(depth[-1] - depth[0])
    gaps = np.diff(depth)
    num_steps = int(np.ceil(extent / max(float(gaps.min()), float(np.median(gaps)) / 2) - 1e-2))
    columns, rows = (
        int(size + end - start) for size, start, end in zip(slices.shape, low, high, strict=False)
    )
    shape: Shape = (columns, rows, num_steps + 1)
    if int(np.prod(shape)) > MAX_VOXELS:
        raise ScanError("too_large", f"{shape} voxels on a regular grid; at most {MAX_VOXELS}")
    affine = slices.affine_of(0)
    affine[:3, 3] = affine[:3] @ [*low, 0.0, 1.0]
    affine[:3, 2] *= extent / num_steps
    return Grid(shape, affine)


def to_grid(voxels: Array, slices: Slices, grid: Grid, *, out: Array | None = None) -> Array:
    """Image values on the regular grid, interpolated linearly between pixels and slices.

    A layer between two slices takes from both what lies straight above and below, along the
    normal, so nothing is sheared or stretched. Places that no slice covers get the lowest value of
    the scan. Whole numbers are rounded.

    Args:
        voxels: (C, R, S) on the slices.
        slices: Where they lie.
        grid: Of `regular_grid`.
        out: Where to put the result, (A, B, K), of the voxels' type; made if absent.

    Returns:
        (A, B, K), of the type of `voxels`.
    """
    in_plane, depth = slices.coordinates()
    first, layers = _place_of(grid, slices)
    result: Array = np.empty(grid.shape, dtype=voxels.dtype) if out is None else out
    lowest = voxels.min()
    for k, level in enumerate(layers):
        total = np.zeros(grid.shape[:2])
        covered = np.zeros(grid.shape[:2])
        for s, weight in _neighbours(depth, float(level)):
            values, is_inside = _moved(voxels[:, :, s], first - in_plane[s], grid.shape)
            total += np.where(is_inside, weight * values, 0.0)
            covered += weight * is_inside
        layer = np.where(covered > 0, total / np.maximum(covered, _EXACT), lowest)
        result[:, :, k] = np.rint(layer) if result.dtype.kind in "iu" else layer
    return result


def to_slices(labels: Array, grid: Grid, slices: Slices) -> Array:
    """Labels found on the regular grid, at the pixels that were sent: the nearest voxel of each.

    Args:
        labels: (A, B, K) on `grid`.
        grid: Of `regular_grid`.
        slices: Where they are wanted.

    Returns:
        (C, R, S), of the type of `labels`.

    Raises:
        ValueError: The labels do not have the grid's shape.
    """
    if labels.shape != grid.shape:
        raise ValueError(f"labels are {labels.shape}, their grid {grid.shape}")
    in_plane, depth = slices.coordinates()
    first, layers = _place_of(grid, slices)
    result = np.empty(slices.shape, dtype=labels.dtype)
    for s in range(slices.shape[2]):
        k = int(np.abs(layers - depth[s]).argmin())
        a, b = (
            np.clip(np.rint(np.arange(size) + at - start), 0, end - 1).astype(np.intp)
            for size, at, start, end in zip(
                slices.shape, in_plane[s], first, grid.shape, strict=False
            )
        )
        result[:, :, s] = labels[np.ix_(a, b, [k])][:, :, 0]
    return result


def _place_of(grid: Grid, slices: Slices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The grid's first voxel as columns and rows from slice 0, (2,), and its depths, (K,) mm."""
    steps = np.linalg.inv(slices.affine_of(0)) @ grid.affine
    return steps[:2, 3], steps[2, 3] + steps[2, 2] * np.arange(grid.shape[2])


def _neighbours(depth: NDArray[np.float64], level: float) -> list[tuple[int, float]]:
    """The slices beside a depth with their weights; one where it lies on a slice."""
    above = int(np.clip(np.searchsorted(depth, level), 1, len(depth) - 1))
    share = float((level - depth[above - 1]) / (depth[above] - depth[above - 1]))
    weights = [(above - 1, 1.0 - share), (above, share)]
    return [(s, weight) for s, weight in weights if weight > _EXACT]


def _moved(
    plane: Array, start: NDArray[np.float64], shape: Shape
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A slice (C, R) read from the pixel coordinates `start` on, (A, B), and where it has pixels.

    Within half a pixel beyond its border the border's value continues.
    """
    values = plane.astype(np.float64)
    inside = []
    for axis in (0, 1):
        place = np.round(np.arange(shape[axis]) + start[axis], 6)
        size = plane.shape[axis]
        low = np.clip(np.floor(place), 0, size - 1).astype(np.intp)
        high = np.clip(np.floor(place) + 1, 0, size - 1).astype(np.intp)
        share = (place - np.floor(place)).reshape((-1, 1) if axis == 0 else (1, -1))
        if share.any():
            values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
        else:
            values = values.take(low, axis)
        inside.append((place > -0.5) & (place < size - 0.5))
    return values, np.logical_and.outer(inside[0], inside[1])


def _unit(vector: Vector) -> Vector:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float64)
