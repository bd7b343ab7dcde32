"""The 2D U-Net on a ResNet-18 that PCRL trains on radiographs, at any width.

The encoder is ResNet-18 (He et al., 2016) without its classifier; the decoder doubles by repeating
pixels, joins the skip and convolves twice, as in segmentation_models_pytorch, which the paper's
2D code uses (algorithms.md 1.1). `width` 64 is the paper's. The convolutions have no bias, as a
normalisation follows each but the last. Modules keep no activations: each `forward` is a pure
function of its arguments.

B batch, C channels, W width, R C' rows and columns of pixels, multiples of `STRIDE`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from models.networks.unet3d import MAX_GROUPS, Norm

STRIDE = 32
"""Pixels of input an axis needs a multiple of: five halvings."""


class Features2d(NamedTuple):
    """What the encoder sees, from fine to coarse."""

    skip2: Tensor
    """(B, W, R/2, C'/2), before the pooling."""
    skip4: Tensor
    """(B, W, R/4, C'/4)."""
    skip8: Tensor
    """(B, 2W, R/8, C'/8)."""
    skip16: Tensor
    """(B, 4W, R/16, C'/16)."""
    bottleneck: Tensor
    """(B, 8W, R/32, C'/32); F^l of the paper."""


class ResNet18Encoder(nn.Module):
    """A 7x7 convolution, pooling, and four stages of two residual blocks.

    Args:
        in_channels: Channels of the image.
        width: Channels of the first convolution, W.
        norm: Batch norm (pretraining) or group norm (fine-tuning).
    """

    def __init__(self, in_channels: int = 3, width: int = 64, norm: Norm = "batch") -> None:
        super().__init__()
        w = width
        self.stem = _ConvNorm(in_channels, w, norm, kernel=7, stride=2)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage4 = _stage(w, w, norm, stride=1)
        self.stage8 = _stage(w, 2 * w, norm, stride=2)
        self.stage16 = _stage(2 * w, 4 * w, norm, stride=2)
        self.stage32 = _stage(4 * w, 8 * w, norm, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Features2d:
        """Encode (B, C, R, C')."""
        skip2 = torch.relu(self.stem(image))
        skip4 = self.stage4(self.pool(skip2))
        skip8 = self.stage8(skip4)
        skip16 = self.stage16(skip8)
        return Features2d(skip2, skip4, skip8, skip16, self.stage32(skip16))


class UNet2dDecoder(nn.Module):
    """Five levels of doubling, concatenation with the skip (but for the last), two convolutions.

    Without skips the first convolution of each level reads the doubled tensor alone.
    """

    def __init__(self, width: int = 64, norm: Norm = "batch", *, skip: bool = True) -> None:
        super().__init__()
        w, self.has_skips = width, skip
        self.up16 = _UpLevel(8 * w, 4 * w * skip, 4 * w, norm)
        self.up8 = _UpLevel(4 * w, 2 * w * skip, 2 * w, norm)
        self.up4 = _UpLevel(2 * w, w * skip, w, norm)
        self.up2 = _UpLevel(w, w * skip, w // 2, norm)
        self.up1 = _UpLevel(w // 2, 0, w // 4, norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, features: Features2d) -> Tensor:
        """Decode to the resolution of the image, (B, W/4, R, C')."""
        return self.levels(features)[-1]

    def levels(self, features: Features2d) -> list[Tensor]:
        """What each level makes, from coarse to fine: (B, 4W, R/16, C'/16) to (B, W/4, R, C')."""
        up = (self.up16, self.up8, self.up4, self.up2, self.up1)
        skips = (features.skip16, features.skip8, features.skip4, features.skip2, None)
        decoded, made = features.bottleneck, []
        for level, skip in zip(up, skips, strict=True):
            decoded = level(decoded, skip if self.has_skips else None)
            made.append(decoded)
        return made


class ResNetUNet2d(nn.Module):
    """Encoder, decoder and a 3x3 convolution; the output has no activation.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output: `in_channels` to reconstruct.
        width: Channels of the first convolution, W, a multiple of 4.
        norm: Batch norm (pretraining) or group norm (fine-tuning); the keys are the same.
        skip: Whether the decoder sees the encoder's skips.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 64,
        norm: Norm = "batch",
        *,
        skip: bool = True,
    ) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"width {width} must be a multiple of 4")
        self.encoder = ResNet18Encoder(in_channels, width, norm)
        self.decoder = UNet2dDecoder(width, norm, skip=skip)
        self.out = nn.Conv2d(width // 4, out_channels, kernel_size=3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, in_channels, R, C') to (B, out_channels, R, C')."""
        out: Tensor = self.out(self.decoder(self.encoder(image)))
        return out


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of the keys of a foreign state dict.

    Attributes:
        taken: Keys whose values the encoder holds now.
        left: Keys that have no place in it: the classifier, and statistics of batch norm where the
            encoder has group norm.
    """

    taken: tuple[str, ...]
    left: tuple[str, ...]


def load_torchvision_resnet18(encoder: ResNet18Encoder, state_dict: Mapping[str, Tensor]) -> Taken:
    """Copy a ResNet-18 of torchvision (ImageNet) into an encoder of width 64, key by key.

    Args:
        encoder: With 3 input channels; changed in place.
        state_dict: Of `torchvision.models.resnet18`. A count of batches may be missing from it,
            as it is from old files.

    Raises:
        ValueError: A key that the encoder needs is missing, or has another shape. Nothing has been
            copied then.
    """
    own = encoder.state_dict()
    theirs = {ours: _torchvision_name(ours) for ours in own}
    missing = [
        name
        for ours, name in theirs.items()
        if name not in state_dict and not ours.endswith("num_batches_tracked")
    ]
    if missing:
        raise ValueError(f"not a ResNet-18 of torchvision: it has no {', '.join(missing[:3])}")
    found = {ours: name for ours, name in theirs.items() if name in state_dict}
    for ours, name in found.items():
        if state_dict[name].shape != own[ours].shape:
            raise ValueError(
                f"{name} is {tuple(state_dict[name].shape)}, here {tuple(own[ours].shape)}"
            )
    for ours, name in found.items():
        own[ours].copy_(state_dict[name])
    taken = set(found.values())
    return Taken(tuple(sorted(taken)), tuple(sorted(state_dict.keys() - taken)))


_TORCHVISION_MODULES = {
    "stem.conv": "conv1",
    "stem.norm": "bn1",
    "stage4": "layer1",
    "stage8": "layer2",
    "stage16": "layer3",
    "stage32": "layer4",
    "first.conv": "conv1",
    "first.norm": "bn1",
    "second.conv": "conv2",
    "second.norm": "bn2",
    "shortcut.conv": "downsample.0",
    "shortcut.norm": "downsample.1",
}


def _torchvision_name(ours: str) -> str:
    """`stage8.0.first.norm.weight` is `layer2.0.bn1.weight` there."""
    *place, module, kind, tensor = ours.split(".")
    layer = [_TORCHVISION_MODULES.get(part, part) for part in place]
    return ".".join([*layer, _TORCHVISION_MODULES[f"{module}.{kind}"], tensor])


class _ConvNorm(nn.Module):
    """A convolution without bias that keeps the extent (but for its stride), then the norm."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, *, kernel: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.norm = _make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class _Residual(nn.Module):
    """ReLU(second(ReLU(first(x))) + shortcut(x)); the shortcut convolves where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, stride: int) -> None:
        super().__init__()
        self.first = _ConvNorm(in_channels, out_channels, norm, stride=stride)
        self.second = _ConvNorm(out_channels, out_channels, norm)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _ConvNorm(in_channels, out_channels, norm, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.second(torch.relu(self.first(x)))
        return torch.relu(residual + self.shortcut(x))


def _stage(in_channels: int, out_channels: int, norm: Norm, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Residual(in_channels, out_channels, norm, stride),
        _Residual(out_channels, out_channels, norm, 1),
    )


class _UpLevel(nn.Module):
    """Double, join with the skip where there is one, convolve twice."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.first = _ConvNorm(in_channels + skip_channels, out_channels, norm)
        self.second = _ConvNorm(out_channels, out_channels, norm)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
        joined = doubled if skip is None else torch.cat([doubled, skip], dim=1)
        return torch.relu(self.second(torch.relu(self.first(joined))))


def _make_norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    # Narrow networks have levels of fewer than eight channels.
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels)
