"""The same views made the way one writes them first: NumPy and SciPy, one crop after another.

What `bench_input` compares the trainer with. Each function does a whole volume at once where NumPy
does so naturally; the loop over windows is in `shuffle_pixels` because the public code has it.
The numbers of the recipe are algorithms.md 1.2, rows 24-33.

Crops are float32 (I, J, K) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from models.recipe import CropPairs

Volume = NDArray[np.float32]
Size = tuple[int, int, int]

MAX_BOXES = 5
BOX_PROBABILITY = 0.95


def make_pair(
    volumes: Sequence[Volume], recipe: CropPairs, random: np.random.Generator
) -> tuple[list[Volume], list[Volume]]:
    """Clean and corrupted views of two overlapping crops."""
    clean, spoiled = [], []
    painting = draw_painting(recipe, random)
    limit = recipe.max_rotation_deg
    may_flip = np.array([axis in recipe.flip_axes for axis in "ijk"])
    for crop in cut_pair(volumes, recipe, random):
        flips = may_flip & (random.random(3) < recipe.flip_probability)
        view = flip(resize(crop, recipe.input_size), flips)
        if recipe.rotation == "in_plane":
            view = rotate(view, random.uniform(-limit, limit))
        else:
            stretch = 1 + random.uniform(-recipe.max_scaling, recipe.max_scaling, 3)
            view = affine(view, random.uniform(-limit, limit, 3), stretch)
        clean.append(view)
        if random.random() < recipe.shuffle_probability:
            view = shuffle_pixels(view, random)
        view = paint(view, painting, random)
        spoiled.append(blur(view, random.uniform(0.0, recipe.max_blur_sigma, 3)))
    return clean, spoiled


def cut_pair(
    volumes: Sequence[Volume], recipe: CropPairs, random: np.random.Generator
) -> tuple[Volume, Volume]:
    """Two crops of one size that overlap by more than the recipe's IoU, by rejection."""
    volume = volumes[int(random.integers(len(volumes)))]
    size = np.array(recipe.crop_sizes[int(random.integers(len(recipe.crop_sizes)))])
    room = volume.shape - size
    while True:
        first, second = random.integers(0, room + 1), random.integers(0, room + 1)
        shared = np.prod(np.maximum(size - np.abs(first - second), 0))
        if shared / (2 * np.prod(size) - shared) > recipe.min_iou:
            break
    return cut(volume, first, size), cut(volume, second, size)


def cut(volume: Volume, start: NDArray[np.int64], size: NDArray[np.int64]) -> Volume:
    """A view of the box; nothing is copied."""
    (i, j, k), (a, b, c) = start, start + size
    return volume[i:a, j:b, k:c]


def resize(crop: Volume, size: Size) -> Volume:
    """What scikit-image's `resize` of order 1 with anti-aliasing does, edges repeated."""
    factors = np.array(crop.shape) / size
    sigma = np.maximum(0.0, (factors - 1) / 2)
    smooth = ndimage.gaussian_filter(crop, sigma, mode="nearest") if sigma.any() else crop
    zoomed: Volume = ndimage.zoom(smooth, 1 / factors, order=1, mode="nearest", grid_mode=True)
    return zoomed


def flip(view: Volume, flips: NDArray[np.bool_]) -> Volume:
    """Reverse the marked axes."""
    return np.flip(view, tuple(np.flatnonzero(flips)))


def rotate(view: Volume, degrees: float) -> Volume:
    """Turn in the IJ plane, bilinear; what comes in from outside is the minimum."""
    turned: Volume = ndimage.rotate(
        view, degrees, axes=(0, 1), reshape=False, order=1, mode="constant", cval=view.min()
    )
    return turned


def affine(view: Volume, degrees: NDArray[np.float64], scales: NDArray[np.float64]) -> Volume:
    """Scale, turn about I, J and K, trilinear; what comes in from outside is the minimum."""
    turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    back = turn.T / scales[:, None]
    centre = (np.array(view.shape) - 1) / 2
    moved: Volume = ndimage.affine_transform(
        view, back, centre - back @ centre, order=1, mode="constant", cval=view.min()
    )
    return moved


def blur(view: Volume, sigma: NDArray[np.float64]) -> Volume:
    """Gaussian of one deviation an axis, edges repeated."""
    soft: Volume = ndimage.gaussian_filter(view, sigma, mode="nearest")
    return soft


def draw_painting(recipe: CropPairs, random: np.random.Generator) -> str:
    """Which painting, for both views."""
    if random.random() >= recipe.paint_probability:
        return "none"
    return "in" if random.random() < recipe.inpaint_share else "out"


def paint(view: Volume, painting: str, random: np.random.Generator) -> Volume:
    """Noise inside up to five boxes (`in`) or outside them (`out`)."""
    if painting == "none":
        return view
    n = np.array(view.shape)
    noise = random.random(view.shape, dtype=np.float32)
    base, other = (view, noise) if painting == "in" else (noise, view)
    least, most = (n // 6, n // 3) if painting == "in" else (n - 4 * n // 7, n - 3 * n // 7)
    painted = base.copy()
    for box in range(MAX_BOXES):
        if random.random() >= BOX_PROBABILITY and not (painting == "out" and box == 0):
            continue
        size = random.integers(least, most + 1)
        i, j, k = start = random.integers(3, n - size - 3 + 1)
        a, b, c = start + size
        painted[i:a, j:b, k:c] = other[i:a, j:b, k:c]
    return painted


def shuffle_pixels(view: Volume, random: np.random.Generator, num_windows: int = 10_000) -> Volume:
    """Permute the voxels of small windows of the view, a later window over an earlier one.

    Each window reads the view as it was, not what earlier windows wrote, as in the public code;
    that draws its windows one by one, which costs a tenth more than drawing them at once.
    """
    shuffled = view.copy()
    n = np.array(view.shape)
    size = random.integers(1, np.maximum(1, n // 10) + 1, (num_windows, 3))
    start = random.integers(0, n - size + 1)
    for (i, j, k), (a, b, c) in zip(start.tolist(), (start + size).tolist(), strict=True):
        window = view[i:a, j:b, k:c].flatten()
        random.shuffle(window)
        shuffled[i:a, j:b, k:c] = window.reshape(a - i, b - j, c - k)
    return shuffled
