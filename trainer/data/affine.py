"""Rotation about all three axes and scaling of views, about their centre.

Voxels count as cubes whatever their spacing, as in TorchIO's RandomAffine on an array. What comes
in from outside is each sample's minimum, as there.

B batch, I J K voxels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor


def rotate_and_scale(x: Tensor, angles: Tensor, scales: Tensor) -> Tensor:
    """Scale (B, I, J, K) along its axes, then turn it about I, J and K in this order, trilinear.

        for each output voxel p, as an offset from the centre:
            out[p] = x[R^-1 p / scales], with R = R_K R_J R_I

    A turn about K alone is `augment.rotate_in_plane`. Departs from TorchIO in the order of the
    turns, which for angles of equal and symmetric range changes the distribution only in the second
    order.

    Args:
        x: (B, I, J, K).
        angles: About I, J and K in radians, (B, 3).
        scales: Of the content along I, J and K, (B, 3); a negative one flips the axis too.
    """
    floor = x.amin(dim=(1, 2, 3), keepdim=True)
    about_i, about_j, about_k = (
        _turn(angles[:, axis], plane) for axis, plane in enumerate(((1, 2), (2, 0), (0, 1)))
    )
    back = (about_k @ about_j @ about_i).mT / scales[:, :, None]  # from output to input offsets
    half = torch.tensor(x.shape[1:], device=x.device, dtype=x.dtype) / 2
    back = back * half[None, None, :] / half[None, :, None]  # in units of half an extent
    matrix = F.pad(back.flip(1, 2), (0, 1))  # torch's order is K, J, I
    grid = F.affine_grid(matrix, [len(x), 1, *x.shape[1:]], align_corners=False)
    moved = F.grid_sample((x - floor)[:, None], grid, mode="bilinear", align_corners=False)
    return moved[:, 0] + floor


def _turn(angle: Tensor, plane: tuple[int, int]) -> Tensor:
    """Rotation matrices (B, 3, 3) that take the plane's first axis towards its second."""
    first, second = plane
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.eye(3, device=angle.device, dtype=angle.dtype).repeat(len(angle), 1, 1)
    matrix[:, first, first] = cos
    matrix[:, second, second] = cos
    matrix[:, second, first] = sin
    matrix[:, first, second] = -sin
    return matrix
