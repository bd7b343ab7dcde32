"""Filters along an axis as matrices: a Gaussian, an anti-aliased resize.

B batch, I J K voxels, n m voxels along an axis, t of them in reach of a filter.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

TRUNCATE = 4.0
"""Radius of a Gaussian in deviations, SciPy's default."""


def blur_radius(sigma: Tensor) -> Tensor:
    """Neighbours at either side that Gaussians of these deviations read, whole numbers."""
    return (TRUNCATE * sigma + 0.5).floor()


def shrinking_sigma(num_in: int, num_out: int) -> float:
    """Deviation in voxels of what filters n voxels before they are made fewer; 0 if they are not.

    As in skimage's `resize`.
    """
    return max(0.0, (num_in / num_out - 1) / 2)


def blur_matrix(n: int, sigma: Tensor) -> Tensor:
    """Gaussian filters along an axis, edges repeated, (B, n, n); deviation 0 is the identity.

    Equals scipy.ndimage.gaussian_filter1d(mode="nearest") for each deviation of `sigma` (B,).
    """
    sigma = sigma[:, None]
    radius = blur_radius(sigma)
    # Whole filters, to normalise and to fold what hangs over the edges onto the edge voxels.
    longest = math.ceil(TRUNCATE * float(n)) + 1
    offset = torch.arange(-longest, longest + 1, device=sigma.device, dtype=sigma.dtype)
    whole = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)) ** 2) * (offset.abs() <= radius)
    whole = whole / whole.sum(dim=1, keepdim=True)  # (B, offsets)
    # Row p holds the offsets -p ... n - 1 - p.
    matrix = whole[:, longest - n + 1 : longest + n].unfold(1, n, 1).flip(1)  # (B, n, n)
    tail = whole.flip(1).cumsum(dim=1).flip(1)  # sum over offsets >= d
    beyond = tail[:, longest + 1 : longest + n + 1]  # voxel p hangs over the low edge from p + 1
    matrix[:, :, 0] += beyond
    matrix[:, :, -1] += beyond.flip(1)
    return matrix


def gaussians(sigma: Tensor) -> Tensor:
    """Filters of each deviation, (..., t) of the type of `sigma` (...); the longest fills t."""
    radius = blur_radius(sigma)[..., None]
    longest = int(radius.max()) if radius.numel() else 0
    offset = torch.arange(-longest, longest + 1, device=sigma.device, dtype=sigma.dtype)
    weights = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[..., None]) ** 2)
    weights *= offset.abs() <= radius
    # Added up one after another, so that a filter does not depend on how many zeros surround it.
    return weights / weights.cumsum(dim=-1)[..., -1:]


@functools.lru_cache(maxsize=4096)
def blur_columns(n: int, radius: int) -> Tensor:
    """What each voxel's filter reads, edges repeated, int64 (n, t)."""
    offset = torch.arange(-radius, radius + 1)
    return (torch.arange(n)[:, None] + offset).clamp_(0, n - 1)


def resize_taps(at: Tensor, num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    """What an anti-aliased resize reads for voxels at any position; see `resize_matrix`.

    Args:
        at: Positions (..., m), float64 on the host, in voxels of the resized volume, its first
            one's centre at 0.
        num_in: Voxels before.
        num_out: Voxels after.

    Returns:
        Voxels that each reads, rising, int64 (..., m, t), and their weights, float32.
    """
    smooth = _smoothing(num_in, num_out)
    reach = (len(smooth) - 3) // 2
    at = ((at + 0.5) * (num_in / num_out) - 0.5).clamp_(0, num_in - 1)
    low = at.floor()
    share = (at - low)[..., None]
    weights = (1 - share) * smooth[1:] + share * smooth[:-1]
    offset = torch.arange(-reach, reach + 2)
    return (low.long()[..., None] + offset).clamp_(0, num_in - 1), weights.float()


@functools.cache
def _smoothing(num_in: int, num_out: int) -> Tensor:
    """The filter before voxels are made fewer, a 0 at either end, float64."""
    sigma = torch.tensor(shrinking_sigma(num_in, num_out), dtype=torch.float64)
    return F.pad(gaussians(sigma), (1, 1))


@functools.cache
def resize_matrix(num_in: int, num_out: int) -> Tensor:
    """Anti-aliased linear resize as a matrix, (num_out, num_in).

    Equals a Gaussian filter of deviation (num_in / num_out - 1) / 2 when shrinking, then linear
    interpolation at voxel centres, edges repeated (skimage's `resize` of order 1).
    """
    columns, weights = resize_taps(torch.arange(num_out, dtype=torch.float64), num_in, num_out)
    return torch.zeros(num_out, num_in).scatter_add_(1, columns, weights)


def along_axes(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """Apply a matrix (B, m, n) along each axis of (B, I, J, K)."""
    along_i, along_j, along_k = matrices
    batch, i, j, _ = x.shape
    # Each product contracts the last axis and puts its own first, so that none copies.
    x = along_k @ x.permute(0, 3, 1, 2).flatten(2)  # (B, K, I * J)
    x = along_j @ x.reshape(batch, -1, j).mT  # (B, J, K * I)
    x = along_i @ x.reshape(batch, -1, i).mT  # (B, I, J * K)
    return x.reshape(batch, x.shape[1], along_j.shape[1], -1)
