"""PCRLv2's corruption: blur, noise, gamma, and patches that change places.

B batch, I J K voxels, P patches of the aligned grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.recipe import PcrlV2
from trainer.data.filters import along_axes, blur_matrix
from trainer.data.resident import Size
from trainer.data.to_device import to_device


@dataclass(frozen=True, slots=True)
class Degradation:
    """What was drawn for a batch.

    Attributes:
        sigma: Of the blur along each axis, voxels (B, 3).
        noise_std: Of Gaussian noise, (B,).
        log_gamma: (B,).
        order: Which patch each place shows, int64 (B, P).
    """

    sigma: Tensor
    noise_std: Tensor
    log_gamma: Tensor
    order: Tensor


def draw(
    spec: PcrlV2, max_sigma: float, shape: Size, batch_size: int, random: torch.Generator
) -> Degradation:
    """Numbers of one batch of views (I, J, K); a patch takes part in one swap at most."""
    num_patches = 1
    for extent, patch in zip(shape, spec.swap_patch, strict=True):
        num_patches *= extent // patch
    num_swaps = min(spec.num_swaps, num_patches // 2)
    shuffled = torch.rand(batch_size, num_patches, generator=random).argsort(dim=1)
    one, other = shuffled[:, :num_swaps], shuffled[:, num_swaps : 2 * num_swaps]
    order = torch.arange(num_patches).repeat(batch_size, 1)
    order.scatter_(1, one, other).scatter_(1, other, one)
    u = torch.rand(batch_size, 5, generator=random)
    return Degradation(
        sigma=u[:, :3] * max_sigma,
        noise_std=u[:, 3] * spec.max_noise_std,
        log_gamma=(2 * u[:, 4] - 1) * spec.max_log_gamma,
        order=order,
    )


def degrade(view: Tensor, drawn: Degradation, patch: Size, random: torch.Generator) -> Tensor:
    """Blur, add noise, bend by gamma, swap patches, in this order.

    Args:
        view: Clean, (B, 1, I, J, K).
        drawn: By `draw`.
        patch: Extent of a patch; divides the view's.
        random: On the view's device, for the noise.
    """
    sigma, std, log_gamma, order = (
        to_device(x, view.device)
        for x in (drawn.sigma, drawn.noise_std, drawn.log_gamma, drawn.order)
    )
    matrices = [blur_matrix(n, sigma[:, axis]) for axis, n in enumerate(view.shape[2:])]
    x = along_axes(view[:, 0], matrices)
    noise = torch.randn(x.shape, generator=random, device=x.device)
    x = x + noise * std[:, None, None, None]
    # Below zero the power of a size, as z-scores and noise are.
    x = x.sign() * x.abs().pow(log_gamma.exp()[:, None, None, None])
    return swap_patches(x, order, patch)[:, None]


def swap_patches(x: Tensor, order: Tensor, patch: Size) -> Tensor:
    """Place p of the aligned grid shows patch order[p], (B, I, J, K); patches count K fastest."""
    batch, *shape = x.shape
    counts = [extent // size for extent, size in zip(shape, patch, strict=True)]
    split = x.reshape(batch, counts[0], patch[0], counts[1], patch[1], counts[2], patch[2])
    patches = split.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, *patch)
    sample = torch.arange(batch, device=x.device)[:, None]
    moved = patches[sample, order].reshape(batch, *counts, *patch)
    return moved.permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape)
