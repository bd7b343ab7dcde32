"""Boxes of voxels on a grid: around a mask, grown, carried to another grid, cut out.

A box is half-open: `first` is in it, `stop` is not. Axes: I J K voxels in RAS+; spacing in mm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.volume import Grid, Shape, spacing_of


@dataclass(frozen=True, slots=True)
class Box:
    """Voxels `first` to `stop` of a grid, along I, J, K."""

    first: Shape
    stop: Shape

    @property
    def shape(self) -> Shape:
        """Voxels along I, J, K."""
        i, j, k = (stop - first for first, stop in zip(self.first, self.stop, strict=True))
        return i, j, k

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """For an array on the grid."""
        i, j, k = (slice(*ends) for ends in zip(self.first, self.stop, strict=True))
        return i, j, k


def whole(shape: Shape) -> Box:
    """All of a grid."""
    return Box((0, 0, 0), shape)


def around(mask: NDArray[np.bool_]) -> Box | None:
    """The least box around what is true, None where nothing is."""
    in_plane = np.asarray(mask.any(axis=2))  # (I, J)
    across = np.asarray(mask.any(axis=0))  # (J, K)
    if not in_plane.any():
        return None
    sides = (in_plane.any(axis=1), in_plane.any(axis=0), across.any(axis=0))
    (i, i_end), (j, j_end), (k, k_end) = (np.flatnonzero(side)[[0, -1]] for side in sides)
    return Box((int(i), int(j), int(k)), (int(i_end) + 1, int(j_end) + 1, int(k_end) + 1))


def widened(box: Box, margin: Shape, shape: Shape) -> Box:
    """The box with so many voxels more on each side, as far as the grid goes."""
    ends = [
        (max(first - more, 0), min(stop + more, size))
        for first, stop, more, size in zip(box.first, box.stop, margin, shape, strict=True)
    ]
    return _of(ends)


def at_least(box: Box, size: Shape, shape: Shape) -> Box:
    """The box, where it is smaller than `size` grown to it on both sides, within the grid."""
    ends = []
    for first, stop, wanted, limit in zip(box.first, box.stop, size, shape, strict=True):
        extent = max(stop - first, min(wanted, limit))
        low = min(max(first - (extent - (stop - first)) // 2, 0), limit - extent)
        ends.append((low, low + extent))
    return _of(ends)


def carried(box: Box, source: Grid, target: Grid, margin_mm: float) -> Box:
    """The voxels of another grid that a box and a margin around it touch.

    Args:
        box: On `source`; its voxels are boxes and not points.
        source: A grid.
        target: A grid with axes parallel to those of `source`.
        margin_mm: Added on each side.

    Returns:
        A box on `target` with one voxel at least.
    """
    step = np.linalg.inv(target.affine) @ source.affine
    more = margin_mm / np.asarray(spacing_of(target.affine))
    ends = []
    for axis in range(3):
        scale, shift = float(step[axis, axis]), float(step[axis, 3])
        # Faces are halves off the centres: voxel v of the target reaches from v - 1/2 to v + 1/2.
        low = scale * (box.first[axis] - 0.5) + shift - more[axis]
        high = scale * (box.stop[axis] - 0.5) + shift + more[axis]
        first = math.floor(round(low + 0.5, 6))
        stop = math.ceil(round(high + 0.5, 6))
        first = min(max(first, 0), target.shape[axis] - 1)
        ends.append((first, max(min(stop, target.shape[axis]), first + 1)))
    return _of(ends)


def centres_within(box: Box, source: Grid, target: Grid) -> Box:
    """The voxels of another grid whose centres lie between the outermost centres of a box.

    Where the box ends with its grid, all voxels of `target` beyond it belong to it too: there the
    border value continues (`imaging.resample`).

    Returns:
        A box on `target` with one voxel at least.
    """
    step = np.linalg.inv(target.affine) @ source.affine
    ends = []
    for axis in range(3):
        scale, shift = float(step[axis, axis]), float(step[axis, 3])
        size = target.shape[axis]
        first = math.ceil(round(scale * box.first[axis] + shift, 6))
        last = math.floor(round(scale * (box.stop[axis] - 1) + shift, 6))
        first = 0 if box.first[axis] == 0 else min(max(first, 0), size - 1)
        last = size - 1 if box.stop[axis] == source.shape[axis] else min(last, size - 1)
        ends.append((first, max(last, first) + 1))
    return _of(ends)


def needed(source: Grid, target: Grid) -> Box:
    """The voxels of `source` that resampling to `target` looks at (`imaging.resample.resample`)."""
    step = np.linalg.inv(source.affine) @ target.affine
    ends = []
    for axis in range(3):
        scale, shift, size = float(step[axis, axis]), float(step[axis, 3]), source.shape[axis]
        # Linear interpolation looks one voxel far; averaging to larger voxels looks further.
        reach = 1 + math.sqrt(max(scale**2 - 1, 0)) / 2
        low = math.floor(shift - reach)
        high = math.ceil(shift + scale * (target.shape[axis] - 1) + reach)
        first = min(max(low, 0), size - 1)
        ends.append((first, max(min(high + 1, size), first + 1)))
    return _of(ends)


def grid_of(grid: Grid, box: Box) -> Grid:
    """The part of a grid that a box cuts out."""
    shift = np.eye(4)
    shift[:3, 3] = box.first
    return Grid(box.shape, grid.affine @ shift)


def touches(mask: NDArray[Any], box: Box, shape: Shape) -> bool:
    """Whether a mask on a box reaches a face behind which the grid goes on.

    Args:
        mask: On the box, (I, J, K) of `box.shape`; what is not 0 counts.
        box: Where the mask lies.
        shape: Of the whole grid.
    """
    for axis in range(3):
        plane = [slice(None)] * 3
        for index, goes_on in (
            (0, box.first[axis] > 0),
            (-1, box.stop[axis] < shape[axis]),
        ):
            plane[axis] = slice(index, index + 1 or None)
            if goes_on and mask[tuple(plane)].any():
                return True
    return False


def _of(ends: list[tuple[int, int]]) -> Box:
    (i, i_stop), (j, j_stop), (k, k_stop) = ends
    return Box((i, j, k), (i_stop, j_stop, k_stop))
