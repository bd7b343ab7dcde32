"""Part of a view is kept and put back in the middle: 3D-CPC's guard against edges that go on.

Neighbouring patches of one scan share their border; a network could tell that they belong together
from the border alone. Every view loses a random part of its rim and so is shifted (Taleb et al.,
NeurIPS 2020, public code).

B batch, I J K voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.blocks import Shape
from trainer.data.to_device import to_device


@dataclass(frozen=True, slots=True)
class Jitter:
    """What is drawn for each view.

    Attributes:
        start: First voxel along each axis that is kept, int64 (B, 3).
        flips: Whether the view is flipped along I before, bool (B,).
    """

    start: Tensor
    flips: Tensor


def kept_of(shape: Shape, share: float) -> Shape:
    """Voxels kept along each axis."""
    i, j, k = (max(round(share * n), 1) for n in shape)
    return i, j, k


def draw(
    batch_size: int, shape: Shape, share: float, flip_probability: float, random: torch.Generator
) -> Jitter:
    """Where the kept part begins, uniform, and flips."""
    room = torch.tensor(shape) - torch.tensor(kept_of(shape, share))
    u = torch.rand(batch_size, 3, generator=random, dtype=torch.float64)
    return Jitter(
        start=(u * (room + 1)).long(),
        flips=torch.rand(batch_size, generator=random) < flip_probability,
    )


def apply(views: Tensor, jitter: Jitter, share: float) -> Tensor:
    """Flip, cut, and put in the middle of zeros.

        for each view and axis, with m of n voxels kept and before = (n - m) // 2:
            out[before : before + m] = flipped[start : start + m]; 0 elsewhere

    Args:
        views: (B, 1, I, J, K).
        jitter: What was drawn.
        share: Of each axis that is kept, as it was drawn for.
    """
    i, j, k = views.shape[2:]
    start = to_device(jitter.start, views.device)
    reads, is_kept = [], []
    for axis, (n, m) in enumerate(zip((i, j, k), kept_of((i, j, k), share), strict=True)):
        place = torch.arange(n, device=views.device) - (n - m) // 2
        is_kept.append((place >= 0) & (place < m))
        reads.append((start[:, axis, None] + place).clamp(0, n - 1))  # (B, n)
    flips = to_device(jitter.flips, views.device)[:, None]
    reads[0] = torch.where(flips, i - 1 - reads[0], reads[0])
    sample = torch.arange(len(views), device=views.device)[:, None, None, None]
    from_i, from_j, from_k = reads
    moved = views[:, 0][
        sample, from_i[:, :, None, None], from_j[:, None, :, None], from_k[:, None, None, :]
    ]
    along_i, along_j, along_k = is_kept
    inside = along_i[:, None, None] & along_j[:, None] & along_k
    return (moved * inside)[:, None]
