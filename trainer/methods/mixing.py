"""Mixing: the lambda of a step, and the mix of two tensors."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class MixSpec(Protocol):
    """The fields of a recipe that say how lambda is drawn."""

    @property
    def mix_alpha(self) -> float: ...  # noqa: D102
    @property
    def mix_fold(self) -> bool: ...  # noqa: D102


def draw_mix(method: MixSpec, random: torch.Generator) -> float:
    """Lambda of a step, from Beta(alpha, alpha), folded if the recipe says so."""
    seed = int(torch.randint(2**62, (1,), generator=random))
    drawn = float(np.random.default_rng(seed).beta(method.mix_alpha, method.mix_alpha))
    return max(drawn, 1.0 - drawn) if method.mix_fold else drawn


def mix(one: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """Lambda * one + (1 - lambda) * other."""
    return lam * one + (1.0 - lam) * other
