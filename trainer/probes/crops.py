"""Crops worth asking about.

N crops, I J K voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.resident import Resident, Size

_CANDIDATES = 4


def lively_crops(volumes: Resident, which: Tensor, size: Size, random: torch.Generator) -> Tensor:
    """A crop of each volume named, the most varied of four drawn there.

    Most of a scan is air or table, where nothing tells up from down.

    Args:
        volumes: At least as large as the crops.
        which: Volumes, (N,); one may be named several times.
        size: Of the crops.
        random: Draws places.

    Returns:
        Float32 (N, 1, I, J, K) on the host.
    """
    room = volumes.shapes[which] - torch.tensor(size) + 1  # (N, 3)
    drawn = []
    for _ in range(_CANDIDATES):
        start = (torch.rand(len(which), 3, generator=random) * room).long()
        drawn.append(volumes.crop(which, start, size).float().cpu())
    crops = torch.stack(drawn)  # (candidates, N, I, J, K)
    best = crops.flatten(2).std(dim=2).argmax(dim=0)  # (N,)
    return crops[best, torch.arange(len(which))][:, None]
