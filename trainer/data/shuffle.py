"""Pixel shuffling of the official code: the voxels of thousands of small windows change places.

    for each window k:
        shuffled[window k] = permute(view[window k])

Every window reads the view as it was and overwrites what earlier windows wrote, so the last window
that covers a voxel decides its value. It is found for all voxels at once, as the largest of numbers
that hold k in their high bits and the voxel to read in their low ones.

A window's permutation is uniform, but it is one of `NUM_ORDERS` that are drawn anew for each extent
and batch, so two windows of one extent share theirs with probability 1 / NUM_ORDERS; the official
code draws one for each. (A permutation for each, by sorting 245,000 random numbers a view, took
longer than all the rest.)

S views, N windows, E extents, P orders, n voxels of a window, I J K voxels of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int]

NUM_WINDOWS = 10_000
NUM_ORDERS = 32

AT_ONCE = 8
"""Views that a CPU shuffles at once; more do not stay in its caches."""


@dataclass(frozen=True, slots=True)
class Windows:
    """What is drawn for S views.

    Attributes:
        extents: Extents that a window may have, int64 (E, 3).
        extent: Which of them each window has, int64 (S, N).
        start: First voxel of each window, int64 (S, N, 3).
        order: Which order of its extent each window takes, int64 (S, N).
        orders: For each extent, P permutations of its voxels, K counted fastest; int64 (P, n).
    """

    extents: Tensor
    extent: Tensor
    start: Tensor
    order: Tensor
    orders: tuple[Tensor, ...]

    def part(self, at: slice) -> Windows:
        """The same for some of the views."""
        return Windows(
            self.extents, self.extent[at], self.start[at], self.order[at], self.orders
        )


def shuffle_some(views: Sequence[Tensor], chosen: Tensor, random: torch.Generator) -> list[Tensor]:
    """Shuffle the chosen ones of V batches of views, each (B, 1, I, J, K); `views` stay.

    Args:
        views: On one device.
        chosen: Which to shuffle, bool (V, B) on the host.
        random: Of the windows, on the views' device.
    """
    windows = draw_windows(views[0].shape[2:], int(chosen.sum()), random)
    done, shuffled = 0, []
    for batch, is_chosen in zip(views, chosen, strict=True):
        at = is_chosen.nonzero()[:, 0]
        part = windows.part(slice(done, done + len(at)))
        flat, shape = _flattened(batch)
        copy = flat.clone()
        _shuffle(flat, copy, at.to(flat.device), part, shape)
        shuffled.append(_as_views(copy, shape))
        done += len(at)
    return shuffled


def draw_windows(
    shape: Sequence[int],
    num_views: int,
    random: torch.Generator,
    *,
    num_windows: int = NUM_WINDOWS,
) -> Windows:
    """Windows of any extent up to a tenth of each axis, anywhere inside (row 32).

    Args:
        shape: I, J, K of the views.
        num_views: S.
        random: On the views' device.
        num_windows: N.
    """
    device = random.device
    sides = (torch.arange(1, max(1, n // 10) + 1, device=device) for n in shape)
    extents = torch.cartesian_prod(*sides)
    drawn = (num_views, num_windows)
    extent = torch.randint(len(extents), drawn, generator=random, device=device)
    room = torch.tensor(list(shape), device=device) - extents + 1  # (E, 3), places along each axis
    u = torch.rand(*drawn, 3, generator=random, device=device)
    return Windows(
        extents=extents,
        extent=extent,
        start=(u * room[extent]).long(),
        order=torch.randint(NUM_ORDERS, drawn, generator=random, device=device),
        orders=tuple(
            torch.rand(NUM_ORDERS, n, generator=random, device=device).argsort(dim=1)
            for n in extents.prod(dim=1).tolist()
        ),
    )


def shuffle_pixels(views: Tensor, windows: Windows) -> Tensor:
    """Shuffle every view, (S, 1, I, J, K)."""
    flat, shape = _flattened(views)
    shuffled = torch.empty_like(flat)
    _shuffle(flat, shuffled, torch.arange(len(flat), device=flat.device), windows, shape)
    return _as_views(shuffled, shape)


def _flattened(views: Tensor) -> tuple[Tensor, Shape]:
    """Views as they lie in memory (`augment`), slice after slice, (S, K * I * J)."""
    _, _, i, j, k = views.shape
    return views[:, 0].permute(0, 3, 1, 2).flatten(1), (i, j, k)


def _as_views(flat: Tensor, shape: Shape) -> Tensor:
    i, j, k = shape
    return flat.reshape(-1, k, i, j).permute(0, 2, 3, 1)[:, None]


def _shuffle(flat: Tensor, out: Tensor, at: Tensor, windows: Windows, shape: Shape) -> None:
    """Write shuffled views into the rows `at` of `out`, reading those of `flat`."""
    _, num_voxels = flat.shape
    at_once = AT_ONCE if flat.device.type == "cpu" else max(len(at), 1)
    i, j, _ = shape
    strides = torch.tensor([j, 1, i * j], device=flat.device)
    everything, whole = flat.reshape(-1), out.view(-1, num_voxels)
    for start in range(0, len(at), at_once):
        part = slice(start, start + at_once)
        read_from = _read_from(windows.part(part), strides, num_voxels)
        read_from += at[part, None] * num_voxels
        values = everything.index_select(0, read_from.flatten())
        whole.index_copy_(0, at[part], values.view(-1, num_voxels))


def _read_from(windows: Windows, strides: Tensor, num_voxels: int) -> Tensor:
    """Voxel that each voxel takes its value from, int64 (S, I * J * K)."""
    num_views, num_windows = windows.extent.shape
    device = windows.extent.device
    low_bits = (num_voxels - 1).bit_length()
    # Half the bytes where they suffice: at 64x64x32 and 10,000 windows they just do.
    small = (num_windows + 1) << low_bits <= 2**31
    dtype = torch.int32 if small else torch.int64

    by_extent = windows.extent.flatten().to(torch.int32).argsort()
    counts = windows.extent.flatten().bincount(minlength=len(windows.extents)).tolist()
    corner = (windows.start * strides).sum(dim=2)  # (S, N)
    rank = torch.arange(1, num_windows + 1, device=device) << low_bits
    first_write = corner + (torch.arange(num_views, device=device) * num_voxels)[:, None]
    per_window = ((corner + rank).to(dtype), first_write, windows.order)
    grouped = zip(*(torch.split(x.flatten()[by_extent], counts) for x in per_window), strict=True)

    winner = torch.arange(num_voxels, dtype=dtype, device=device).repeat(num_views)
    for extent, order, (ranked, written, pick) in zip(
        windows.extents, windows.orders, grouped, strict=True
    ):
        inside = _inside(extent, strides)  # (n,)
        reads = inside[order].to(dtype).index_select(0, pick).add_(ranked[:, None])
        writes = written[:, None] + inside
        winner.scatter_reduce_(0, writes.flatten(), reads.flatten(), "amax")
    return (winner & ((1 << low_bits) - 1)).long().reshape(num_views, num_voxels)


def _inside(extent: Tensor, strides: Tensor) -> Tensor:
    """Voxels of a window, counted from its first one, K fastest, (n,)."""
    i, j, k = (
        torch.arange(int(extent[axis]), device=strides.device) * strides[axis]
        for axis in range(3)
    )
    inside: Tensor = i[:, None, None] + j[:, None] + k
    return inside.flatten()
