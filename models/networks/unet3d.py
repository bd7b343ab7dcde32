"""The 3D U-Net that PCRL trains, at any base width.

The layers of Models Genesis' network (Zhou et al., 2019), which the paper (section 4.3) takes over;
`base_width` 32 is the paper's. Every convolution is 3x3x3 with bias, followed by normalisation and
ReLU. Modules keep no activations: each `forward` is a pure function of its arguments.

With `fused`, the decoder computes the same function of the same parameters with a third fewer
operations (`fused_up`); `fold` bakes that into the weights for the export.

B batch, C channels, W base width, I J K voxels. I, J and K are multiples of `STRIDE`.
"""

from __future__ import annotations

import copy
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from models.networks import fused_up
from models.networks.fused_up import Form

Norm = Literal["batch", "group"]

STRIDE = 8
"""Voxels of input an axis needs a multiple of: three poolings by two."""

MAX_GROUPS = 8


class Features(NamedTuple):
    """What the encoder sees, from fine to coarse; named as in the paper's code at width 32."""

    skip64: Tensor
    """(B, 2W, I, J, K)."""
    skip128: Tensor
    """(B, 4W, I/2, J/2, K/2)."""
    skip256: Tensor
    """(B, 8W, I/4, J/4, K/4)."""
    bottleneck: Tensor
    """(B, 16W, I/8, J/8, K/8); F^l of the paper."""


class UNet3dEncoder(nn.Module):
    """Four levels of two convolutions with max pooling between them.

    Args:
        in_channels: Channels of the image.
        base_width: Channels of the first convolution, W.
        norm: Batch norm (pretraining) or group norm (fine-tuning).
    """

    def __init__(self, in_channels: int = 1, base_width: int = 32, norm: Norm = "batch") -> None:
        super().__init__()
        w = base_width
        self.down64 = _Level(in_channels, w, 2 * w, norm)
        self.down128 = _Level(2 * w, 2 * w, 4 * w, norm)
        self.down256 = _Level(4 * w, 4 * w, 8 * w, norm)
        self.down512 = _Level(8 * w, 8 * w, 16 * w, norm)
        self.pool = nn.MaxPool3d(2)

    def forward(self, image: Tensor) -> Features:
        """Encode (B, C, I, J, K)."""
        skip64 = self.down64(image)
        skip128 = self.down128(self.pool(skip64))
        skip256 = self.down256(self.pool(skip128))
        bottleneck = self.down512(self.pool(skip256))
        return Features(skip64, skip128, skip256, bottleneck)


class SkipResponses(NamedTuple):
    """What the first convolution of each decoder level makes of its skip, without bias.

    Linear in the skips, so the response to a mix of skips is the mix of their responses.
    """

    at256: Tensor
    """(B, 8W, I/4, J/4, K/4)."""
    at128: Tensor
    """(B, 4W, I/2, J/2, K/2)."""
    at64: Tensor
    """(B, 2W, I, J, K)."""


class UNet3dDecoder(nn.Module):
    """Three levels of transposed convolution, concatenation with the skip, two convolutions."""

    def __init__(
        self, base_width: int = 32, norm: Norm = "batch", *, fused: bool = True, skip: bool = True
    ) -> None:
        super().__init__()
        w = base_width
        self.up256 = _UpLevel(16 * w, 8 * w, norm, fused=fused, skip=skip)
        self.up128 = _UpLevel(8 * w, 4 * w, norm, fused=fused, skip=skip)
        self.up64 = _UpLevel(4 * w, 2 * w, norm, fused=fused, skip=skip)

    def forward(self, features: Features) -> Tensor:
        """Decode to the resolution of the image, (B, 2W, I, J, K)."""
        decoded = self.up256(features.bottleneck, features.skip256)
        decoded = self.up128(decoded, features.skip128)
        up64: Tensor = self.up64(decoded, features.skip64)
        return up64

    def skip_responses(self, features: Features) -> SkipResponses:
        """The skips' share of every level, to decode several mixes of them (algorithms.md 6.4)."""
        return SkipResponses(
            self.up256.skip_response(features.skip256),
            self.up128.skip_response(features.skip128),
            self.up64.skip_response(features.skip64),
        )

    def decode(self, bottleneck: Tensor, responses: SkipResponses) -> Tensor:
        """What `forward` gives for the skips behind the responses, (B, 2W, I, J, K)."""
        decoded = self.up256.finish(bottleneck, responses.at256)
        decoded = self.up128.finish(decoded, responses.at128)
        return self.up64.finish(decoded, responses.at64)


class UNet3d(nn.Module):
    """Encoder, decoder and a 1x1x1 convolution; the output has no activation.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output: 1 to reconstruct, 1 + number of labels to segment.
        base_width: Channels of the first convolution, W.
        norm: Batch norm (pretraining) or group norm (fine-tuning).
        fused: Whether the decoder computes its up-convolutions fused; changes no parameter.
        skip: Whether the decoder sees the encoder's skips. Without, the first convolution of each
            level reads the doubled tensor alone and is that much smaller.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        base_width: int = 32,
        norm: Norm = "batch",
        *,
        fused: bool = True,
        skip: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = UNet3dEncoder(in_channels, base_width, norm)
        self.decoder = UNet3dDecoder(base_width, norm, fused=fused, skip=skip)
        self.out = nn.Conv3d(2 * base_width, out_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, in_channels, I, J, K) to (B, out_channels, I, J, K)."""
        out: Tensor = self.out(self.decoder(self.encoder(image)))
        return out


def fold(network: UNet3d, form: Form = "windows") -> UNet3d:
    """A copy for inference, its fused kernels computed once and for all.

    Args:
        network: Any U-Net, fused or not; not changed.
        form: Which computation of the doubling; `windows` is the faster one in onnxruntime.

    Returns:
        A network of the same function, whose `state_dict` is another.
    """
    folded = copy.deepcopy(network)
    for name, level in list(folded.decoder.named_children()):
        assert isinstance(level, _UpLevel)
        setattr(folded.decoder, name, _FoldedUpLevel(level, form))
    return folded


def pooled(bottleneck: Tensor) -> Tensor:
    """Global average pooling, (B, C, ...) to (B, C), in 3D and in 2D.

    A plain mean: the backward pass of adaptive pooling is not deterministic on CUDA.
    """
    return bottleneck.mean(dim=tuple(range(2, bottleneck.ndim)))


class _ConvNormReLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = _make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class _Level(nn.Module):
    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.first = _ConvNormReLU(in_channels, mid_channels, norm)
        self.second = _ConvNormReLU(mid_channels, out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


class _UpLevel(nn.Module):
    """Double, join with the skip if the decoder has skips, convolve twice.

    Attributes:
        form: How the fused doubling is computed.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        norm: Norm,
        *,
        fused: bool = True,
        skip: bool = True,
    ) -> None:
        super().__init__()
        joined_channels = in_channels + skip_channels if skip else in_channels
        self.up = nn.ConvTranspose3d(in_channels, in_channels, kernel_size=2, stride=2)
        self.convs = _Level(joined_channels, skip_channels, skip_channels, norm)
        self.fused = fused
        self.skip = skip
        self.form: Form = "transposed"

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.fused:
            return self.finish(x, self.skip_response(skip) if self.skip else None)
        doubled = self.up(x)
        joined = torch.cat([doubled, skip], dim=1) if self.skip else doubled
        out: Tensor = self.convs(joined)
        return out

    def skip_response(self, skip: Tensor) -> Tensor:
        """The first convolution of the skip alone, without bias."""
        _, of_skip = self._halves()
        return F.conv3d(skip, of_skip, padding=1)

    def finish(self, x: Tensor, response: Tensor | None) -> Tensor:
        """The level's output, given the skip's response; None without skips."""
        kernel, bias = self._fused_kernels()
        joined = fused_up.fused_up(x, kernel, bias, self.form)
        if response is not None:
            joined = joined + response
        conv_bias = self.convs.first.conv.bias
        assert conv_bias is not None
        joined = joined + conv_bias.to(joined.dtype)[:, None, None, None]
        out: Tensor = self.convs.second(torch.relu(self.convs.first.norm(joined)))
        return out

    def _halves(self) -> tuple[Tensor, Tensor]:
        """The first convolution's weight: what reads the doubled tensor, what reads the skip."""
        weight, middle = self.convs.first.conv.weight, self.up.out_channels
        return weight[:, :middle], weight[:, middle:]

    def _fused_kernels(self) -> tuple[Tensor, Tensor]:
        of_up, _ = self._halves()
        assert self.up.bias is not None
        kernel = fused_up.composed_kernel(self.up.weight, of_up)
        bias = fused_up.bias_kernel(self.up.bias, of_up)
        if self.form == "windows":
            return fused_up.as_windows(kernel), fused_up.as_windows(bias)
        return kernel, bias


class _FoldedUpLevel(_UpLevel):
    """A level whose kernels are constants: faster, and no longer trainable."""

    kernel: Tensor
    bias: Tensor
    of_skip: Tensor

    def __init__(self, level: _UpLevel, form: Form) -> None:
        nn.Module.__init__(self)
        self.form, self.fused, self.skip = form, True, level.skip
        self.convs = level.convs
        level.form = form
        with torch.no_grad():
            kernel, bias = level._fused_kernels()
            _, of_skip = level._halves()
        self.register_buffer("kernel", kernel.contiguous())
        self.register_buffer("bias", bias.contiguous())
        self.register_buffer("of_skip", of_skip.contiguous())

    def skip_response(self, skip: Tensor) -> Tensor:
        return F.conv3d(skip, self.of_skip, padding=1)

    def _fused_kernels(self) -> tuple[Tensor, Tensor]:
        return self.kernel, self.bias


def _make_norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm3d(channels)
    # Narrow networks have levels of fewer than eight channels.
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels)
