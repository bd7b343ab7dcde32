"""Batch norm over the batch of all ranks, so that several processes normalise as one would.

Not torch's SyncBatchNorm: that one exists on CUDA alone, and makes the host wait for the device in
every layer (it counts the ranks with an empty batch).

R ranks, B samples of each, C channels, N = R B voxels for each channel in all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class JoinedBatchNorm(_BatchNorm):
    """Batch norm in training, its mean and variance those of the joined batch.

    Every rank brings a batch of the same shape, and is left with the same running statistics.
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...), in the type of `x`; statistics are float32."""
        assert self.training
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        mean, variance = joined_statistics(x)
        with torch.no_grad():
            count = dist.get_world_size() * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = (variance + self.eps).rsqrt()
        out: Tensor = _Normalise.apply(x, mean, scale, self.weight, self.bias)  # type: ignore[no-untyped-call]  # of torch
        return out

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of spatial axes."""


def join(module: nn.Module) -> None:
    """Replace every batch norm inside `module`; parameters, buffers and names stay."""
    for name, child in list(module.named_children()):
        join(child)
        if isinstance(child, _BatchNorm):
            joined = JoinedBatchNorm(child.num_features, child.eps, child.momentum)
            joined.weight, joined.bias = child.weight, child.bias
            joined.running_mean, joined.running_var = child.running_mean, child.running_var
            joined.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, joined.train(child.training))


@torch.no_grad()
def joined_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by N) of each channel over all ranks, float32 (C,) each.

    The variance of the whole is the mean of the ranks' variances and the variance of their means:
    no difference of large squares.
    """
    variance, mean = torch.var_mean(x.float(), dim=_others(x), correction=0)
    ours = torch.stack([mean, variance])
    gathered = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, ours)
    means, variances = torch.stack(gathered).unbind(dim=1)  # (R, C)
    mean = means.mean(dim=0)
    return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0)


class _Normalise(torch.autograd.Function):
    """weight * (x - mean) * scale + bias, the statistics depending on every rank's `x`.

    With L the sum of all ranks' losses and n = (x - mean) * scale,
    dL/dx = weight * scale * (g - mean of g - n * mean of (g * n)), g = dL/dout, means over all N.
    The gradients of weight and bias are this rank's share, for DistributedDataParallel to sum.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - `apply` passes them by position
        ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, mean, scale, weight)
        slope = scale * weight
        shift = bias - mean * slope
        return (x * _by_channel(slope, x) + _by_channel(shift, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight = ctx.saved_tensors
        gradient = gradients[0].float()
        normalised = (x - _by_channel(mean, x)) * _by_channel(scale, x)
        of_bias = gradient.sum(dim=_others(x))
        of_weight = (gradient * normalised).sum(dim=_others(x))
        means = torch.stack([of_bias, of_weight])
        dist.all_reduce(means)
        means /= dist.get_world_size() * x.numel() // x.shape[1]
        centred = gradient - _by_channel(means[0], x) - normalised * _by_channel(means[1], x)
        of_x = centred * _by_channel(scale * weight, x)
        return of_x.to(x.dtype), None, None, of_weight, of_bias


def _others(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _by_channel(value: Tensor, like: Tensor) -> Tensor:
    """(C,) against (B, C, ...)."""
    return value.reshape(-1, *[1] * (like.dim() - 2))
