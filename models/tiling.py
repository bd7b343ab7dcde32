"""Windows over a volume and the weights that blend them, equal to MONAI's Gaussian mode.

The same windows, padding and weights as `monai.inferers.sliding_window_inference(mode="gaussian",
padding_mode="constant")`, without torch; a test holds the two together.

Axes: (I, J, K) voxels of the network's grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imaging.volume import Shape

Float32Array = NDArray[np.float32]
Margins = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

SMALLEST_WEIGHT = 1e-3
"""Floor of the blending weights, so that a corner seen by one window alone is not 0 / 0."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How windows lie over a volume."""

    size: Shape
    """Voxels of a window."""
    overlap: float
    """Share of a window that the next one sees again, 0 <= overlap < 1."""
    batch: int = 1
    """Windows that go through the network together."""


def fitted(windows: Windows, shape: Shape, multiple: Shape, most: float) -> Windows:
    """Windows that cover a shape with the least computation, a little larger than these perhaps.

    Where two windows of 96 would lie on 108 voxels, one of 112 computes little more than half. For
    each axis, of the sizes from `windows.size` to `most` times it, the one of which windows times
    size is least; the smallest of equals.

    Args:
        windows: Size to start from, and the overlap that stays.
        shape: Voxels of the volume.
        multiple: What the network's extents are multiples of.
        most: How many times larger a side may be; 1 changes nothing.
    """

    def best(extent: int, size: int, step: int) -> int:
        sizes = range(size, max(int(size * most), size) + 1, step)
        return min(sizes, key=lambda one: one * len(axis_starts(extent, one, windows.overlap)))

    i, j, k = (best(*axis) for axis in zip(shape, windows.size, multiple, strict=True))
    return Windows((i, j, k), windows.overlap, windows.batch)


def window_starts(shape: Shape, patch: Shape, overlap: float) -> list[tuple[int, int, int]]:
    """First voxel of every window, ordered by K, then J, then I.

    An axis shorter than the patch counts as padded to it (`margins`). The step is
    int((1 - overlap) * patch), at least 1; the last window is drawn back to end at the border.

    Args:
        shape: Voxels of the volume.
        patch: Voxels of a window.
        overlap: Share of a window that the next one sees again, 0 <= overlap < 1.

    Raises:
        ValueError: The overlap is out of range.
    """
    starts_i, starts_j, starts_k = (
        axis_starts(size, window, overlap) for size, window in zip(shape, patch, strict=True)
    )
    return [(i, j, k) for k in starts_k for j in starts_j for i in starts_i]


def axis_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxel of every window along one axis, ascending."""
    if not 0.0 <= overlap < 1.0:
        raise ValueError(f"overlap {overlap} must be at least 0 and below 1")
    last = max(size - window, 0)
    step = max(int(window * (1 - overlap)), 1)
    num_windows = math.ceil(last / step) + 1
    return [min(index * step, last) for index in range(num_windows)]


def gaussian_weights(patch: Shape, sigma_scale: float = 0.125) -> Float32Array:
    """Weight of every voxel of a window in the blend: a Gaussian around the window's centre.

        w[i, j, k] = max(1e-3, product over axes of exp(-(x - centre)^2 / (2 (scale * size)^2)))

    Args:
        patch: Voxels of a window.
        sigma_scale: Standard deviation as a share of the window's size.

    Returns:
        (I, J, K), float32, in [1e-3, 1].
    """
    profiles = []
    for size in patch:
        offset = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
        sigma = np.float32(sigma_scale * size)
        profiles.append(np.exp(-(offset**2) / (2 * sigma**2)))
    i, j, k = profiles
    weights: Float32Array = i[:, None, None] * j[:, None] * k
    return np.asarray(np.maximum(weights, SMALLEST_WEIGHT), dtype=np.float32)


def margins(shape: Shape, patch: Shape) -> Margins:
    """Voxels to add before and after each axis so that one window fits; the odd one goes after."""
    missing = [max(window - size, 0) for size, window in zip(shape, patch, strict=True)]
    i, j, k = ((total // 2, total - total // 2) for total in missing)
    return i, j, k


def pad(array: Float32Array, patch: Shape, value: float) -> Float32Array:
    """The array with its `margins` filled; the very same array where nothing is missing."""
    i, j, k = array.shape
    widths = margins((i, j, k), patch)
    if not np.any(widths):
        return array
    return np.pad(array, widths, constant_values=value)
