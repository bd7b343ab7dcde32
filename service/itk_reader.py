"""Masks read back by SimpleITK: the independent reader of a NIfTI that leaves.

It shares no code with the writer (`imaging.nifti`, over nibabel) nor with the reader of
`imaging.geometry`. ITK holds orthogonal grids alone, so a grid with more shear than the corner
tolerance allows is left to the other reader, and the certificate names who read.

Axes: A B C as in the file; ITK's arrays are (C, B, A) and its coordinates LPS+ mm.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK

from imaging.checks import shear_of
from imaging.geometry import MAX_CORNER_ERROR_MM, GeometryError
from imaging.results.certificate import Reading
from imaging.volume import Grid, spacing_of

NAME = f"SimpleITK {SimpleITK.Version.VersionString()}"


def can_hold(grid: Grid) -> bool:
    """Whether ITK's orthogonal grids reach the corners of this one within half the tolerance."""
    extent = max(
        size * step for size, step in zip(grid.shape, spacing_of(grid.affine), strict=True)
    )
    return shear_of(grid.affine) * extent < MAX_CORNER_ERROR_MM / 2


def read_mask(path: Path) -> Reading:
    """Read a NIfTI mask.

    Raises:
        GeometryError: ITK cannot read it as a volume.
    """
    try:
        image = SimpleITK.ReadImage(str(path), imageIO="NiftiImageIO")
    except RuntimeError as error:
        raise GeometryError(f"{NAME} cannot read the mask") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise GeometryError(f"{NAME} finds no volume of single values")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1.0  # LPS to RAS
    labels = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)  # (A, B, C)
    a, b, c = labels.shape
    return Reading(NAME, Grid((a, b, c), affine), labels)
