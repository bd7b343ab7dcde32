"""A transposed convolution and the convolution after it, as one operation.

The U-Net's decoder doubles its tensor with a transposed convolution (kernel 2, stride 2) and
convolves the result, with nothing between the two: no normalisation, no activation. Both are
linear, so together they are one transposed convolution of kernel 4, stride 2, padding 1 on the
low-resolution tensor: 8 taps for an output voxel instead of 1 + 27, and the doubled tensor is never
built. Exact but for rounding, at the borders too: the bias of the transposed convolution is
zero outside the volume, which a channel of ones reproduces.

Two forms of the same weights: `transposed` is one `conv_transpose3d`; `windows` one convolution of
kernel 2 that computes the eight output parities as channels, which onnxruntime runs faster on a
CPU (docs/performance.md).

Along an axis, low-resolution voxel i reaches doubled voxel 2 i + q (q in 0..1) and from there
output o = 2 i + q + 1 - d (d in 0..2); its tap of the composed kernel is o - 2 i + 1 = q + 2 - d.

B batch, C in, M between, O out channels, I J K voxels of the low-resolution tensor.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

Form = Literal["transposed", "windows"]


def composed_kernel(up_weight: Tensor, conv_weight: Tensor) -> Tensor:
    """The kernel of both convolutions together, float32 whatever the autocast.

        for each pair (q, d) on each of the three axes:
            kernel[c, o, q + 2 - d] += sum over m of up_weight[c, m, q] * conv_weight[o, m, d]

    Args:
        up_weight: Of the transposed convolution, (C, M, 2, 2, 2).
        conv_weight: Of the convolution after it, (O, M, 3, 3, 3).

    Returns:
        Weight for `conv_transpose3d(stride=2, padding=1)`, (C, O, 4, 4, 4).
    """
    channels, middle = up_weight.shape[:2]
    out_channels = conv_weight.shape[0]
    with torch.autocast(up_weight.device.type, enabled=False):
        left = up_weight.permute(0, 2, 3, 4, 1).reshape(channels * 8, middle)
        right = conv_weight.permute(1, 0, 2, 3, 4).reshape(middle, out_channels * 27)
        pairs = (left @ right).reshape(channels, 2, 2, 2, out_channels, 3, 3, 3)
        place = _places(pairs)
        kernel = torch.einsum("cqrsoxyz,uqx->crsoyzu", pairs, place)
        kernel = torch.einsum("crsoyzu,vry->csozuv", kernel, place)
        return torch.einsum("csozuv,wsz->couvw", kernel, place)


def bias_kernel(up_bias: Tensor, conv_weight: Tensor) -> Tensor:
    """What the transposed convolution's bias becomes: a kernel for one channel of ones.

    Args:
        up_bias: (M,).
        conv_weight: (O, M, 3, 3, 3).

    Returns:
        (1, O, 4, 4, 4).
    """
    everywhere = up_bias[None, :, None, None, None].expand(-1, -1, 2, 2, 2)
    return composed_kernel(everywhere, conv_weight)


def fused_up(x: Tensor, kernel: Tensor, bias: Tensor, form: Form = "transposed") -> Tensor:
    """Double and convolve.

    Args:
        x: (B, C, I, J, K).
        kernel: `composed_kernel`, or `as_windows` of it for that form.
        bias: `bias_kernel`, in the same form.
        form: Which of the two equal computations.

    Returns:
        (B, O, 2 I, 2 J, 2 K).
    """
    ones = torch.ones_like(x[:1, :1])
    if form == "transposed":
        doubled = F.conv_transpose3d(x, kernel, stride=2, padding=1)
        return doubled + F.conv_transpose3d(ones, bias, stride=2, padding=1)
    return _interleave(F.conv3d(x, kernel, padding=1) + F.conv3d(ones, bias, padding=1))


def as_windows(kernel: Tensor) -> Tensor:
    """A composed kernel as the weight of `conv3d(padding=1)`.

    Window m along an axis lies between low-resolution voxels m - 1 and m and makes output voxels
    2 m - 1 (taps 2 and 0 of the kernel) and 2 m (taps 3 and 1).

    Args:
        kernel: (C, O, 4, 4, 4).

    Returns:
        (8 O, C, 2, 2, 2), the parities in front, (2, 2, 2, O).
    """
    channels, out_channels = kernel.shape[:2]
    split = kernel.reshape(channels, out_channels, 2, 2, 2, 2, 2, 2).flip(2, 4, 6)
    parity_first = split.permute(3, 5, 7, 1, 0, 2, 4, 6)
    return parity_first.reshape(8 * out_channels, channels, 2, 2, 2).contiguous()


def _interleave(windows: Tensor) -> Tensor:
    """(B, 8 O, I + 1, J + 1, K + 1) to (B, O, 2 I, 2 J, 2 K)."""
    batch, channels, i, j, k = windows.shape
    out = channels // 8
    parts = windows.reshape(batch, 2, 2, 2, out, i, j, k).permute(0, 4, 5, 1, 6, 2, 7, 3)
    whole = parts.reshape(batch, out, 2 * i, 2 * j, 2 * k)
    return whole[:, :, 1:-1, 1:-1, 1:-1]  # voxels -1 and 2 I lie outside


def _places(like: Tensor) -> Tensor:
    """Which tap a pair (q, d) adds to, (4, 2, 3) of zeros and ones."""
    tap = torch.arange(4, device=like.device)[:, None, None]
    q = torch.arange(2, device=like.device)[None, :, None]
    d = torch.arange(3, device=like.device)[None, None, :]
    return (tap == q + 2 - d).to(like)
