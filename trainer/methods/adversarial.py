"""A Wasserstein game with a gradient penalty: what the critic and the network minimise.

Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, algorithm 1; conditional:
the critic sees the disarranged volume beside the one that it judges.

B batch, I J K voxels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Critic = Callable[[Tensor, Tensor], Tensor]
"""Scores (B,) of a volume (B, 1, I, J, K) given the disarranged one."""


def critic_loss(
    critic: Critic,
    truth: Tensor,
    restored: Tensor,
    disarranged: Tensor,
    *,
    share: Tensor,
    penalty_weight: float,
) -> Tensor:
    """Mean D(restored) - mean D(truth) + weight * mean (|gradient of D between them| - 1)^2.

    The gradient is taken by the judged volume alone, as the other one is the same for both.

    Args:
        critic: D.
        truth: (B, 1, I, J, K).
        restored: What the network made, detached.
        disarranged: What it was made of.
        share: Of the truth in the volume between, uniform in [0, 1), (B,).
        penalty_weight: Lambda; 10 in the paper.
    """
    gap = critic(restored, disarranged).mean() - critic(truth, disarranged).mean()
    return gap + penalty_weight * gradient_penalty(critic, truth, restored, disarranged, share)


def gradient_penalty(
    critic: Critic, truth: Tensor, restored: Tensor, disarranged: Tensor, share: Tensor
) -> Tensor:
    """(|gradient| - 1)^2 at a random point between each two volumes, mean over the batch."""
    between = torch.lerp(restored, truth, share[:, None, None, None, None])
    between.requires_grad_()
    scores = critic(between, disarranged)
    (gradient,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
    slope: Tensor = gradient.float().flatten(1).norm(dim=1)  # (B,)
    return ((slope - 1) ** 2).mean()


def generator_loss(critic: Critic, restored: Tensor, disarranged: Tensor) -> Tensor:
    """Minus mean D(restored), whose gradient reaches what restored it."""
    return -critic(restored, disarranged).mean()
