"""The map of a segmentation's entropy as a file: NIfTI, uint8, on the grid of the scan as sent.

255 is an entropy of 1. It is read back and certified as the mask is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imaging import nifti
from imaging.orientation import on_source_grid
from imaging.results.certificate import certify_nifti
from imaging.volume import Grid
from service import itk_reader
from service.results import INTENDED_USE
from service.runs import NewArtifact
from service.storage import Store

NAME = "uncertainty.nii.gz"
MEDIA_TYPE = "application/gzip"


@dataclass(frozen=True, slots=True)
class StoredMap:
    """The file in the store, and its line in the result."""

    artifact: NewArtifact
    max_corner_error_mm: float

    @property
    def line(self) -> dict[str, object]:
        """For the result's `uncertainty.map`."""
        return {
            "sha256": self.artifact.sha256,
            "size_bytes": self.artifact.size,
            "max_corner_error_mm": self.max_corner_error_mm,
        }


def publish(store: Store, folder: Path, values: NDArray[np.uint8], source: Grid) -> StoredMap:
    """Write the map, prove it, and put it into the store.

    Args:
        store: Where the file goes.
        folder: Scratch.
        values: (I, J, K) in RAS+.
        source: The scan's grid as sent.

    Raises:
        GeometryError: The file is not what was computed.
    """
    path = folder / NAME
    on_source = np.ascontiguousarray(on_source_grid(values, source))
    nifti.write(path, on_source, source.affine, description=f"entropy x 255; {INTENDED_USE}")
    readers = [itk_reader.read_mask] if itk_reader.can_hold(source) else []
    proven = certify_nifti(path, source, on_source, {}, readers)
    artifact = NewArtifact(NAME, *store.put_file(path), MEDIA_TYPE)
    return StoredMap(artifact, proven.max_corner_error_mm)
