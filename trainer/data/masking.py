"""Which blocks of a view a masked autoencoder does not see.

B batch, C channels, P blocks, I J K voxels; in 2D I J pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_mask(
    batch_size: int,
    shape: tuple[int, ...],
    block: int,
    ratio: float,
    random: torch.Generator,
) -> Tensor:
    """Blocks hidden in each view: exactly round(ratio P) of them, every choice alike.

    He et al., 2022, section 3: random without replacement, so that every view hides as much.

    Args:
        batch_size: B.
        shape: I, J and K, in 2D I and J, multiples of `block`.
        block: Voxels of a block along each axis.
        ratio: Share of blocks that are hidden, in (0, 1).
        random: Of the host.

    Returns:
        True where hidden, bool (B, I / block, J / block, K / block), in 2D without the last.
    """
    grid = [n // block for n in shape]
    count = math.prod(grid)
    order = torch.rand(batch_size, count, generator=random).argsort(dim=1)
    hidden = torch.zeros(batch_size, count, dtype=torch.bool)
    hidden.scatter_(1, order[:, : num_hidden(count, ratio)], value=True)
    return hidden.reshape(batch_size, *grid)


def num_hidden(count: int, ratio: float) -> int:
    """Blocks of `count` that are hidden: at least one, and one stays."""
    return min(max(round(ratio * count), 1), count - 1)


def of_voxels(mask: Tensor, block: int) -> Tensor:
    """The same for every voxel, bool (B, 1, I, J, K), or every pixel, (B, 1, I, J)."""
    for axis in range(1, mask.ndim):
        mask = mask.repeat_interleave(block, dim=axis)
    return mask[:, None]


def masked_error(restored: Tensor, truth: Tensor, is_hidden: Tensor) -> Tensor:
    """Mean squared error over the hidden voxels alone, scalar.

        sum of (restored - truth)^2 where hidden / number of hidden voxels

    Args:
        restored: (B, C, I, J, K), or (B, C, I, J).
        truth: The same shape.
        is_hidden: Bool, the same shape but for one channel.
    """
    squared = ((restored.float() - truth.float()) ** 2).mean(dim=1, keepdim=True)
    return (squared * is_hidden).sum() / is_hidden.sum().clamp(min=1)
