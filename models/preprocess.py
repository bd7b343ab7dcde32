"""From a scan to network input: one function, used by training and by serving.

Resample first, then scale intensities in place, so that the volume's own resolution is never held
in floating point. Serving reads the planes of a `Preparation` as its windows pass over them.

Axes: I J K voxels in RAS+; a prime (I' J' K') is the network's grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imaging.resample import LinearPlanes, resample, resampled_grid
from imaging.volume import Array, Grid, Volume
from models.box import Box, grid_of, needed
from models.recipe import Preprocessing, Window, ZScore

Float32Array = NDArray[np.float32]
_PLANES_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Prepared:
    """Network input (I', J', K'), the grid it lies on, and the value that air has in it."""

    array: Float32Array
    grid: Grid
    background: float = 0.0
    """What fills the margins where a volume is smaller than a patch."""

    def planes(self, first: int, stop: int, columns: slice = slice(None)) -> Float32Array:
        """Planes along K', (stop - first, I', J'), of them the columns along J'; a view."""
        return np.moveaxis(self.array[:, columns, first:stop], 2, 0)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What makes network input of a scan, plane by plane; holds no voxel of it."""

    grid: Grid
    background: float
    _planes: LinearPlanes
    _offset: float
    _scale: float
    _clips: bool

    def planes(self, first: int, stop: int, columns: slice = slice(None)) -> Float32Array:
        """Planes along K', (stop - first, I', J'), of them the columns along J'."""
        planes = self._planes.read(first, stop, columns)
        planes -= np.float32(self._offset)
        planes /= np.float32(self._scale)
        if self._clips:
            np.clip(planes, 0.0, 1.0, out=planes)
        return planes


def preparation(volume: Volume, spec: Preprocessing, part: Box | None = None) -> Preparation:
    """How a volume comes to the spacing and the intensities that a network was made for.

    A window maps [low_hu, high_hu] to [0, 1] and clips; air becomes 0. The z-score is
    (x - mean) / deviation with both taken over the non-zero voxels of the volume's own grid; zero
    voxels go through the same line (they are not kept at 0), so that a half-filled voxel at the
    border of the body stays between its neighbours.

    Args:
        volume: The scan, in RAS+; `spec.orientation` allows no other.
        spec: From the recipe in training, from the bundle's manifest in serving.
        part: Only this box of the network's grid. Its voxels are what they are in the whole:
            statistics of a z-score are still of the whole volume.
    """
    grid = resampled_grid(volume.grid, spec.spacing_mm)
    voxels, source = volume.voxels, volume.grid
    if part is not None:
        grid = grid_of(grid, part)
        looked_at = needed(source, grid)
        voxels, source = voxels[looked_at.slices], grid_of(source, looked_at)
    planes = LinearPlanes.of(voxels, source, grid)
    match spec.intensity:
        case Window(low_hu=low, high_hu=high):
            return Preparation(grid, 0.0, planes, low, high - low, _clips=True)
        case ZScore():
            mean, deviation = _statistics(volume.voxels)
            return Preparation(grid, -mean / deviation, planes, mean, deviation, _clips=False)


def prepare(volume: Volume, spec: Preprocessing, part: Box | None = None) -> Prepared:
    """The whole of a `preparation` at once; training keeps it, serving need not."""
    made = preparation(volume, spec, part)
    array = np.empty(made.grid.shape, dtype=np.float32)
    for first in range(0, made.grid.shape[2], _PLANES_AT_ONCE):
        stop = min(first + _PLANES_AT_ONCE, made.grid.shape[2])
        array[:, :, first:stop] = np.moveaxis(made.planes(first, stop), 0, 2)
    return Prepared(array, made.grid, made.background)


def prepare_labels(
    labels: Array,
    source: Grid,
    target: Grid,
    values: Mapping[str, int],
    unlisted: Literal["refuse", "background"] = "refuse",
) -> NDArray[np.uint8]:
    """Classes 0 (background) to n on the network's grid, from a label volume.

    Each class's mask is resampled linearly and the largest share wins, the lower class in a tie.
    Not the nearest voxel: serving brings logits back by the same linear rule, so a border lies
    in training where serving will draw it, and thick slices do not leave stairs. The price is
    that a lesion thinner than about half a voxel of the target disappears.

    Args:
        labels: Whole numbers on `source`, (I, J, K); 0 is background.
        source: Grid of the labels.
        target: Grid of the prepared image.
        values: File value of each class, in the order of the network's output.
        unlisted: Whether values that `values` does not name are an error or background.

    Returns:
        (I', J', K').

    Raises:
        ValueError: Wrong shape, or values that are not listed.
    """
    if labels.shape != source.shape:
        raise ValueError(f"labels are {labels.shape}, their grid {source.shape}")
    if unlisted == "refuse":
        _refuse_unlisted(labels, values)
    listed = list(values.values())
    best = resample(~np.isin(labels, listed), source, target, order=1)
    classes = np.zeros(target.shape, dtype=np.uint8)
    for index, value in enumerate(listed, start=1):
        share = resample(labels == value, source, target, order=1)
        classes[share > best] = index
        np.maximum(best, share, out=best)
    return classes


def _refuse_unlisted(labels: Array, values: Mapping[str, int]) -> None:
    found: set[int] = set()
    for plane in labels:
        found.update(np.unique(plane).tolist())
    unknown = sorted(found - {0, *values.values()})
    if unknown:
        names = ", ".join(f"{name} = {value}" for name, value in values.items())
        raise ValueError(f"label values {unknown} are not listed; expected 0 and {names}")


def _statistics(voxels: Array) -> tuple[float, float]:
    """Mean and deviation over the non-zero voxels, plane by plane; (0, 1) where there are none."""
    count, total = 0, 0.0
    voxels = voxels.T if voxels.flags.f_contiguous else voxels  # in the order of the memory
    for plane in voxels:
        count += int(np.count_nonzero(plane))
        total += float(plane.sum(dtype=np.float64))
    if count == 0:
        return 0.0, 1.0
    mean = total / count
    squares = sum(
        float(np.square(plane[plane != 0].astype(np.float64) - mean).sum()) for plane in voxels
    )
    deviation = float(np.sqrt(squares / count))
    return mean, deviation if deviation > 0 else 1.0
