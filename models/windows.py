"""The windows that a model is served with: its own, or larger ones where those are cheaper."""

from __future__ import annotations

import math
import re

from imaging.volume import Shape
from models.bundle import Manifest, volume_input
from models.tiling import Windows, fitted

LARGEST_WINDOW = 1.0
"""Of a window's side in serving, in those of training. Larger ones are cheaper, but the norm's
statistics are of a window: until trained networks show that their Dice and their quality threshold
hold there, a model is served with the windows it was judged with (docs/performance.md)."""
LARGEST_WINDOW_VOXELS = 1 << 21
"""Of a window in serving, unless those of training are larger: working memory grows with it."""


def serving_windows(manifest: Manifest, shape: Shape | None = None) -> Windows:
    """The windows that a segmenter is served with.

    Those that it was trained with, or for a volume of this shape up to `LARGEST_WINDOW` times as
    long where that covers it with less computation and stays in bounds. A network says in its
    input's shape which extents it takes (`8*i8`); one that does not is served with what it was
    trained with.

    Raises:
        BundleError: `wrong_model_kind`, the model reads 2D images.
    """
    _, patch = volume_input(manifest)
    windows = Windows(patch, manifest.overlap)
    declared = [re.fullmatch(r"(\d+)\*\w+", str(side)) for side in manifest.inputs[0].shape[2:]]
    multiples = [int(found[1]) for found in declared if found is not None]
    if shape is None or len(multiples) < 3:
        return windows
    best = fitted(windows, shape, (multiples[0], multiples[1], multiples[2]), LARGEST_WINDOW)
    return windows if math.prod(best.size) > LARGEST_WINDOW_VOXELS else best
