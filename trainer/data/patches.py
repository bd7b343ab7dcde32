"""Cutting a batch out of resident volumes, and moving it as drawn.

B samples, C channels, I J K voxels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.cache import Case
from trainer.data.resident import Resident, Size


def resident_channels(
    cases: Sequence[tuple[Case, ...]], at_least: Size, device: torch.device
) -> list[Resident]:
    """The scans' images on the device, one layout for each channel; all have the same extents."""
    return [
        Resident.of(
            [case.image for case in channel],
            fill=[case.background for case in channel],
            at_least=at_least,
            device=device,
        )
        for channel in zip(*cases, strict=True)
    ]


def cut(channels: Sequence[Resident], volume: Tensor, start: Tensor, size: Size) -> Tensor:
    """One patch a sample from every channel, float32 (B, C, I, J, K); arguments as in `crop`."""
    return torch.stack([c.crop(volume, start, size) for c in channels], dim=1).float()


def flipped(patches: Tensor, flips: Tensor) -> Tensor:
    """Flip each sample's last three axes where `flips` (B, 3) says so, (B, ..., I, J, K)."""
    for axis in range(3):
        flip = _per_sample(flips[:, axis], patches)
        patches = torch.where(flip, patches.flip(axis - 3), patches)
    return patches


def turned(patches: Tensor, turns: Tensor) -> Tensor:
    """Turn each sample by quarter turns (B,) as `np.rot90` does in the IJ plane, I == J."""
    out = patches
    for quarter in (1, 2, 3):
        is_turned = _per_sample(turns == quarter, patches)
        out = torch.where(is_turned, patches.rot90(quarter, dims=(-3, -2)), out)
    return out


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
