"""Views from crops: the numbers are drawn first, then applied to the whole batch on the device.

A clean view is crop, anti-aliased resize and flip (one matrix an axis), then rotation in the IJ
plane (one 2D interpolation with the slices as channels), or about all axes with a scaling (along K,
then in each slice). The corrupted view is the clean one painted (boxes) and blurred (one
matrix an axis), in the order in which the paper lists them. The blur has its own matrices because
the clean view, the target, must not have it. On a CPU matrices are what their rows read (`banded`).

Clean views are indexed (B, 1, I, J, K) but lie in memory slice after slice, K before I and J: the
rotation and the products along the axes need no copy then.

B batch, I J K voxels of the input size, N boxes, n m voxels along an axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models.recipe import CropPairs
from trainer.data import affine
from trainer.data.banded import Taps
from trainer.data.filters import (
    along_axes,
    blur_columns,
    blur_matrix,
    blur_radius,
    gaussians,
    resize_matrix,
    resize_taps,
)
from trainer.data.resident import Resident, Size
from trainer.data.sampling import Pairs
from trainer.data.to_device import to_device

MAX_BOXES = 5
BOX_PROBABILITY = 0.95
NONE, INPAINT, OUTPAINT = 0, 1, 2
HOST = torch.device("cpu")

AT_ONCE = 4
"""Views that a CPU makes at once; memory for more is fetched from the system every time."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How clean views are made.

    Attributes:
        flips: Along I, J, K, bool (B, 3).
        angles: About I, J and K in radians, (B, 3); those about I and J only for `rotation` all.
        scales: Of the content along I, J, K, (B, 3).
    """

    flips: Tensor
    angles: Tensor
    scales: Tensor


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

    def part(self, at: slice) -> Corruption:
        """The same for part of the batch."""
        fields = (self.painting, self.box_start, self.box_size, self.blur_sigma)
        return Corruption(*(field[at] for field in fields))


def draw_geometry(recipe: CropPairs, batch_size: int, random: torch.Generator) -> Geometry:
    """Flips, a rotation and a scaling (rows 29 and 30)."""
    flips = torch.rand(batch_size, 3, generator=random) < recipe.flip_probability
    turn = 2 * torch.rand(batch_size, 3, generator=random) - 1
    stretch = 2 * torch.rand(batch_size, 3, generator=random) - 1
    may_flip = torch.tensor([axis in recipe.flip_axes for axis in "ijk"])
    may_turn = torch.tensor([recipe.rotation == "all", recipe.rotation == "all", True])
    return Geometry(
        flips=flips & may_flip,
        angles=turn * may_turn * math.radians(recipe.max_rotation_deg),
        scales=1 + stretch * recipe.max_scaling,
    )


class Paints(Protocol):
    """Whoever has the shares of painting: `CropPairs`, or a method of its own."""

    @property
    def paint_probability(self) -> float:
        """Of painting at all."""

    @property
    def inpaint_share(self) -> float:
        """Of the painted views, how many are painted inside boxes instead of outside."""


def draw_painting(recipe: Paints, batch_size: int, random: torch.Generator) -> Tensor:
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
    device = volumes.device
    slices = torch.empty(len(pairs.volume), *_slices_of(recipe.input_size), device=device)
    sizes = pairs.size[:, view]
    is_flat = recipe.rotation == "in_plane" and recipe.max_scaling == 0
    for index in sorted(set(sizes.tolist())):  # crops of one size are one batch
        size: Size = recipe.crop_sizes[index]
        of_size = (sizes == index).nonzero()[:, 0]
        for at in of_size.split(_at_once(device, len(of_size))):
            crop = volumes.crop(pairs.volume[at], pairs.start[at, view], size)
            flips, angles = geometry.flips[at], to_device(geometry.angles[at], device)
            if is_flat:
                resized = resize(crop, recipe.input_size, flips[:, 2])
                turned = to_device(flips[:, :2], device)
                moved = rotate_in_plane(resized, angles[:, 2], turned)
            else:
                resized = resize(crop, recipe.input_size)
                signed = torch.where(flips, -1, 1) * geometry.scales[at]
                moved = affine.rotate_and_scale(resized, angles, to_device(signed, device))
            slices.index_copy_(0, to_device(at, device), _by_slice(moved))
    return _by_voxel(slices)[:, None]


def corrupt(
    clean: Tensor,
    corruption: Corruption,
    random: torch.Generator,
    *,
    skip: int = 0,
    in_place: bool = False,
) -> Tensor:
    """Paint with uniform noise, then blur, (B, 1, I, J, K).

    Args:
        clean: (B, 1, I, J, K).
        corruption: What was drawn.
        random: Of the noise, on the views' device.
        skip: Views whose noise is drawn and dropped first: those of lower ranks.
        in_place: Write over `clean`, as fresh memory for a batch costs more than the writing.
    """
    uniform_noise((skip, *clean.shape[1:]), random)
    out = clean if in_place else torch.empty(clean.shape, device=clean.device)
    if clean.device.type == "cpu":
        taps = blur_taps(clean.shape[2:], corruption.blur_sigma)
        for at, (view, (along_i, along_j, along_k)) in enumerate(
            zip(_by_slice(clean[:, 0]), taps, strict=True)
        ):
            noise = uniform_noise(view.shape, random)
            painted = paint_boxes(view, noise, corruption.part(slice(at, at + 1)))
            soft = along_i.along(along_k.along(painted, 0), 1)
            _by_slice(out[:, 0])[at] = along_j.along_last(soft)
        return out
    if len(clean) == 0:
        return out
    view = clean[:, 0]
    noise = uniform_noise(_by_slice(view).shape, random)
    is_noise = noise_share(corruption, view.shape[1:], view.device)
    sigma = to_device(corruption.blur_sigma, clean.device)
    blur = [blur_matrix(n, sigma[:, axis]) for axis, n in enumerate(clean.shape[2:])]
    # Exact at 0 and 1, and faster than `where`.
    out[:, 0] = along_axes(torch.lerp(view, _by_voxel(noise), is_noise), blur)
    return out


def paint_boxes(view: Tensor, noise: Tensor, corruption: Corruption) -> Tensor:
    """What `noise_share` says of one view, box by box: a CPU then writes little but the boxes.

    Args:
        view: (K, I, J).
        noise: (K, I, J); may be written over.
        corruption: Of this view alone.
    """
    kind = int(corruption.painting[0])
    if kind == NONE:
        return view
    painted, other = (view.clone(), noise) if kind == INPAINT else (noise, view)
    starts, sizes = corruption.box_start[0].tolist(), corruption.box_size[0].tolist()
    for (i, j, k), (a, b, c) in zip(starts, sizes, strict=True):
        box = slice(k, k + c), slice(i, i + a), slice(j, j + b)
        painted[box] = other[box]
    return painted


def uniform_noise(shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Uniform in (0, 1), one of 65,536 values; float32 on the generator's device.

    Four voxels from one draw: `torch.rand` takes more than twice as long on a CPU.
    """
    num = math.prod(shape)
    drawn = torch.empty(math.ceil(num / 4), dtype=torch.int64, device=random.device)
    bits = drawn.random_(-(2**63), None, generator=random).view(torch.int16)
    return bits[:num].float().add_(32768.5).div_(65536).reshape(tuple(shape))


def noise_share(corruption: Corruption, shape: torch.Size, device: torch.device = HOST) -> Tensor:
    """1 where the painting puts noise, else 0; float32 (B, I, J, K)."""
    kind = to_device(corruption.painting, device)[:, None, None, None]
    inside = inside_boxes(corruption, shape, device)
    return inside.mul_(kind != NONE).sub_((kind == OUTPAINT).float()).abs_()


def inside_boxes(corruption: Corruption, shape: torch.Size, device: torch.device = HOST) -> Tensor:
    """1 in voxels that lie in at least one box, else 0; float32 (B, I, J, K)."""
    start, size = (to_device(x, device) for x in (corruption.box_start, corruption.box_size))
    i, j, k = intervals(start, size, shape)  # (B, N, n) each
    in_plane = i[:, :, :, None] * j[:, :, None, :]  # (B, N, I, J)
    boxes = k.mT @ in_plane.flatten(2)  # (B, K, I * J), boxes that hold a voxel
    return _by_voxel(boxes.clamp_(max=1).reshape(len(start), *_slices_of(shape)))


def intervals(start: Tensor, size: Tensor, shape: torch.Size) -> list[Tensor]:
    """What boxes (B, N, D) cover along each axis, ones and zeros (B, N, n)."""
    covered = []
    for axis, n in enumerate(shape):
        first = start[:, :, axis, None]
        position = torch.arange(n, device=start.device)
        covered.append((position >= first) & (position < first + size[:, :, axis, None]))
    return [along.float() for along in covered]


def _at_once(device: torch.device, count: int) -> int:
    return AT_ONCE if device.type == "cpu" else max(count, 1)


def _slices_of(shape: Sequence[int]) -> tuple[int, int, int]:
    i, j, k = shape
    return k, i, j


def _by_slice(x: Tensor) -> Tensor:
    """(B, I, J, K) seen as (B, K, I, J)."""
    return x.permute(0, 3, 1, 2)


def _by_voxel(slices: Tensor) -> Tensor:
    """(B, K, I, J) seen as (B, I, J, K)."""
    return slices.permute(0, 2, 3, 1)


def resize(crops: Tensor, size: Size, flip_k: Tensor | None = None) -> Tensor:
    """Anti-aliased linear resize (`resize_matrix`), float32.

    Args:
        crops: (B, I, J, K) of any floating type.
        size: Wanted extents.
        flip_k: Whether K is flipped, bool (B,) on the host.

    Returns:
        Seen as (B, I, J, K), in memory slice after slice.
    """
    extents = tuple(zip(crops.shape[1:], size, strict=True))
    if crops.device.type == "cpu" and tuple(crops.shape[1:]) != tuple(size):
        is_flipped = [False] * len(crops) if flip_k is None else flip_k.tolist()
        along_i, along_j, along_k = (_resize_taps(*along) for along in extents)
        slices = torch.empty(len(crops), *_slices_of(size))
        for crop, view, flips in zip(crops, slices, is_flipped, strict=True):
            made = along_k.last_to_first(along_j.along(along_i.along(crop.float(), 0), 1))
            view.copy_(made.flip(0) if flips else made)
        return _by_voxel(slices)
    crops = crops.float()
    by_i, by_j, by_k = (to_device(resize_matrix(*along), crops.device) for along in extents)
    if flip_k is not None:
        by_k = torch.stack([by_k, by_k.flip(0)])[to_device(flip_k.long(), crops.device)]
    batch, i, j, _ = crops.shape
    slices = (by_k @ _by_slice(crops).flatten(2)).reshape(batch, -1, i, j)  # (B, K, I, J)
    if (i, j) != size[:2]:
        slices = slices @ by_j.mT
        # One product a slice: `@` of a matrix with a batch copies the batch before and after.
        each = by_i.expand(slices.shape[0] * slices.shape[1], -1, -1)
        product = torch.bmm(each, slices.flatten(0, 1))
        slices = product.reshape(*slices.shape[:2], *product.shape[1:])
    return _by_voxel(slices)


@functools.cache
def _resize_taps(num_in: int, num_out: int) -> Taps:
    at = torch.arange(num_out, dtype=torch.float64)
    return Taps(*resize_taps(at, num_in, num_out), num_in)


def blur_taps(extents: Sequence[int], sigma: Tensor) -> list[tuple[Taps, ...]]:
    """A Gaussian of each deviation (B, D), float32 on the host, along D axes, edges repeated."""
    weights = gaussians(sigma)
    reach = (weights.shape[2] - 1) // 2
    radii = blur_radius(sigma).int().tolist()
    return [
        tuple(
            Taps(blur_columns(n, radius), row[reach - radius : reach + radius + 1].expand(n, -1), n)
            for n, radius, row in zip(extents, of_view, rows, strict=True)
        )
        for of_view, rows in zip(radii, weights, strict=True)
    ]


def rotate_in_plane(x: Tensor, angle: Tensor, flips: Tensor | None = None) -> Tensor:
    """Turn (B, I, J, K) in the IJ plane about its centre, bilinear, I == J.

    What comes in from outside is each sample's minimum, as in TorchIO's RandomAffine.

    Args:
        x: (B, I, J, K).
        angle: In radians, (B,).
        flips: Whether I and J are flipped before, bool (B, 2).
    """
    slices = _by_slice(x)
    floor = slices.amin(dim=(1, 2, 3), keepdim=True)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).reshape(-1, 2, 3)
    if flips is not None:
        matrix = matrix * (1 - 2 * flips.flip(1).float())[:, :, None]  # of torch: J, then I
    grid = F.affine_grid(matrix, list(slices.shape), align_corners=False)
    turned = F.grid_sample(slices - floor, grid, mode="bilinear", align_corners=False)
    return _by_voxel(turned.add_(floor))


def num_indicators(dims: Literal[2, 3]) -> int:
    """Length of an indicator vector: a flip along every axis, four quarter turns."""
    return dims + 4


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
    from_i = torch.where(
        turns == 0, i, torch.where(turns == 1, j, torch.where(turns == 2, n - 1 - i, n - 1 - j))
    )
    from_j = torch.where(
        turns == 0, j, torch.where(turns == 1, n - 1 - i, torch.where(turns == 2, n - 1 - j, i))
    )
    from_i = torch.where(flips[:, 0, None, None], n - 1 - from_i, from_i)  # (B, I, J)
    from_j = torch.where(flips[:, 1, None, None], n - 1 - from_j, from_j)
    slices = torch.arange(depth, device=device)[None, :]
    from_k = torch.where(flips[:, 2, None], depth - 1 - slices, slices)  # (B, K)
    sample = torch.arange(batch, device=device)[:, None, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None, None]
    in_plane = (from_i[:, None, :, :, None], from_j[:, None, :, :, None])
    return x[sample, channel, *in_plane, from_k[:, None, None, None, :]]
