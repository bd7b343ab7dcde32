"""What pretraining puts on the bottleneck: the projector and PCRL's attention.

None of it is exported; the served embedding is the pooled bottleneck. The same heads serve 3D and
2D bottlenecks, (B, C, I, J, K) and (B, C, R, C'), below: (B, C, ...).

B batch, C channels of the bottleneck, E embedding, T indicators, R C' rows and columns.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from models.networks.unet3d import pooled

NUM_INDICATORS = 7
"""Flips along I, J, K, then quarter turns 0, 90, 180, 270 degrees in the IJ plane (Fig. 3)."""

NUM_INDICATORS_2D = 6
"""Flips along rows and columns, then quarter turns."""

Attention = Literal["outer", "se"]


class Projector(nn.Module):
    """Pooled bottleneck to a unit-length embedding: C -> E -> ReLU -> E, g of the paper's Eq. 7."""

    def __init__(self, channels: int, embedding_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, embedding_size)
        self.fc2 = nn.Linear(embedding_size, embedding_size)

    def forward(self, bottleneck: Tensor) -> Tensor:
        """Embed (B, C, ...) as (B, E) in float32, whatever precision the network runs in."""
        projected = self.fc2(torch.relu(self.fc1(pooled(bottleneck))))
        return F.normalize(projected.float(), dim=1)


class TransAttention(nn.Module):
    """Transformation-conditioned attention (paper section 3.1).

    Scales every channel by a gate that knows which transformation the decoder must reproduce,
    then convolves (Eq. 4).

    Args:
        channels: Channels of the bottleneck, C.
        kind: `outer` is the paper's Eq. 1-3; `se` the official code's squeeze-and-excitation.
        rank: Of the bilinear map of `outer`; None is the full C x C x C map.
        post_conv: Whether the convolution of Eq. 4, 3 pixels along each axis, follows.
        num_indicators: Length of the indicator vector, T.
        dims: Axes of the bottleneck, for that convolution.
    """

    def __init__(
        self,
        channels: int,
        *,
        kind: Attention = "outer",
        rank: int | None = None,
        post_conv: bool = True,
        num_indicators: int = NUM_INDICATORS,
        dims: Literal[2, 3] = 3,
    ) -> None:
        super().__init__()
        self.gate: nn.Module = (
            OuterGate(channels, rank, num_indicators)
            if kind == "outer"
            else SqueezeGate(channels, num_indicators)
        )
        convolution = nn.Conv3d if dims == 3 else nn.Conv2d
        self.post_conv: nn.Module = (
            convolution(channels, channels, kernel_size=3, padding=1)
            if post_conv
            else nn.Identity()
        )

    def forward(self, bottleneck: Tensor, indicator: Tensor) -> Tensor:
        """F^(l+1) of Eq. 4, (B, C, ...), from F^l and the indicator vectors (B, T)."""
        gate = self.gate(bottleneck, indicator)  # (B, C)
        everywhere = gate.reshape(*gate.shape, *[1] * (bottleneck.ndim - 2))
        out: Tensor = self.post_conv(bottleneck * everywhere)
        return out


class SqueezeGate(nn.Module):
    """sigmoid(FC(ReLU(FC(vec T)))), which does not look at the features."""

    def __init__(self, channels: int, num_indicators: int = NUM_INDICATORS) -> None:
        super().__init__()
        self.condition = _condition(channels, num_indicators)

    def forward(self, bottleneck: Tensor, indicator: Tensor) -> Tensor:
        """(B, C) in (0, 1)."""
        return torch.sigmoid(self.condition(indicator)).to(bottleneck.dtype)


class OuterGate(nn.Module):
    """sigmoid(ReLU(W flat(f^p f^l^T))), Eq. 1-3; lies in [0.5, 1).

    The equation read as a bilinear form, so that the outer product M is never built:

        for each sample and output channel c:
            q[c] = sum over a, b of W[c, a, b] * f_p[a] * f_l[b]

    With `rank` r, W[c, a, b] = sum over r of U[c, r] P[r, a] L[r, b]: 3Cr weights for C^3. Departs
    from the paper in a ReLU between the two layers that make f^p, without which they are one.
    """

    def __init__(
        self, channels: int, rank: int | None = None, num_indicators: int = NUM_INDICATORS
    ) -> None:
        super().__init__()
        self.condition = _condition(channels, num_indicators)
        self.bilinear: nn.Module = (
            _FullBilinear(channels) if rank is None else _LowRankBilinear(channels, rank)
        )

    def forward(self, bottleneck: Tensor, indicator: Tensor) -> Tensor:
        """(B, C) in [0.5, 1)."""
        f_p = self.condition(indicator)  # (B, C)
        f_l = pooled(bottleneck)  # (B, C)
        return torch.sigmoid(torch.relu(self.bilinear(f_p, f_l)))


class _FullBilinear(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, channels))  # (C, C_p, C_l)
        # The bound of a linear layer with C^2 inputs, which this is.
        nn.init.uniform_(self.weight, -1.0 / channels, 1.0 / channels)

    def forward(self, f_p: Tensor, f_l: Tensor) -> Tensor:
        channels = f_l.shape[1]
        by_pair = f_l @ self.weight.reshape(channels * channels, channels).T  # (B, C * C_p)
        out: Tensor = (by_pair.reshape(-1, channels, channels) @ f_p[:, :, None])[:, :, 0]
        return out


class _LowRankBilinear(nn.Module):
    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.of_p = nn.Linear(channels, rank, bias=False)
        self.of_l = nn.Linear(channels, rank, bias=False)
        self.out = nn.Linear(rank, channels, bias=False)

    def forward(self, f_p: Tensor, f_l: Tensor) -> Tensor:
        out: Tensor = self.out(self.of_p(f_p) * self.of_l(f_l))
        return out


def _condition(channels: int, num_indicators: int) -> nn.Sequential:
    hidden = max(channels // 2, 1)
    return nn.Sequential(nn.Linear(num_indicators, hidden), nn.ReLU(), nn.Linear(hidden, channels))
