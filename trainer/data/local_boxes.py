"""PCRLv2's local crops: small boxes inside the box around two global ones.

B samples, L locals of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.resident import Size
from trainer.data.sampling import Pairs


def draw_locals(
    pairs: Pairs,
    crop_sizes: tuple[Size, ...],
    local_sizes: tuple[Size, ...],
    shapes: Tensor,
    *,
    num_locals: int,
    margin: int,
    random: torch.Generator,
) -> Pairs:
    """A box of a random local size at a uniform place, local after local: (L * B).

    It may leave the union's box by `margin`, but not the volume; a box larger than that room is in
    its middle.

    Args:
        pairs: The global boxes, (B,).
        crop_sizes: What their sizes count in.
        local_sizes: What the sizes of the result count in, none larger than a volume.
        shapes: Padded extents of the volumes, (V, 3).
        num_locals: L.
        margin: Voxels.
        random: Of the host.

    Returns:
        Boxes as pairs whose both members are the local one.
    """
    extents = torch.tensor(crop_sizes)[pairs.size]  # (B, 2, 3)
    low = (pairs.start.amin(dim=1) - margin).repeat(num_locals, 1)
    high = ((pairs.start + extents).amax(dim=1) + margin).repeat(num_locals, 1)
    volume = pairs.volume.repeat(num_locals)
    size = torch.randint(len(local_sizes), (len(volume),), generator=random)
    extent = torch.tensor(local_sizes)[size]  # (L * B, 3)
    low, high = low.clamp(min=0), torch.minimum(high, shapes[volume])
    room = high - low - extent
    u = torch.rand(len(volume), 3, generator=random, dtype=torch.float64)
    inside = low + (u * (room.clamp(min=0) + 1)).long()
    middle = low + room.div(2, rounding_mode="floor")
    start = torch.where(room >= 0, inside, middle).clamp(min=0)
    start = torch.minimum(start, shapes[volume] - extent)
    return Pairs(volume, size[:, None].repeat(1, 2), start[:, None].repeat(1, 2, 1))
