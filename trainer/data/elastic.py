"""Elastic deformation of Semantic Genesis: every voxel is read beside itself, smoothly.

Simard et al., 2003; Haghighi et al., "Learning Semantics-enriched Representation via
Self-discovery, Self-classification, and Self-restoration", MICCAI 2020. Departs from their public
code in three points: linear instead of cubic interpolation, and edges repeated instead of zeros,
both where the noise is smoothed and where a voxel is read from outside.

B batch, I J K voxels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from trainer.data import filters


def draw_noise(shape: torch.Size, random: torch.Generator) -> Tensor:
    """Uniform in [-1, 1) for each axis of each voxel of (B, 1, I, J, K), (B, 3, I, J, K)."""
    drawn = torch.rand(shape[0], 3, *shape[2:], generator=random, device=random.device)
    return 2 * drawn - 1


def displacement(noise: Tensor, *, alpha: float, sigma: float) -> Tensor:
    """The noise smoothed by a Gaussian and scaled: voxels along each axis, (B, 3, I, J, K).

    Args:
        noise: (B, 3, I, J, K).
        alpha: Factor after the smoothing; 991 of a deviation of 8 moves a voxel by about four.
        sigma: Deviation of the Gaussian, voxels.
    """
    width = torch.full((1,), sigma, device=noise.device)
    axes = [filters.blur_matrix(n, width) for n in noise.shape[2:]]
    flat = noise.flatten(0, 1)  # (B * 3, I, J, K)
    smooth = filters.along_axes(flat, [m.expand(len(flat), -1, -1) for m in axes])
    return alpha * smooth.reshape(noise.shape)


def deform(views: Tensor, moved: Tensor) -> Tensor:
    """Read each voxel at its own place plus the displacement, trilinear.

        out[b, 0, i, j, k] = views[b, 0, (i, j, k) + moved[b, :, i, j, k]]

    Args:
        views: (B, 1, I, J, K).
        moved: (B, 3, I, J, K), voxels.
    """
    shape = views.shape[2:]
    places = torch.meshgrid(
        *(torch.arange(n, device=views.device, dtype=views.dtype) for n in shape), indexing="ij"
    )
    # `grid_sample` wants the last axis first, and -1 and 1 on the outer voxels' centres.
    at = [
        2 * (place + moved[:, axis]) / max(n - 1, 1) - 1
        for axis, (place, n) in enumerate(zip(places, shape, strict=True))
    ]
    grid = torch.stack(at[::-1], dim=-1)  # (B, I, J, K, 3)
    return F.grid_sample(views, grid, padding_mode="border", align_corners=True)
