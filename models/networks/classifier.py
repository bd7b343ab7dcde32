"""An encoder that classifies: its bottleneck pooled, one linear layer.

B batch, C channels, F features, L labels.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from models.networks.unet3d import pooled


class HasBottleneck(Protocol):
    """What an encoder returns."""

    @property
    def bottleneck(self) -> Tensor:
        """(B, F, ...), any number of spatial axes."""


class Classifier(nn.Module):
    """Logits of labels, without activation.

    Args:
        encoder: Gives features with a `bottleneck`; 2D or 3D.
        num_features: Channels of the bottleneck, F.
        num_labels: Logits, L.
    """

    def __init__(self, encoder: nn.Module, num_features: int, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(num_features, num_labels)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, ...) to (B, L)."""
        features: HasBottleneck = self.encoder(image)
        logits: Tensor = self.head(pooled(features.bottleneck))
        return logits
