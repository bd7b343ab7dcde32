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

import nibabel as nib
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


def canonical(voxels: Array, affine: Affine) -> Volume:
    """Flip and permute axes so that they run closest to RAS+.

    Args:
        voxels: (A, B, C) in any axis order.
        affine: Voxel-to-RAS+ matrix of that order, (4, 4), mm.
    """
    orientation = nib.orientations.io_orientation(affine)
    reordered = nib.orientations.apply_orientation(voxels, orientation)
    a, b, c = voxels.shape
    return Volume(reordered, canonical_affine(Grid((a, b, c), affine)))


def on_source_grid(voxels: Array, source: Grid) -> Array:
    """Undo `canonical`: voxels (I, J, K) in RAS+ back in the axis order of their source.

    Raises:
        ValueError: The voxels do not have the source's extent.
    """
    forward = nib.orientations.io_orientation(source.affine)
    backward = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(np.diag([1.0, 1.0, 1.0, 1.0])), forward
    )
    restored: Array = nib.orientations.apply_orientation(voxels, backward)
    if restored.shape != source.shape:
        raise ValueError(f"voxels are {restored.shape} on the source axes, not {source.shape}")
    return restored


def empty_canonical(source: Grid, dtype: np.dtype[Any] | type[Any]) -> tuple[Array, Array]:
    """Room for the voxels of a source, so that they are put into RAS+ as they are read.

    Returns:
        An empty array (I, J, K) in RAS+, in Fortran order, and a view of it (A, B, C) on the
        source's own axes.
    """
    forward = nib.orientations.io_orientation(source.affine)
    shape = np.empty(3, dtype=int)
    shape[forward[:, 0].astype(int)] = source.shape
    voxels: Array = np.empty(tuple(shape), dtype=dtype, order="F")
    return voxels, on_source_grid(voxels, source)


def canonical_affine(source: Grid) -> Affine:
    """The voxel-to-RAS+ matrix after `canonical`, (4, 4), mm."""
    orientation = nib.orientations.io_orientation(source.affine)
    step = nib.orientations.inv_ornt_aff(orientation, source.shape)
    affine: Affine = np.asarray(source.affine, dtype=np.float64) @ step
    return affine


def corner_distance_mm(one: Affine, other: Affine, shape: Shape) -> float:
    """Largest distance between the eight corner voxels of two grids of one shape."""
    ends = [(0, size - 1) for size in shape]
    corners = np.array([[*corner, 1] for corner in product(*ends)], dtype=np.float64)  # (8, 4)
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())
