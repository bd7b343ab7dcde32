"""Voxels with an affine.

A `Volume` is always closest to RAS+: index I grows towards the patient's Right, J towards
Anterior, K towards Superior. Getting there from a file takes only flips and a permutation,
so it loses nothing and `Grid` remembers the way back.

Axes: I J K voxel axes in RAS+ order; spacing in array order, mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Affine = NDArray[np.float64]
Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Grid:
    """Where voxels lie: a shape and a voxel-to-RAS+ affine (mm), in any axis order."""

    shape: Shape
    affine: Affine


@dataclass(frozen=True, slots=True)
class Volume:
    """Voxels (I, J, K) closest to RAS+ with their voxel-to-RAS+ affine (4, 4) in mm."""

    voxels: Array
    affine: Affine

    @property
    def shape(self) -> Shape:
        """Number of voxels along I, J, K."""
        i, j, k = self.voxels.shape
        return i, j, k

    @property
    def spacing_mm(self) -> Spacing:
        """Distance between voxel centres along I, J, K."""
        return spacing_of(self.affine)

    @property
    def grid(self) -> Grid:
        """The volume's own grid."""
        return Grid(self.shape, self.affine)


def spacing_of(affine: Affine) -> Spacing:
    """Length of the affine's three columns, mm."""
    i, j, k = np.linalg.norm(affine[:3, :3], axis=0)
    return float(i), float(j), float(k)


def corner_distance_mm(one: Affine, other: Affine, shape: Shape) -> float:
    """Largest distance between the eight corner voxels of two grids of one shape."""
    ends = [(0, size - 1) for size in shape]
    corners = np.array([[*corner, 1] for corner in product(*ends)], dtype=np.float64)  # (8, 4)
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())
