"""Rotation about all three axes and scaling of views, about their centre.

Voxels count as cubes whatever their spacing, as in TorchIO's RandomAffine on an array. What comes
in from outside is each sample's minimum, as there.

The map is split in two: along K first, then within the slices. Linear interpolation three times, as
trilinear interpolation has it, at the same coordinates; between voxels the weights differ where
the image bends (a linear image comes out the same). `grid_sample` is vectorised in two dimensions
on a CPU, but not in three.

B batch, I J K voxels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor


def rotate_and_scale(x: Tensor, angles: Tensor, scales: Tensor) -> Tensor:
    """Scale (B, I, J, K) along its axes, then turn it about I, J and K in this order.

        for each output voxel p, as an offset from the centre:
            out[p] = x[A p], A = diag(1 / scales) R^-1, R = R_K R_J R_I

    A turn about K alone is `augment.rotate_in_plane`. Departs from TorchIO in the order of the
    turns, which for angles of equal and symmetric range changes the distribution only in the second
    order, and in the interpolation, as the head of this file tells.

    Args:
        x: (B, I, J, K).
        angles: About I, J and K in radians, (B, 3); those about I and J up to an eighth of a turn.
        scales: Of the content along I, J and K, (B, 3); a negative one flips the axis too.
    """
    slices = x.permute(0, 3, 1, 2).contiguous()  # (B, K, I, J), as views lie in memory
    floor = slices.amin(dim=(1, 2, 3), keepdim=True)
    about_i, about_j, about_k = (
        _turn(angles[:, axis], plane) for axis, plane in enumerate(((1, 2), (2, 0), (0, 1)))
    )
    back = (about_k @ about_j @ about_i).mT / scales[:, :, None]  # from output to input offsets
    first, second = along_k(back, slices.shape), within_slices(back, slices.shape)
    raised = slices - floor
    moved = torch.empty_like(slices)
    # One view after another on a CPU: the planes of a batch of them would have to be copied.
    at_once = 1 if slices.device.type == "cpu" else len(slices)
    for start in range(0, len(slices), max(at_once, 1)):
        part = slice(start, start + at_once)
        planes = _sampled(raised[part].transpose(1, 2), first[part])  # (B, I, K, J)
        planes = _sampled(planes.transpose(1, 2), second[part])  # (B, K, I, J)
        torch.add(planes, floor[part], out=moved[part])
    return moved.permute(0, 2, 3, 1)


def along_k(back: Tensor, shape: torch.Size) -> Tensor:
    """Where the first pass reads: slice k of the output, still with the input's I and J; 0 outside.

        for the output voxel p that will be read at (i, j) of slice p_k:
            out[i, j, p_k] = x[i, j, (A p)_k], where (A p)_i = i and (A p)_j = j

    Args:
        back: A, (B, 3, 3).
        shape: Of views, slice after slice, (B, K, I, J).

    Returns:
        Where planes of K and J are read, (B, I, K, J, 2).
    """
    _, k, i, j = shape
    ii, ij, ik, ji, jj, jk, ki, kj, kk = back.flatten(1).unbind(1)
    # (A p)_k = by_i (A p)_i + by_j (A p)_j + by_k p_k
    determinant = ii * jj - ij * ji
    by_i = (ki * jj - kj * ji) / determinant
    by_j = (kj * ii - ki * ij) / determinant
    by_k = kk - by_i * ik - by_j * jk
    # Planes of K and J, J kept, as `grid_sample` is vectorised in planes.
    kept = torch.zeros_like(by_j), torch.zeros_like(by_j), torch.ones_like(by_j)
    return _grid((i, k, j), 2 / j, kept, 2 / k, (by_i, by_k, by_j))


def within_slices(back: Tensor, shape: torch.Size) -> Tensor:
    """Where the second pass reads: slice p_k at ((A p)_i, (A p)_j), 0 outside, (B, K, I, J, 2)."""
    _, k, i, j = shape
    (ii, ij, ik), (ji, jj, jk) = (row.unbind(1) for row in back[:, :2].unbind(1))
    return _grid((k, i, j), 2 / j, (jk, ji, jj), 2 / i, (ik, ii, ij))


def _sampled(planes: Tensor, grid: Tensor) -> Tensor:
    """Planes (B, n, m, l) read bilinearly at a grid (B, n, m, l, 2), 0 outside."""
    batch, n, m, line = planes.shape
    read = F.grid_sample(planes.reshape(-1, 1, m, line), grid.flatten(0, 1), align_corners=False)
    return read.reshape(batch, n, m, line)


Weights = tuple[Tensor, Tensor, Tensor]


def _grid(
    shape: tuple[int, int, int], x_unit: float, x: Weights, y_unit: float, y: Weights
) -> Tensor:
    """Where `grid_sample` reads: weights of three axes (B,) times offsets, (B, n, m, l, 2)."""
    n, m, line = (_offsets(length, x[0]) for length in shape)
    firsts, lines = [], []
    for unit, (by_n, by_m, by_line) in ((x_unit, x), (y_unit, y)):
        first = (by_n[:, None] * n)[:, :, None] + (by_m[:, None] * m)[:, None]  # (B, n, m)
        firsts.append(first * unit)
        lines.append(by_line[:, None] * (line * unit))
    # As complex numbers: a sum over an innermost axis of two took eight times as long on a CPU.
    grid = torch.complex(*firsts)[..., None] + torch.complex(*lines)[:, None, None]
    return torch.view_as_real(grid)


def _offsets(n: int, like: Tensor) -> Tensor:
    """Of n voxels from their centre, (n,)."""
    return torch.arange(n, device=like.device, dtype=like.dtype) - (n - 1) / 2


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
