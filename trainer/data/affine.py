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
    slices = x.permute(0, 3, 1, 2).contiguous()  # (B, K, I, J), as views lie in memory
    floor = slices.amin(dim=(1, 2, 3), keepdim=True)
    about_i, about_j, about_k = (
        _turn(angles[:, axis], plane) for axis, plane in enumerate(((1, 2), (2, 0), (0, 1)))
    )
    back = (about_k @ about_j @ about_i).mT / scales[:, :, None]  # from output to input offsets
    by_slice = back.roll((1, 1), dims=(1, 2))  # K, I, J; a list of places would wait for the GPU
    moved = _interpolate(slices - floor, by_slice)
    return moved.add_(floor).permute(0, 2, 3, 1)


def _interpolate(x: Tensor, back: Tensor) -> Tensor:
    """x at back @ offset, offsets from the centre in voxels; trilinear, 0 outside.

    What `grid_sample` does, which takes more than twice as long in three dimensions on a CPU.

    Args:
        x: (B, K, I, J), contiguous.
        back: (B, 3, 3).
    """
    batch, *shape = x.shape
    padded = F.pad(x, (1, 2, 1, 2, 1, 2))  # neighbours of every point, also just outside
    num_voxels = padded[0].numel()
    first, shares = torch.zeros((), device=x.device), []
    for axis, n in enumerate(shape):
        at = _positions(back[:, axis], shape) + ((n - 1) / 2 + 1)
        low = at.clamp_(0, n + 1).floor()
        shares.append((at - low).flatten())
        first = first + low * padded.stride(axis + 1)  # exact: far below 2**24
    samples = torch.arange(batch, device=x.device, dtype=torch.int32) * num_voxels
    index = (first.int() + samples[:, None, None, None]).flatten()

    flat = padded.flatten()
    step_k, step_i, _ = padded.stride()[1:]
    share_k, share_i, share_j = shares

    def along_j(offset: int) -> Tensor:
        low, high = (flat[at:].index_select(0, index) for at in (offset, offset + 1))
        return low.lerp_(high, share_j)

    def along_i(offset: int) -> Tensor:
        return along_j(offset).lerp_(along_j(offset + step_i), share_i)

    return along_i(0).lerp_(along_i(step_k), share_k).reshape(x.shape)


def _positions(weights: Tensor, shape: list[int]) -> Tensor:
    """Sum over axes of weight (B, 3) times offset from the centre, (B, *shape)."""
    a, b, c = (
        weights[:, axis, None] * (torch.arange(n, device=weights.device) - (n - 1) / 2)
        for axis, n in enumerate(shape)
    )
    return (a[:, :, None, None] + b[:, None, :, None]) + c[:, None, None, :]


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
