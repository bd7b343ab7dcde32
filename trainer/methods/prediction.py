"""How well codes of patches were predicted: the two losses of 3D-CPC.

F rows to come, M columns of the whole batch, E code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor


def info_nce_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Each prediction must find its patch among those of its row (Taleb et al., Eq. 1).

        for each row f and column m:
            logits = [predicted[f, m] . truth[f, n] for n in columns of the batch]
            loss += cross_entropy(logits, target=m)

    Args:
        predicted: (F, M, E).
        truth: (F, M, E).

    Returns:
        Scalar, mean over rows and columns.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        logits = predicted.float() @ truth.float().mT  # (F, M, M)
    target = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def pair_loss(predicted: Tensor, truth: Tensor, negative: Tensor) -> Tensor:
    """One binary decision for the right column and one for a wrong one (the authors' code).

        for each column m:
            score(n) = mean over rows and features of predicted[:, m] * truth[:, n]
            loss += (log(1 + exp(-score(m))) + log(1 + exp(score(negative[m])))) / 2

    Args:
        predicted: (F, M, E).
        truth: (F, M, E).
        negative: Another column for each, int64 (M,).
    """
    right = (predicted.float() * truth.float()).mean(dim=(0, 2))  # (M,)
    wrong = (predicted.float() * truth.float()[:, negative]).mean(dim=(0, 2))
    return (F.softplus(-right) + F.softplus(wrong)).mean() / 2


def draw_negatives(count: int, random: torch.Generator) -> Tensor:
    """Another column for each, uniform over the others, int64 (M,)."""
    away = torch.randint(1, count, (count,), generator=random)
    return (torch.arange(count) + away) % count
