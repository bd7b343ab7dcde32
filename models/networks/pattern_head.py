"""Which anatomical pattern a crop shows: Semantic Genesis' head on the bottleneck.

B batch, C channels of the bottleneck, H of the head, L classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.unet3d import pooled


class PatternHead(nn.Module):
    """A convolution, batch norm, ReLU, global average pooling, one linear layer."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, width, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm3d(width)
        self.classes = nn.Linear(width, num_classes)

    def forward(self, bottleneck: Tensor) -> Tensor:
        """Logits (B, L), float32, of bottlenecks (B, C, I, J, K)."""
        logits: Tensor = self.classes(pooled(torch.relu(self.norm(self.conv(bottleneck)))))
        return logits.float()
