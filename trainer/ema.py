"""The momentum encoder's update: an exponential moving average of the ordinary one (Eq. 9)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


@torch.no_grad()
def update(average: nn.Module, source: nn.Module, beta: float) -> None:
    """Move every parameter and buffer of `average` towards `source`.

        average = beta * average + (1 - beta) * source

    Floating buffers (batch norm's running statistics) move by the same rule, integers are copied.
    The official code leaves buffers out, so an exported momentum network has statistics that
    belong to other weights (bug B11).
    """
    ours = list(average.parameters()) + list(average.buffers())
    theirs = list(source.parameters()) + list(source.buffers())
    assert len(ours) == len(theirs)
    pairs = list(zip(ours, theirs, strict=True))
    floating = [(a, s) for a, s in pairs if a.is_floating_point()]
    averages = cast(list[Tensor], [a for a, _ in floating])
    sources = cast(list[Tensor], [s for _, s in floating])
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, sources, alpha=1.0 - beta)
    for a, s in pairs:
        if not a.is_floating_point():
            a.copy_(s)


def freeze(average: nn.Module) -> None:
    """Take `average` out of back-propagation and let `update` alone move its statistics."""
    average.requires_grad_(requires_grad=False)
    for module in average.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = 0.0
