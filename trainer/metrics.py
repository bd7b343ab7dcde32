"""How good a segmentation is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai.metrics.meandice import DiceHelper
from torch import Tensor


def dice_per_label(predicted: Tensor, truth: Tensor, num_labels: int) -> list[float]:
    """Dice of each label of one case (MONAI's).

    Args:
        predicted: Classes, integer (I, J, K); 0 is background.
        truth: The same for the truth.
        num_labels: Labels without background.

    Returns:
        One value a label; NaN where the truth has none of it.
    """
    helper = DiceHelper(
        include_background=False, num_classes=num_labels + 1, reduction="none", ignore_empty=True
    )
    scores, _ = helper(predicted[None, None], truth[None, None])
    return [float(score) for score in scores.reshape(-1)]


def mean_ignoring_nan(values: Sequence[float]) -> tuple[float, int]:
    """Mean and number of the values that are not NaN; (NaN, 0) if none is."""
    kept = [value for value in values if not math.isnan(value)]
    return (sum(kept) / len(kept) if kept else math.nan), len(kept)
