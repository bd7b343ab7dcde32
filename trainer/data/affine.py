"""Crops resized, scaled and turned about all three axes: a product an axis, then three shears.

A linear map is a scaling of the axes followed by three shears, each of which moves lines along
themselves. The scaling is part of the resize, so it costs nothing; a shear moves each line by one
number, so that it reads n + 1 neighbours in memory and mixes each with the next. Between voxels
that is linear interpolation once along each axis, as trilinear interpolation has it, of a crop that
the resize has interpolated once. (`grid_sample` took three times as long as the shears on a CPU.)

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
    i, j, k = size
    device, batch = crops.device, len(crops)
    axes = [
        _Axis.of(old, new, shears.scale[:, axis], device)
        for axis, (old, new) in enumerate(zip(crops.shape[1:], size, strict=True))
    ]
    m, n, length = (axis.extent for axis in axes)
    # One view after another on a CPU, in memory that stays in its caches.
    at_once = 1 if device.type == "cpu" else batch
    along_j, along_k, along_i = (
        _Lines.of(at_once, lines, weights, extents, device)
        for lines, weights, extents in (
            ((length, m), shears.along_j, (n, j)),
            ((m, j), shears.along_k, (length, k)),
            ((j, k), shears.along_i, (m, i)),
        )
    )
    inside = axes[0].inside[:, :, None] * axes[1].inside[:, None]
    slices = torch.empty(batch, k, i, j, device=device)
    for start in range(0, batch, max(at_once, 1)):
        part = slice(start, start + at_once)
        scaled = _scaled(crops[part], axes, part)  # (b, L, M, N)
        of_view = scaled[:, (length - k) // 2 :, (m - i) // 2 :, (n - j) // 2 :][:, :k, :i, :j]
        floor = of_view.amin(dim=(1, 2, 3), keepdim=True)
        raised = torch.sub(scaled, floor, out=along_j.middle)
        raised.mul_(inside[part, None]).mul_(axes[2].inside[part, :, None, None])
        along_j.move(part, out=along_k.middle.permute(0, 3, 1, 2))
        along_k.move(part, out=along_i.middle.permute(0, 3, 1, 2))
        along_i.move(part, out=slices[part].permute(0, 3, 1, 2))
        slices[part] += floor
    return slices.permute(0, 2, 3, 1)


@dataclass(frozen=True, slots=True)
class _Axis:
    """The resize and scaling of a batch along one axis.

    Attributes:
        columns: What each voxel reads, edges repeated, int64 (B, m, t).
        weights: Of it, (B, m, t).
        inside: 1 inside of the view, 0 outside, running out within a voxel; (B, m).
        num_in: n.
        is_flipped: bool (B,) on the host.
    """

    columns: Tensor
    weights: Tensor
    inside: Tensor
    num_in: int
    is_flipped: list[bool]

    @classmethod
    def of(cls, num_in: int, num_out: int, scale: Tensor, device: torch.device) -> _Axis:
        """From n voxels to those of the view and as many around it as the scaling lets in."""
        factors = scale.abs()
        least = float(factors.min()) if len(factors) else 1.0
        beyond = math.ceil((num_out + 1) / (2 * least) - (num_out - 1) / 2 - 1e-6) - 1
        extent = num_out + 2 * STEP * math.ceil(max(beyond, 0) / STEP)
        factors = to_device(factors, device)
        at = _offsets(extent, factors) * factors[:, None] + (num_out - 1) / 2
        inside = torch.minimum(at + 1, num_out - at).clamp_(0, 1).float()
        columns, weights = resize_taps(at, num_in, num_out)
        return cls(columns, weights, inside, num_in, (scale < 0).tolist())

    @property
    def extent(self) -> int:
        """Voxels after, with those around the view."""
        return self.columns.shape[1]

    def taps(self, at: int) -> Taps:
        """Of one view, as if it were not flipped."""
        columns, weights = self.columns[at], self.weights[at]
        return Taps(columns, weights, self.num_in)

    def matrices(self) -> Tensor:
        """(B, m, n), flipped where they are."""
        batch = len(self.columns)
        matrices = self.weights.new_zeros(batch, self.extent, self.num_in)
        matrices.scatter_add_(2, self.columns, self.weights)
        is_flipped = to_device(torch.tensor(self.is_flipped), matrices.device)
        return torch.where(is_flipped[:, None, None], matrices.flip(1), matrices)


def _scaled(crops: Tensor, axes: Sequence[_Axis], part: slice) -> Tensor:
    """Crops (b, I', J', K') of part of a batch resized, scaled and flipped, (b, L, M, N)."""
    if crops.device.type != "cpu":
        scaled = along_axes(crops.float(), [axis.matrices() for axis in axes])
        return scaled.permute(0, 3, 1, 2)
    at = part.start
    along_i, along_j, along_k = (axis.taps(at) for axis in axes)
    lines = along_j.along(along_i.along(crops[0].float(), 0), 1)
    scaled = along_k.last_to_first(lines)[None]
    flipped = [axis for axis in range(3) if axes[axis].is_flipped[at]]
    return scaled.flip([(2, 3, 1)[axis] for axis in flipped]) if flipped else scaled


@dataclass(frozen=True, slots=True)
class _Lines:
    """Lines of part of a batch that a shear moves, and how.

    Attributes:
        memory: (b, u, v, reach + n + reach), 0 but for its middle.
        middle: What is moved, (b, u, v, m).
        extent: n, of what is read.
        first: First voxel that each line reads in its part of memory, int64 (B, u, v).
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
        at_once: int,
        lines: tuple[int, int],
        weights: Tensor,
        extents: tuple[int, int],
        device: torch.device,
    ) -> _Lines:
        """All 0.

        Args:
            at_once: b.
            lines: u and v.
            weights: Of u and v in the shift, (B, 2) on the host.
            extents: m and n.
            device: Of the memory.
        """
        u, v = lines
        before, after = extents
        ends = torch.tensor([(u - 1) / 2, (v - 1) / 2], dtype=weights.dtype)
        longest = float((weights.abs() @ ends).max()) if len(weights) else 0.0
        reach = math.floor(longest + 1e-3) + 1  # shifts are rounded to float32
        reach = max(reach, (before - after) // 2)
        length = after + 2 * reach
        memory = torch.zeros(at_once, u, v, length, device=device)
        starts = torch.arange(at_once * u * v, device=device).mul_(length).add_(reach)
        by_u, by_v = to_device(weights.float(), device).unbind(1)
        along_u, along_v = _offsets(u, by_u), _offsets(v, by_v)
        shifts = (by_u[:, None] * along_u)[:, :, None] + (by_v[:, None] * along_v)[:, None]
        whole = shifts.floor()
        return cls(
            memory=memory,
            middle=memory.narrow(3, reach - (before - after) // 2, before),
            extent=after,
            first=whole.long() + starts.view(at_once, u, v),
            share=(shifts - whole)[..., None],
        )

    def move(self, part: slice, *, out: Tensor) -> None:
        """Read n voxels of each line, which lie by its shift beside the middle."""
        share = self.share[part]
        rows = self.memory.as_strided(
            (self.memory.numel() - self.extent, self.extent + 1), (1, 1)
        ).index_select(0, self.first[part].flatten())
        rows = rows.view(*share.shape[:3], self.extent + 1)
        torch.lerp(rows[..., :-1], rows[..., 1:], share, out=out)


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
