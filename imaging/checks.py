"""What must hold for the affine and the voxels of a scan, whatever its format."""

from __future__ import annotations

import numpy as np

from imaging.errors import ScanError
from imaging.volume import Affine, Array, spacing_of

MAX_SHEAR = 1e-3
"""Largest cosine between two axes of a grid that still counts as a box."""

_INT16 = np.iinfo(np.int16)


def check_affine(affine: Affine, source: str) -> None:
    """Refuse an affine that is not finite, flat, or sheared (`bad_geometry`)."""
    if not np.isfinite(affine).all():
        raise ScanError("bad_geometry", f"the {source} has values that are not finite")
    spacing = spacing_of(affine)
    if not all(1e-3 < size < 1e3 for size in spacing):
        shown = ", ".join(f"{size:g}" for size in spacing)
        raise ScanError("bad_geometry", f"the {source} has a spacing of {shown} mm")
    shear = shear_of(affine)
    if shear > MAX_SHEAR:
        raise ScanError(
            "bad_geometry",
            f"the {source} is sheared: two axes meet at {np.degrees(np.arccos(min(shear, 1))):.2f} "
            "degrees, expected 90 (an uncorrected gantry tilt?)",
        )


def shear_of(affine: Affine) -> float:
    """Largest absolute cosine between two axes of a grid; 0 for a box."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def narrowed(voxels: Array) -> Array:
    """Float32 voxels (A, B, C) as int16 where that changes no value, else as they are.

    Raises:
        ScanError: `non_finite_voxels`.
    """
    if voxels.dtype != np.float32:
        return voxels
    low, high = float(voxels.min()), float(voxels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ScanError("non_finite_voxels", "some voxels are NaN or infinite")
    if low < _INT16.min or high > _INT16.max:
        return voxels
    narrow = voxels.astype(np.int16)
    is_exact = all(np.array_equal(narrow[:, :, c], voxels[:, :, c]) for c in range(voxels.shape[2]))
    return narrow if is_exact else voxels
