"""The questions of the probes: by which angle was it turned, on which side does the other lie.

In 3D both live in the axial plane (axes I and J), so the classes are those of 2D and the two can be
read beside each other. The paper defines its probes in 2D alone; the 3D form is ours.

B images, C channels, S rows and columns (I and J), K slices, P patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

NUM_TURNS = 4
NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""Steps along the two axes of the plane; a class is a place in this list."""

GRID_2D = 14
"""Patches along a side of an image (P, supplement)."""
UPSAMPLED_2D = 96
"""Pixels that a patch of an image is brought to: a ResNet of stride 32 sees 3 x 3 places."""
PATCH_3D = 16
"""Voxels of a cube: the U-Net of stride 8 sees 2 x 2 x 2 places."""
JITTER = 2
"""Pixels or voxels that each patch is moved by at random: edges shall not simply go on."""


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every image in all four orientations.

    Args:
        images: (B, C, S, S) or (B, C, S, S, K).

    Returns:
        Images (4B, ...) and their class (4B,): quarter turns from the first to the second axis.
    """
    every = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(NUM_TURNS)])
    return every, torch.arange(NUM_TURNS).repeat_interleave(len(images))


def area_3d() -> tuple[int, int, int]:
    """Voxels of a crop that holds a cube and its neighbours, jitter included."""
    side = 3 * PATCH_3D + 2 * JITTER
    return side, side, PATCH_3D


def neighbours(images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A patch of every image with each of its eight neighbours.

    In 2D an image is a grid of 14 x 14 patches, of which an inner one is drawn; patches are brought
    to 96 x 96. In 3D the image is a crop of `area_3d`, and the patch its middle. Each patch moves
    by up to `JITTER` (less where patches are small).

    Args:
        images: (B, C, S, S) or (B, C, *area_3d()).
        random: Draws patches and jitter.

    Returns:
        Patches and neighbours (8B, C, ...), and the class of each pair (8B,).
    """
    is_flat = images.ndim == 4
    patch = images.shape[2] // GRID_2D if is_flat else PATCH_3D
    jitter = min(JITTER, patch // 4)
    firsts, seconds = [], []
    for image in images:
        start = JITTER + patch
        corner = torch.tensor([start, start])
        if is_flat:
            corner = patch * torch.randint(1, GRID_2D - 1, (2,), generator=random)
        for step in NEIGHBOURS:
            moves = torch.randint(-jitter, jitter + 1, (2, 2), generator=random)
            firsts.append(_cut(image, corner + moves[0], patch))
            seconds.append(_cut(image, corner + patch * torch.tensor(step) + moves[1], patch))
    pairs = [torch.stack(firsts), torch.stack(seconds)]
    if is_flat:
        size = (UPSAMPLED_2D, UPSAMPLED_2D)
        pairs = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in pairs]
    return pairs[0], pairs[1], torch.arange(len(NEIGHBOURS)).repeat(len(images))


def _cut(image: Tensor, corner: Tensor, patch: int) -> Tensor:
    """(C, P, P, ...) of (C, S, S, ...); the corner is kept inside."""
    at = [min(max(0, int(x)), image.shape[1] - patch) for x in corner]
    return image[:, at[0] : at[0] + patch, at[1] : at[1] + patch]
