"""The optimizer that a recipe asks for, and its rate at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from models.recipe import AnyPretrain, Constant, Cosine, Drops, Optimizer


def make_optimizer(
    parameters: Iterable[nn.Parameter], recipe: AnyPretrain
) -> torch.optim.Optimizer:
    """The recipe's optimizer over these parameters; its rate is set by `set_rate`."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    betas = (recipe.momentum, recipe.optimizer.beta2)
    match recipe.optimizer.kind:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=rate, momentum=recipe.momentum, weight_decay=decay, fused=True
            )
        case "adam":
            return torch.optim.Adam(
                parameters, lr=rate, betas=betas, weight_decay=decay, fused=True
            )
        case "adamw":
            return torch.optim.AdamW(
                parameters, lr=rate, betas=betas, weight_decay=decay, fused=True
            )
        case "nadam":
            return torch.optim.NAdam(parameters, lr=rate, betas=betas, weight_decay=decay)


def set_rate(optimizer: torch.optim.Optimizer, recipe: AnyPretrain, step: int) -> float:
    """Set and return the rate of a step, from 1."""
    rate = rate_at(recipe.learning_rate, recipe.optimizer, step - 1, recipe.num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def rate_at(base: float, spec: Optimizer, done: int, num_steps: int) -> float:
    """The rate after `done` of `num_steps`, which the next step uses."""
    rising = min(1.0, (done + 1) / (spec.warmup_steps + 1))
    match spec.schedule:
        case Cosine():
            return rising * cosine(base, done, num_steps)
        case Drops(at=at, factor=factor):
            return rising * base * factor ** sum(done >= share * num_steps for share in at)
        case Constant():
            return rising * base


def cosine(base: float, step: int, num_steps: int) -> float:
    """Learning rate after `step` of `num_steps`: from `base` to 0 along half a cosine."""
    return base * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
