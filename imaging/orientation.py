"""From a file's axes to RAS+ and back: flips and a permutation, which lose nothing.

Apart from `imaging.volume`: nibabel, which tells the order of the axes, loads pydicom and all its
decoders, half a second that a process which only speaks of volumes need not pay.

Axes: A B C as in the file; I J K in RAS+ order.
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

from imaging.volume import Affine, Array, Grid, Volume


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
