"""From a 2D image to network input: one function, used by training and by serving.

Axes: R C rows and columns of the image, S of the network's square.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.recipe import Normalisation, OwnRange, Percentiles, Preprocessing2d

Float32Array = NDArray[np.float32]


def prepare_image(pixels: Float32Array, spec: Preprocessing2d) -> Float32Array:
    """Scale the intensities to [0, 1] and stretch the image to the network's square.

    The stretching is linear interpolation whose triangle widens with the step where the image
    shrinks, so that nothing finer than a pixel of the result aliases (Pillow's `BILINEAR`). The
    ratio of rows to columns is not kept: crops of training change it by a third either way.

    Args:
        pixels: (R, C), not all equal.
        spec: From the recipe in training, from the bundle's manifest in serving.

    Returns:
        (S, S) in [0, 1], before the normalisation of its channels.
    """
    low, high = _limits(pixels, spec.intensity)
    scaled = np.clip((pixels - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    side = (spec.size, spec.size)
    square = Image.fromarray(scaled).resize(side, Image.Resampling.BILINEAR)
    return np.clip(np.asarray(square, dtype=np.float32), 0.0, 1.0)


def as_channels(prepared: Float32Array, normalisation: Normalisation | None) -> Float32Array:
    """Network input (3, S, S): the grey image three times, each channel normalised."""
    channels = np.repeat(prepared[None], 3, axis=0)
    if normalisation is None:
        return channels
    mean = np.asarray(normalisation.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(normalisation.std, dtype=np.float32)[:, None, None]
    normalised: Float32Array = (channels - mean) / std
    return normalised


def _limits(pixels: Float32Array, intensity: OwnRange | Percentiles) -> tuple[float, float]:
    """Values that become 0 and 1; the whole range where the percentiles are one value."""
    if isinstance(intensity, Percentiles):
        low, high = np.percentile(pixels, [intensity.low, intensity.high])
        if low < high:
            return float(low), float(high)
    return float(pixels.min()), float(pixels.max())
