"""An encoder without a decoder, its keys those of the U-Net: what contrast and its like train."""

from __future__ import annotations

from torch import Tensor, nn

from models.networks.resnet_unet2d import Features2d, ResNet18Encoder
from models.networks.unet3d import Features, UNet3dEncoder


class EncoderAlone(nn.Module):
    """The encoder as the one part of a network."""

    def __init__(self, encoder: UNet3dEncoder | ResNet18Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Features | Features2d:
        """What the encoder sees."""
        features: Features | Features2d = self.encoder(image)
        return features
