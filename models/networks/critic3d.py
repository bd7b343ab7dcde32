"""The critic of Rubik's Cube++: how much a volume looks like the one that was taken apart.

B batch, W base width, I J K voxels.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

CriticNorm = Literal["batch", "layer", "none"]

NUM_LEVELS = 4
LEAK = 0.2


class Critic3d(nn.Module):
    """Four halving convolutions, then one score a place; the mean of the scores is the answer.

    Reads the volume beside the disarranged one, two channels, so it judges whether the one was made
    of the other.

    Args:
        base_width: Channels after the first convolution, W; they double at each of four levels.
        norm: After each convolution. `layer` normalises each sample by itself, as a gradient
            penalty on single samples asks for (Gulrajani et al., 2017, section 4).
    """

    def __init__(self, base_width: int = 32, norm: CriticNorm = "layer") -> None:
        super().__init__()
        widths = [2, *(base_width << level for level in range(NUM_LEVELS))]
        pairs = list(itertools.pairwise(widths))
        self.convs = nn.ModuleList(
            nn.Conv3d(before, after, kernel_size=4, stride=2, padding=1) for before, after in pairs
        )
        self.norms = nn.ModuleList(_make_norm(norm, after) for _, after in pairs)
        self.score = nn.Conv3d(widths[-1], 1, kernel_size=1)

    def forward(self, volume: Tensor, disarranged: Tensor) -> Tensor:
        """Score (B, 1, I, J, K) given (B, 1, I, J, K), float32 (B,); extents of 16 and more."""
        x = torch.cat([volume, disarranged], dim=1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), LEAK)
        score: Tensor = self.score(x).float()
        return score.flatten(1).mean(dim=1)


def _make_norm(norm: CriticNorm, channels: int) -> nn.Module:
    match norm:
        case "batch":
            return nn.BatchNorm3d(channels)
        case "layer":
            return nn.GroupNorm(1, channels)
        case "none":
            return nn.Identity()
