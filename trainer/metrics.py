"""How good a segmentation or a classification is; the numbers are MONAI's.

N examples, L labels, R regions, I J K voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from monai.metrics.average_precision import compute_average_precision
from monai.metrics.meandice import DiceHelper, compute_dice
from monai.metrics.rocauc import compute_roc_auc
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


def dice_per_region(predicted: Tensor, truth: Tensor) -> list[float]:
    """Dice of regions that may overlap, of one case.

    Args:
        predicted: Whether a voxel lies in the region, bool (R, I, J, K).
        truth: The same for the truth.

    Returns:
        One value a region; NaN where the truth has none of it.
    """
    scores = compute_dice(predicted[None].float(), truth[None].float(), ignore_empty=True)
    return [float(score) for score in scores.reshape(-1)]


def auc(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of one label: how often a positive scores above a negative.

        for each positive p and negative n: 1 if score[p] > score[n], 1/2 if equal, else 0; mean

    Args:
        scores: (N,).
        truth: 1 or 0, some of each, (N,).
    """
    return float(cast(float, compute_roc_auc(scores, truth)))  # MONAI gives a numpy scalar


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean over the positives of the precision where each is found; arguments as in `auc`."""
    return float(cast(float, compute_average_precision(scores, truth)))


def mean_ignoring_nan(values: Sequence[float]) -> tuple[float, int]:
    """Mean and number of the values that are not NaN; (NaN, 0) if none is."""
    kept = [value for value in values if not math.isnan(value)]
    return (sum(kept) / len(kept) if kept else math.nan), len(kept)
