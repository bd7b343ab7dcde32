"""Views from crops: the numbers are drawn first, then applied to the whole batch on the device.

A clean view is crop, anti-aliased resize and flip (one matrix an axis), then rotation in the IJ
plane (one 2D interpolation with the slices as channels). The corrupted view is the clean one
painted (boolean boxes) and blurred (one matrix an axis), in the order in which the paper lists
them. The blur has its own matrices because the clean view, the target, must not have it.

B batch, I J K voxels of the input size, N boxes, n m voxels along an axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models.recipe import CropPairs
from trainer.data.resident import Resident, Size
from trainer.data.sampling import Pairs

MAX_BOXES = 5
BOX_PROBABILITY = 0.95
TRUNCATE = 4.0
"""Radius of a Gaussian in deviations, SciPy's default."""

NONE, INPAINT, OUTPAINT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Geometry:
    """How clean views are made: flips bool (B, 3), angle in radians (B,)."""

    flips: Tensor
    angle: Tensor


@dataclass(frozen=True, slots=True)
class Corruption:
    """How clean views are spoiled.

    Attributes:
        painting: NONE, INPAINT or OUTPAINT, (B,).
        box_start: First voxel of each box, (B, N, 3).
        box_size: Its extent, (B, N, 3); 0 where the box is not there.
        blur_sigma: Deviation along each axis in voxels, (B, 3).
    """

    painting: Tensor
    box_start: Tensor
    box_size: Tensor
    blur_sigma: Tensor


def draw_geometry(recipe: CropPairs, batch_size: int, random: torch.Generator) -> Geometry:
    """Flips of all three axes and a rotation in the IJ plane."""
    flips = torch.rand(batch_size, 3, generator=random) < recipe.flip_probability
    turn = 2 * torch.rand(batch_size, generator=random) - 1
    return Geometry(flips, turn * math.radians(recipe.max_rotation_deg))


def draw_painting(recipe: CropPairs, batch_size: int, random: torch.Generator) -> Tensor:
    """Which painting, the same for both views of a pair, (B,)."""
    painted = torch.rand(batch_size, generator=random) < recipe.paint_probability
    inside = torch.rand(batch_size, generator=random) < recipe.inpaint_share
    kind = torch.where(inside, INPAINT, OUTPAINT)
    return torch.where(painted, kind, NONE)


def draw_corruption(recipe: CropPairs, painting: Tensor, random: torch.Generator) -> Corruption:
    """Boxes and blur of one view (row 33)."""
    start, size = draw_boxes(recipe.input_size, painting, random)
    sigma = torch.rand(len(painting), 3, generator=random) * recipe.max_blur_sigma
    return Corruption(painting, start, size, sigma)


def draw_boxes(
    shape: tuple[int, ...], painting: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Boxes to paint over or windows to keep, in 3D and in 2D (row 33).

    Along an axis of n voxels a box to paint over is n//6 to n//3 long, a window to keep
    n - 4n//7 to n - 3n//7; both stay three voxels from the border where they fit.

    Args:
        shape: Of the images, of D axes.
        painting: NONE, INPAINT or OUTPAINT, (B,).
        random: Of the host.

    Returns:
        First voxel of each box and its extent, 0 where the box is not there, (B, N, D).
    """
    batch_size = len(painting)
    n = torch.tensor(shape)
    outside = (painting == OUTPAINT)[:, None, None]  # (B, 1, 1)
    least = torch.where(outside, n - 4 * n // 7, n // 6)
    most = torch.where(outside, n - 3 * n // 7, n // 3)
    u = torch.rand(2, batch_size, MAX_BOXES, len(shape), generator=random, dtype=torch.float64)
    size = least + (u[0] * (most - least + 1)).long()
    border = torch.minimum(torch.full_like(size, 3), (n - size) // 2)
    start = border + (u[1] * (n - 2 * border - size + 1)).long()
    there = torch.rand(batch_size, MAX_BOXES, generator=random) < BOX_PROBABILITY
    there[:, 0] |= painting == OUTPAINT
    there &= (painting != NONE)[:, None]
    return start, size * there[:, :, None]


def make_clean(
    volumes: Resident, recipe: CropPairs, pairs: Pairs, view: int, geometry: Geometry
) -> Tensor:
    """Cut, resize, flip and rotate one view of every pair, float32 (B, 1, I, J, K)."""
    device = volumes.flat.device
    out = torch.empty(len(pairs.volume), *recipe.input_size, device=device)
    for index in sorted(set(pairs.size.tolist())):  # crops of one size are one batch
        at = (pairs.size == index).nonzero()[:, 0]
        size: Size = recipe.crop_sizes[index]
        crop = volumes.crop(pairs.volume[at], pairs.start[at, view], size).float()
        flips = geometry.flips[at].to(device)
        matrices = [
            _flipped(resize_matrix(size[axis], recipe.input_size[axis]).to(device), flips[:, axis])
            for axis in range(3)
        ]
        out[at.to(device)] = along_axes(crop, matrices)
    return rotate_in_plane(out, geometry.angle.to(device))[:, None]


def corrupt(clean: Tensor, corruption: Corruption, random: torch.Generator) -> Tensor:
    """Paint with uniform noise, then blur, (B, 1, I, J, K).

    Args:
        clean: (B, 1, I, J, K); not changed.
        corruption: What was drawn.
        random: Of the noise, on the views' device.
    """
    noise = torch.rand(clean.shape, generator=random, device=clean.device)
    inside = inside_boxes(corruption, clean.shape[2:]).to(clean.device)[:, None]
    kind = corruption.painting.to(clean.device)[:, None, None, None, None]
    is_noise = torch.where(kind == OUTPAINT, ~inside, inside & (kind == INPAINT))
    painted = torch.where(is_noise, noise, clean)[:, 0]
    sigma = corruption.blur_sigma.to(clean.device)
    matrices = [blur_matrix(n, sigma[:, axis]) for axis, n in enumerate(clean.shape[2:])]
    return along_axes(painted, matrices)[:, None]


def inside_boxes(corruption: Corruption, shape: torch.Size) -> Tensor:
    """Voxels that lie in at least one box, bool (B, I, J, K) on the host."""
    i, j, k = intervals(corruption.box_start, corruption.box_size, shape)
    return torch.einsum("bni,bnj,bnk->bijk", i, j, k) > 0


def intervals(start: Tensor, size: Tensor, shape: torch.Size) -> list[Tensor]:
    """What boxes (B, N, D) cover along each axis, ones and zeros (B, N, n)."""
    covered = []
    for axis, n in enumerate(shape):
        first = start[:, :, axis, None]
        position = torch.arange(n, device=start.device)
        covered.append((position >= first) & (position < first + size[:, :, axis, None]))
    return [along.float() for along in covered]


def along_axes(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """Apply a matrix (B, m, n) along each axis of (B, I, J, K)."""
    along_i, along_j, along_k = matrices
    x = x @ along_k.mT[:, None]
    x = along_j[:, None] @ x
    batch, i, j, k = x.shape
    x = along_i @ x.reshape(batch, i, j * k)
    return x.reshape(batch, -1, j, k)


def resize_matrix(num_in: int, num_out: int) -> Tensor:
    """Anti-aliased linear resize as a matrix, (num_out, num_in).

    Equals a Gaussian filter of deviation (num_in / num_out - 1) / 2 when shrinking, then linear
    interpolation at voxel centres, edges repeated (skimage's `resize` of order 1).
    """
    scale = num_in / num_out
    at = (torch.arange(num_out, dtype=torch.float64) + 0.5) * scale - 0.5
    at = at.clamp(0, num_in - 1)
    low = at.floor().long().clamp(max=max(num_in - 2, 0))
    high = (low + 1).clamp(max=num_in - 1)
    share = at - low
    linear = torch.zeros(num_out, num_in, dtype=torch.float64)
    rows = torch.arange(num_out)
    linear.index_put_((rows, low), 1 - share, accumulate=True)
    linear.index_put_((rows, high), share, accumulate=True)
    sigma = torch.tensor([max(0.0, (scale - 1) / 2)], dtype=torch.float64)
    return (linear @ blur_matrix(num_in, sigma)[0]).float()


def blur_matrix(n: int, sigma: Tensor) -> Tensor:
    """Gaussian filters along an axis, edges repeated, (B, n, n); deviation 0 is the identity.

    Equals scipy.ndimage.gaussian_filter1d(mode="nearest") for each deviation of `sigma` (B,).
    """
    sigma = sigma[:, None, None]
    radius = (TRUNCATE * sigma + 0.5).floor()
    position = torch.arange(n, device=sigma.device, dtype=sigma.dtype)
    distance = position[None, :, None] - position[None, None, :]  # (1, n, n)
    safe = sigma.clamp(min=1e-3)

    def weight(d: Tensor) -> Tensor:
        return torch.exp(-0.5 * (d / safe) ** 2) * (d.abs() <= radius)

    # Whole filters, to normalise and to fold what hangs over the edges onto the edge voxels.
    longest = math.ceil(TRUNCATE * float(n)) + 1
    offsets = torch.arange(-longest, longest + 1, device=sigma.device, dtype=sigma.dtype)
    whole = weight(offsets[None, None, :])  # (B, 1, 2 * longest + 1)
    total = whole.sum(dim=2, keepdim=True)
    tail = whole.flip(2).cumsum(dim=2).flip(2)  # sum over offsets >= d
    matrix = weight(distance)
    past = torch.arange(1, n + 1, device=sigma.device) + longest
    beyond = tail[:, 0, past]  # voxel p hangs over the low edge by offsets >= p + 1
    matrix[:, :, 0] += beyond
    matrix[:, :, -1] += beyond.flip(1)
    return matrix / total


def rotate_in_plane(x: Tensor, angle: Tensor) -> Tensor:
    """Turn (B, I, J, K) in the IJ plane about its centre, bilinear, I == J.

    What comes in from outside is each sample's minimum, as in TorchIO's RandomAffine.
    """
    floor = x.amin(dim=(1, 2, 3), keepdim=True)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).reshape(-1, 2, 3)
    slices = (x - floor).permute(0, 3, 1, 2)  # (B, K, I, J)
    grid = F.affine_grid(matrix, list(slices.shape), align_corners=False)
    turned = F.grid_sample(slices, grid, mode="bilinear", align_corners=False)
    return turned.permute(0, 2, 3, 1) + floor


def draw_indicators(batch_size: int, random: torch.Generator, *, dims: int = 3) -> Tensor:
    """Indicator vectors of T: flips along every axis, then one of four quarter turns.

    Returns:
        (B, 7) in 3D; (B, 6) in 2D, with flips along rows and columns.
    """
    flips = (torch.rand(batch_size, dims, generator=random) < 0.5).float()
    turns = torch.randint(4, (batch_size,), generator=random)
    return torch.cat([flips, F.one_hot(turns, 4).float()], dim=1)


def apply_indicators(x: Tensor, indicator: Tensor) -> Tensor:
    """T(X): flip along the marked axes, then turn as `np.rot90` does in the plane of the first two.

    Args:
        x: (B, C, I, J, K) or, in 2D, (B, C, I, J); I == J.
        indicator: (B, 7) or (B, 6) as `draw_indicators` makes them.
    """
    if x.ndim == 4:
        unturned = torch.zeros_like(indicator[:, :1])
        deep = torch.cat([indicator[:, :2], unturned, indicator[:, 2:]], dim=1)
        return apply_indicators(x[..., None], deep)[..., 0]
    batch, channels, n, _, depth = x.shape
    device = x.device
    flips = indicator[:, :3].bool().to(device)
    turns = indicator[:, 3:].argmax(dim=1).to(device)[:, None, None]
    position = torch.arange(n, device=device)
    i, j = position[None, :, None], position[None, None, :]
    from_i = torch.where(turns == 0, i, torch.where(turns == 1, j, torch.where(turns == 2, n - 1 - i, n - 1 - j)))
    from_j = torch.where(turns == 0, j, torch.where(turns == 1, n - 1 - i, torch.where(turns == 2, n - 1 - j, i)))
    from_i = torch.where(flips[:, 0, None, None], n - 1 - from_i, from_i)  # (B, I, J)
    from_j = torch.where(flips[:, 1, None, None], n - 1 - from_j, from_j)
    slices = torch.arange(depth, device=device)[None, :]
    from_k = torch.where(flips[:, 2, None], depth - 1 - slices, slices)  # (B, K)
    sample = torch.arange(batch, device=device)[:, None, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None, None]
    in_plane = (from_i[:, None, :, :, None], from_j[:, None, :, :, None])
    return x[sample, channel, *in_plane, from_k[:, None, None, None, :]]


def _flipped(matrix: Tensor, flip: Tensor) -> Tensor:
    """The matrix of each sample, its rows reversed where flipped, (B, m, n)."""
    return torch.stack([matrix, matrix.flip(0)])[flip.long()]
