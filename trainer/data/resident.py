"""All volumes of a run in one flat tensor, so that any crops are one gather.

The tensor lies on the device, or in host memory where the device is too small for it; then the
crops are gathered on the host and sent.

B crops, I J K voxels of a crop, V volumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.to_device import to_device

Size = tuple[int, int, int]

RESIDENT_SHARE = 0.5
"""Of the device's free memory, how much volumes may take; the rest is for the training."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Volumes padded to at least the largest crop, laid one after another.

    Attributes:
        flat: Voxels of all volumes, (sum of sizes,), on the device or on the host.
        offsets: Where each volume starts, (V,).
        shapes: Padded extent of each volume, (V, 3).
        margins: Voxels of padding before each volume's first voxel, (V, 3).
        device: Where crops are wanted.
    """

    flat: Tensor
    offsets: Tensor
    shapes: Tensor
    margins: Tensor
    device: torch.device

    @classmethod
    def of(
        cls,
        volumes: Sequence[NDArray[np.float16] | NDArray[np.uint8]],
        *,
        fill: Sequence[float],
        at_least: Size,
        device: torch.device,
    ) -> Resident:
        """Lay out volumes (I, J, K), each padded evenly with its own `fill` (bug B6)."""
        parts, shapes, margins = [], [], []
        for volume, value in zip(volumes, fill, strict=True):
            missing = [
                max(0, least - have) for least, have in zip(at_least, volume.shape, strict=True)
            ]
            pads = [(gap // 2, gap - gap // 2) for gap in missing]
            padded = np.pad(volume, pads, constant_values=volume.dtype.type(value))
            parts.append(torch.from_numpy(padded.reshape(-1)))
            shapes.append(padded.shape)
            margins.append([before for before, _ in pads])
        sizes = torch.tensor([part.numel() for part in parts])
        flat = torch.cat(parts)
        return cls(
            flat=flat.to(device) if fits(flat.nbytes, free_bytes(device)) else flat,
            offsets=torch.cumsum(sizes, 0) - sizes,
            shapes=torch.tensor(shapes),
            margins=torch.tensor(margins),
            device=device,
        )

    def on_host(self) -> Iterator[NDArray[Any]]:
        """Each padded volume in turn, (I, J, K)."""
        for offset, shape in zip(self.offsets.tolist(), self.shapes.tolist(), strict=True):
            end = offset + int(np.prod(shape))
            yield self.flat[offset:end].cpu().numpy().reshape(shape)

    def crop(self, volume: Tensor, start: Tensor, size: Size) -> Tensor:
        """Cut one crop a sample.

        Args:
            volume: Index of each sample's volume, int64 (B,) on the host.
            start: First voxel of each crop on the padded grid, int64 (B, 3) on the host.
            size: Extent of every crop.

        Returns:
            (B, I, J, K) on the device, in the volumes' type.
        """
        shape = self.shapes[volume]  # (B, 3)
        stride_i = shape[:, 1] * shape[:, 2]
        stride_j = shape[:, 2]
        i, j = (start[:, a, None] + torch.arange(size[a]) for a in range(2))  # (B, size)
        row = self.offsets[volume, None] + i * stride_i[:, None]  # (B, I)
        line = row[:, :, None] + (j * stride_j[:, None])[:, None, :]  # (B, I, J)
        first = to_device(line + start[:, 2, None, None], self.flat.device)
        # One index a line of K voxels: an index a voxel took ten times as long on a CPU.
        lines = self.flat.unfold(0, size[2], 1)
        crops = lines.index_select(0, first.reshape(-1)).reshape(len(start), *size)
        return to_device(crops, self.device)


def fits(needed_bytes: int, free: int | None) -> bool:
    """Whether volumes of this size go onto a device with so much free memory; None is no limit."""
    return free is None or needed_bytes <= RESIDENT_SHARE * free


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None for the host, where the volumes are anyway."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
