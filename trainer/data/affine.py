"""Crops resized, scaled and turned about all three axes: a product an axis, then three shears.

A linear map is a scaling of the axes followed by three shears, each of which moves lines along
themselves. The scaling is part of the resize, so it costs nothing; a shear moves each line by one
number, so that it reads n + 1 neighbours in memory and mixes each with the next. Between voxels
that is linear interpolation once along each axis, as trilinear interpolation has it, of a crop that
the resize has interpolated once; the turns must be small (`CropPairs`), as the scaling that makes
up for large ones would leave voxels out.

Voxels of a view count as cubes whatever their spacing, as in TorchIO's RandomAffine on an array,
and what comes in from outside is each view's minimum, as there: that of the scaled crop. Outside of
its edge voxels a view runs out within one voxel.

B batch, I J K voxels of a view, M N L those of the scaled crop, m n along an axis; positions are
offsets from the centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.banded import Taps
from trainer.data.filters import along_axes, resize_taps
from trainer.data.resident import Size
from trainer.data.to_device import to_device

STEP = 4
"""A scaled crop is longer than the view by multiples of this at either end, for `banded.ROWS`."""


@dataclass(frozen=True, slots=True)
class Shears:
    """A map of output to input positions, taken apart; float64 on the host.

        a[i, j, k] = resized[scale * (i, j, k)]
        b[i, j, k] = a[i, j + along_j . (k, i), k]
        c[i, j, k] = b[i, j, k + along_k . (i, j)]
        view[i, j, k] = c[i + along_i . (j, k), j, k]

    Attributes:
        scale: Along I, J and K, (B, 3); negative where the axis is flipped.
        along_j: (B, 2).
        along_k: (B, 2).
        along_i: (B, 2).
    """

    scale: Tensor
    along_j: Tensor
    along_k: Tensor
    along_i: Tensor

    @classmethod
    def of(cls, angles: Tensor, scales: Tensor) -> Shears:
        """Scale the content along I, J and K, then turn it about I, J and K in this order.

            for each output position p:
                view[p] = resized[A p], A = diag(1 / scales) R^-1, R = R_K R_J R_I

        Departs from TorchIO in the order of the turns, which for angles of equal and symmetric
        range changes the distribution only in the second order, and in the interpolation.

        Args:
            angles: About I, J and K in radians, (B, 3), up to an eighth of a turn.
            scales: (B, 3); a negative one flips the axis too.
        """
        about_i, about_j, about_k = (
            _turn(angles[:, axis].double(), plane)
            for axis, plane in enumerate(((1, 2), (2, 0), (0, 1)))
        )
        back = (about_k @ about_j @ about_i).mT / scales.double()[:, :, None]
        ii, ij, ik, ji, jj, jk, ki, kj, kk = back.flatten(1).unbind(1)
        # j of (k, i, p_j): the rows of k and i solved for p_k and p_i.
        determinant = kk * ii - ki * ik
        j_by_k = (jk * ii - ji * ik) / determinant
        j_by_i = (ji * kk - jk * ki) / determinant
        scale_j = jj - j_by_k * kj - j_by_i * ij
        # k of (p_k, i, p_j): the row of i solved for p_i.
        scale_k = determinant / ii
        k_by_j = kj - ki * ij / ii
        return cls(
            scale=torch.stack([ii, scale_j, scale_k], dim=1),
            along_j=torch.stack([j_by_k * scale_k, j_by_i * ii], dim=1) / scale_j[:, None],
            along_k=torch.stack([ki, k_by_j], dim=1) / scale_k[:, None],
            along_i=torch.stack([ij, ik], dim=1) / ii[:, None],
        )

    def part(self, at: Tensor | slice) -> Shears:
        """The same for part of the batch."""
        return Shears(self.scale[at], self.along_j[at], self.along_k[at], self.along_i[at])


def warp(crops: Tensor, size: Size, shears: Shears) -> Tensor:
    """Resize crops as `augment.resize` does, then move them.

    Args:
        crops: (B, I', J', K') of any floating type.
        size: Of the views, I, J and K.
        shears: Of each.

    Returns:
        float32 (B, I, J, K), in memory slice after slice.
    """
    if len(crops) == 0:
        return torch.empty(0, *size, device=crops.device)
    if crops.device.type != "cpu":
        return _warped(crops, size, shears)
    # One view after another, in memory that stays in the caches, and alike in whatever batch.
    alone = (slice(at, at + 1) for at in range(len(crops)))
    views = [_warped(crops[at], size, shears.part(at)).permute(0, 3, 1, 2) for at in alone]
    return torch.cat(views).permute(0, 2, 3, 1)


def _warped(crops: Tensor, size: Size, shears: Shears) -> Tensor:
    i, j, k = size
    device, batch = crops.device, len(crops)
    axes = [
        _Axis.of(old, new, shears.scale[:, axis])
        for axis, (old, new) in enumerate(zip(crops.shape[1:], size, strict=True))
    ]
    m, n, length = (axis.extent for axis in axes)
    along_j, along_k, along_i = (
        _Lines.of(lines, weights, extents, device)
        for lines, weights, extents in (
            ((length, m), shears.along_j, (n, j)),
            ((m, j), shears.along_k, (length, k)),
            ((j, k), shears.along_i, (m, i)),
        )
    )
    inside_i, inside_j, inside_k = (to_device(axis.inside, device) for axis in axes)
    inside = inside_i[:, None, :, None] * inside_j[:, None, None]  # (B, 1, M, N)
    inside_k = inside_k[:, :, None, None]
    scaled = _scaled(crops, axes)  # (B, L, M, N)
    is_outside = (inside == 0) | (inside_k == 0)
    floor = scaled.masked_fill(is_outside, math.inf).amin(dim=(1, 2, 3), keepdim=True)
    torch.sub(scaled, floor, out=along_j.middle).mul_(inside).mul_(inside_k)
    slices = torch.empty(batch, k, i, j, device=device)
    along_j.move(out=along_k.middle.permute(0, 3, 1, 2))
    along_k.move(out=along_i.middle.permute(0, 3, 1, 2))
    along_i.move(out=slices.permute(0, 3, 1, 2))
    return slices.add_(floor).permute(0, 2, 3, 1)


@dataclass(frozen=True, slots=True)
class _Axis:
    """The resize and scaling of a batch along one axis.

    Attributes:
        columns: What each voxel reads, edges repeated, int64 (B, m, t) on the host.
        weights: Of it, (B, m, t).
        inside: 1 inside of the view, 0 outside, running out within a voxel; (B, m).
        num_in: n.
        is_flipped: bool (B,).
    """

    columns: Tensor
    weights: Tensor
    inside: Tensor
    num_in: int
    is_flipped: Tensor

    @classmethod
    def of(cls, num_in: int, num_out: int, scale: Tensor) -> _Axis:
        """From n voxels to those of the view and as many around it as the scaling lets in."""
        factors = scale.abs()
        beyond = (
            math.ceil((num_out + 1) / (2 * float(factors.min())) - (num_out - 1) / 2 - 1e-6) - 1
        )
        extent = num_out + 2 * STEP * math.ceil(max(beyond, 0) / STEP)
        at = _offsets(extent, factors) * factors[:, None] + (num_out - 1) / 2
        inside = torch.minimum(at + 1, num_out - at).clamp_(0, 1).float()
        columns, weights = resize_taps(at, num_in, num_out)
        return cls(columns, weights, inside, num_in, scale < 0)

    @property
    def extent(self) -> int:
        """Voxels after, with those around the view."""
        return self.columns.shape[1]

    def taps(self) -> Taps:
        """Of a batch of one, as if it were not flipped."""
        (columns,), (weights,) = self.columns, self.weights
        return Taps(columns, weights, self.num_in)

    def matrices(self) -> Tensor:
        """(B, m, n), flipped where they are."""
        matrices = torch.zeros(len(self.columns), self.extent, self.num_in)
        matrices.scatter_add_(2, self.columns, self.weights)
        return torch.where(self.is_flipped[:, None, None], matrices.flip(1), matrices)


def _scaled(crops: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Crops (B, I', J', K') resized, scaled and flipped, (B, L, M, N); on a CPU a single one."""
    if crops.device.type != "cpu":
        matrices = [to_device(axis.matrices(), crops.device) for axis in axes]
        return along_axes(crops.float(), matrices).permute(0, 3, 1, 2)
    along_i, along_j, along_k = (axis.taps() for axis in axes)
    lines = along_j.along(along_i.along(crops[0].float(), 0), 1)
    scaled = along_k.last_to_first(lines)[None]
    flipped = [place for place, axis in zip((2, 3, 1), axes, strict=True) if axis.is_flipped[0]]
    return scaled.flip(flipped) if flipped else scaled


@dataclass(frozen=True, slots=True)
class _Lines:
    """Lines that a shear moves, and how.

    Attributes:
        memory: (B, u, v, reach + n + reach), 0 but for its middle.
        middle: What is moved, (B, u, v, m).
        extent: n, of what is read.
        first: First voxel that each line reads in memory, int64 (B, u, v).
        share: Of the voxel after each in what is read, (B, u, v, 1).
    """

    memory: Tensor
    middle: Tensor
    extent: int
    first: Tensor
    share: Tensor

    @classmethod
    def of(
        cls,
        lines: tuple[int, int],
        weights: Tensor,
        extents: tuple[int, int],
        device: torch.device,
    ) -> _Lines:
        """All 0.

        Args:
            lines: u and v.
            weights: Of u and v in the shift, (B, 2) on the host.
            extents: m and n.
            device: Of the memory.
        """
        u, v = lines
        before, after = extents
        ends = torch.tensor([(u - 1) / 2, (v - 1) / 2], dtype=weights.dtype)
        longest = float((weights.abs() @ ends).max())
        reach = math.floor(longest + 1e-3) + 1  # shifts are rounded to float32
        reach = max(reach, (before - after) // 2)
        length = after + 2 * reach
        memory = torch.zeros(len(weights), u, v, length, device=device)
        starts = torch.arange(len(weights) * u * v, device=device).mul_(length).add_(reach)
        by_u, by_v = to_device(weights.float(), device).unbind(1)
        along_u, along_v = _offsets(u, by_u), _offsets(v, by_v)
        shifts = (by_u[:, None] * along_u)[:, :, None] + (by_v[:, None] * along_v)[:, None]
        whole = shifts.floor()
        return cls(
            memory=memory,
            middle=memory.narrow(3, reach - (before - after) // 2, before),
            extent=after,
            first=whole.long() + starts.view(-1, u, v),
            share=(shifts - whole)[..., None],
        )

    def move(self, *, out: Tensor) -> None:
        """Read n voxels of each line, which lie by its shift beside the middle."""
        rows = self.memory.as_strided(
            (self.memory.numel() - self.extent, self.extent + 1), (1, 1)
        ).index_select(0, self.first.flatten())
        rows = rows.view(*self.first.shape, self.extent + 1)
        torch.lerp(rows[..., :-1], rows[..., 1:], self.share, out=out)


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
