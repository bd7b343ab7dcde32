"""One linear layer on frozen features, and the interval of its accuracy over patients.

N examples, F features, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from numpy.typing import NDArray
from torch import Tensor

DECAY = 1e-3
"""Of the weights, per example: features may outnumber examples."""
_MAX_ITERATIONS = 200


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers, with the bounds of its bootstrap interval of 95 % over patients."""

    value: float
    low: float
    high: float


def fit(features: Tensor, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (F, C) and bias (C,) of least cross-entropy plus `DECAY` times the squared weight.

    Convex, and solved by L-BFGS in float64: there is nothing to tune, and no seed. Features are
    scaled by their mean and deviation first, which the result contains.

    Args:
        features: (N, F), finite.
        classes: (N,).
        num_classes: C.
    """
    x = features.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    # What does not vary says nothing; what varies by rounding alone must not be blown up.
    scale = torch.where(deviation > 1e-6 * (mean.abs() + 1e-12), 1.0 / deviation, 0.0)
    x = (x - mean) * scale.nan_to_num(0.0)
    weight = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def cost() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, classes) + DECAY * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        return loss

    solver.step(cost)  # type: ignore[no-untyped-call]  # of torch
    scaled = scale.nan_to_num(0.0)[:, None] * weight.detach()
    return scaled, bias.detach() - mean @ scaled


def is_right(features: Tensor, classes: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
    """Whether the layer's largest logit is the class, bool (N,)."""
    weight, bias = layer
    return (features.double() @ weight + bias).argmax(dim=1) == classes


def accuracy(
    right: Tensor, patients: Sequence[str], *, num_resamples: int = 2000, seed: int = 0
) -> Accuracy:
    """Accuracy with a percentile interval: patients are drawn with replacement, not examples.

    Examples of a patient are alike, and an interval over examples would be too narrow.

    Args:
        right: (N,).
        patients: Of each example.
        num_resamples: R.
        seed: Of the resampling.
    """
    names = sorted(set(patients))
    place = {name: at for at, name in enumerate(names)}
    of = np.array([place[name] for name in patients])
    won = np.bincount(of, right.double().numpy(), minlength=len(names))
    asked = np.bincount(of, minlength=len(names)).astype(np.float64)
    drawn: NDArray[np.int64] = np.random.default_rng(seed).multinomial(
        len(names), [1 / len(names)] * len(names), size=num_resamples
    )  # (R, patients)
    shares = (drawn @ won) / (drawn @ asked)
    low, high = np.quantile(shares, (0.025, 0.975))
    return Accuracy(float(won.sum() / asked.sum()), float(low), float(high))
