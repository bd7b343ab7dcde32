"""Resampling between grids whose axes are parallel: separable, centre-aligned.

Coordinates come from the two affines alone, so a voxel keeps its place in the patient. Along each
axis the target is a sparse weighting of the source. Linear interpolation reproduces a linear
function exactly. Where voxels grow, the interpolated line is first averaged over a box of
`sqrt(scale^2 - 1)` voxels, which widens the point spread by just what the larger voxel asks for,
vanishes at scale 1, and still reproduces a linear function. Beyond the outermost centres the
border value continues.

Axes: C classes, I J K voxels; a prime (I' J' K') is the target. Memory is bounded by slabs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from imaging.volume import Array, Grid, Shape, Spacing, spacing_of

Weights = csr_array[Any, Any]
SLAB_BYTES = 16 << 20
"""Of a slab that is worked on at a time."""
_PLANES_AT_ONCE = 16
"""Planes that are brought into Fortran order together: a cache line of int16 holds 32 of them."""


def resampled_grid(grid: Grid, spacing_mm: Spacing) -> Grid:
    """The grid with this spacing that covers the same box best, with the same centre.

    Args:
        grid: The grid to cover.
        spacing_mm: Spacing of the result along the axes of `grid`, mm.
    """
    if not all(size > 0 for size in spacing_mm):
        raise ValueError(f"spacing_mm {spacing_mm} must be positive")
    scale = np.asarray(spacing_mm) / np.asarray(spacing_of(grid.affine))
    a, b, c = (max(1, round(size / step)) for size, step in zip(grid.shape, scale, strict=True))
    first = (np.asarray(grid.shape) - 1) / 2 - scale * (np.asarray((a, b, c)) - 1) / 2
    step = np.diag([*scale, 1.0])
    step[:3, 3] = first
    return Grid((a, b, c), grid.affine @ step)


def resample(voxels: Array, source: Grid, target: Grid, *, order: Literal[0, 1]) -> Array:
    """Voxels of one grid on another one with parallel axes.

    Args:
        voxels: (I, J, K) on `source`.
        source: Where the voxels lie.
        target: Where they are wanted; its axes run along those of `source`.
        order: 1 is linear, averaging where voxels grow (images), float32; 0 takes the nearest
            voxel and keeps the type (labels).

    Returns:
        (I', J', K') on `target`.

    Raises:
        ValueError: The axes are not parallel, or the voxels do not have the source's shape.
    """
    if voxels.shape != source.shape:
        raise ValueError(f"voxels are {voxels.shape}, their grid {source.shape}")
    coordinates = _coordinates(source, target)
    if order == 0:
        i, j, k = (
            np.clip(np.floor(x + 0.5), 0, size - 1).astype(np.intp)
            for (x, _), size in zip(coordinates, source.shape, strict=True)
        )
        return np.asarray(voxels[np.ix_(i, j, k)])
    return _apply(voxels, _weights(coordinates, source.shape))


@dataclass(frozen=True, slots=True)
class LinearPlanes:
    """A volume on another grid, of which planes along K' are made as they are asked for.

    Weighted along J, I and K in this order, plane by plane as a file stores them, so that neither
    the whole source nor the whole target is ever held in floating point.
    """

    voxels: Array
    """(I, J, K), any integer or floating type, perhaps a memory map."""
    along_i: Weights
    along_j: Weights
    along_k: Weights

    @classmethod
    def of(cls, voxels: Array, source: Grid, target: Grid) -> LinearPlanes:
        """Prepare to read; see `resample` of order 1.

        Raises:
            ValueError: The axes are not parallel, or the voxels do not have the source's shape.
        """
        if voxels.shape != source.shape:
            raise ValueError(f"voxels are {voxels.shape}, their grid {source.shape}")
        return cls(voxels, *_weights(_coordinates(source, target), source.shape))

    def read(self, first: int, stop: int, columns: slice = slice(None)) -> NDArray[np.float32]:
        """Planes `first` to `stop` along K', of them the columns along J'.

        Returns:
            (stop - first, I', J').
        """
        along_j = self.along_j[columns]
        left, right = int(along_j.indices.min()), int(along_j.indices.max()) + 1
        along_j = along_j[:, left:right]
        num_i, num_j = self.along_i.shape[0], along_j.shape[0]
        planes = np.empty((stop - first, num_i, num_j), dtype=np.float32)
        per_plane = max(self.along_k.shape[1] // max(self.along_k.shape[0], 1), 1)
        thickness = max(1, SLAB_BYTES // (4 * num_i * num_j * per_plane))
        for start in range(first, stop, thickness):
            end = min(start + thickness, stop)
            rows = self.along_k[start:end]
            low, high = int(rows.indices.min()), int(rows.indices.max()) + 1
            in_plane = self._in_plane(low, high, along_j, slice(left, right))
            flat = rows[:, low:high] @ in_plane.reshape(high - low, -1)
            planes[start - first : end - first] = flat.reshape(end - start, num_i, num_j)
        return planes

    def _in_plane(
        self, low: int, high: int, along_j: Weights, columns: slice
    ) -> NDArray[np.float32]:
        """Source planes low to high, resampled along J and I: (high - low, I', J')."""
        made = np.empty((high - low, self.along_i.shape[0], along_j.shape[0]), dtype=np.float32)
        for start in range(low, high, _PLANES_AT_ONCE):
            stop = min(start + _PLANES_AT_ONCE, high)
            part = self.voxels[:, columns, start:stop]
            if part.strides[0] != part.itemsize:
                part = np.asfortranarray(part)
            for k in range(start, stop):
                plane = np.asarray(part[:, :, k - start].T, dtype=np.float32, order="C")  # (J, I)
                by_j = along_j @ plane  # (J', I)
                made[k - low] = self.along_i @ np.ascontiguousarray(by_j.T)
        return made


def argmax_on_grid(logits: Array, source: Grid, target: Grid) -> NDArray[np.uint8]:
    """The strongest class of each target voxel, from linearly resampled logits.

    Equals `argmax over c of resample(logits[c], order=1)`, but works in slabs along K' with one
    class at a time, so memory does not grow with classes times full resolution.

    Args:
        logits: (C, I, J, K) on `source`, at most 256 classes.
        source: Grid of the logits.
        target: Grid of the labels; axes parallel to the source's.

    Returns:
        Class indices, (I', J', K'); the first of equals wins.
    """
    if logits.shape[1:] != source.shape or not 1 <= len(logits) <= 256:
        raise ValueError(f"logits are {logits.shape}, their grid {source.shape}")
    along_i, along_j, along_k = _weights(_coordinates(source, target), source.shape)
    labels = np.zeros(target.shape, dtype=np.uint8)
    if all(_is_identity(weights) for weights in (along_i, along_j, along_k)):
        best = np.array(logits[0])
        for c in range(1, len(logits)):
            labels[logits[c] > best] = c
            np.maximum(best, logits[c], out=best)
        return labels
    thickness = max(1, SLAB_BYTES // (4 * target.shape[0] * target.shape[1]))
    for start in range(0, target.shape[2], thickness):
        rows = along_k[start : start + thickness]
        first, last = int(rows.indices.min()), int(rows.indices.max())
        cut = (along_i, along_j, rows[:, first : last + 1])
        slab = labels[:, :, start : start + thickness]
        best = _apply(logits[0][:, :, first : last + 1], cut)
        for c in range(1, len(logits)):
            rival = _apply(logits[c][:, :, first : last + 1], cut)
            slab[rival > best] = c
            np.maximum(best, rival, out=best)
    return labels


Coordinates = tuple[NDArray[np.float64], float]


def _coordinates(source: Grid, target: Grid) -> list[Coordinates]:
    """Per axis: source coordinates of the target's voxel centres, and the target's step."""
    step = np.linalg.inv(source.affine) @ target.affine
    scale = np.diag(step)[:3]
    drift = np.abs(step[:3, :3] - np.diag(scale)) * (np.asarray(target.shape) - 1)
    if drift.max() > 0.05 or not (scale > 0).all():
        raise ValueError("the grids' axes are not parallel")
    return [
        (step[axis, 3] + scale[axis] * np.arange(target.shape[axis]), float(scale[axis]))
        for axis in range(3)
    ]


def _weights(coordinates: list[Coordinates], shape: Shape) -> tuple[Weights, Weights, Weights]:
    i, j, k = (_axis_weights(x, s, n) for (x, s), n in zip(coordinates, shape, strict=True))
    return i, j, k


def _axis_weights(x: NDArray[np.float64], scale: float, num_source: int) -> Weights:
    """Rows of weights over the source voxels, (I', I); every row sums to one.

    Row i' is the mean over [x - w/2, x + w/2] of the hat functions of linear interpolation.
    """
    x = np.clip(np.round(x, 9), 0, num_source - 1)
    width = np.sqrt(scale**2 - 1) if scale > 1 + 1e-6 else 0.0
    first = np.floor(x - width / 2).astype(np.intp)
    taps = first[:, None] + np.arange(int(np.ceil(width)) + 2)  # (I', T)
    offset = x[:, None] - taps
    if width == 0.0:
        weights = np.maximum(0.0, 1 - np.abs(offset))
    else:
        weights = (_hat_integral(offset + width / 2) - _hat_integral(offset - width / 2)) / width
    rows = np.broadcast_to(np.arange(len(x))[:, None], taps.shape)
    columns = np.clip(taps, 0, num_source - 1)
    full = csr_array((weights.ravel(), (rows.ravel(), columns.ravel())), shape=(len(x), num_source))
    full.sum_duplicates()
    full.eliminate_zeros()
    return full.astype(np.float32)


def _is_identity(weights: Weights) -> bool:
    """Whether every target voxel is the source voxel of the same index."""
    num_target, num_source = weights.shape
    return (
        num_target == num_source
        and weights.nnz == num_target
        and bool((weights.indices == np.arange(num_target)).all())
    )


def _hat_integral(t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integral from minus infinity to t of max(0, 1 - |u|)."""
    t = np.clip(t, -1.0, 1.0)
    return np.where(t < 0, (1 + t) ** 2 / 2, 1 - (1 - t) ** 2 / 2)


def _apply(voxels: Array, weights: tuple[Weights, Weights, Weights]) -> NDArray[np.float32]:
    """Weight along J and K plane by plane, then along I: (I, J, K) to (I', J', K')."""
    along_i, along_j, along_k = weights
    middle = np.empty((voxels.shape[0], along_j.shape[0], along_k.shape[0]), dtype=np.float32)
    for i in range(voxels.shape[0]):
        plane = np.ascontiguousarray(voxels[i], dtype=np.float32)  # (J, K)
        by_k = along_k @ np.ascontiguousarray((along_j @ plane).T)  # (K', J')
        middle[i] = by_k.T
    flat = along_i @ middle.reshape(len(middle), -1)
    return np.asarray(flat, dtype=np.float32).reshape(-1, *middle.shape[1:])
