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

S views, N windows of each, E extents, P orders, n voxels of a window, I J K voxels of a view.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.to_device import to_device

Shape = tuple[int, int, int]

NUM_WINDOWS = 10_000
NUM_ORDERS = 32

AT_ONCE = 8
"""Views that a CPU shuffles at once; more do not stay in its caches."""


@dataclass(frozen=True, slots=True)
class Windows:
    """What is drawn for S views: all their windows, grouped by extent.

    How many there are of each extent is known on the host, so that nothing waits for the device.

    Attributes:
        counts: Windows of each of `extents(shape)`, together S * N.
        view: Whose window each is, int32 (S * N,).
        rank: Its turn in that view, 0 to N - 1, int32 (S * N,).
        start: Its first voxel, int32 (S * N, 3).
        order: Which order of its extent it takes, int32 (S * N,).
    """

    counts: list[int]
    view: Tensor
    rank: Tensor
    start: Tensor
    order: Tensor


def shuffle_some(
    views: Sequence[Tensor],
    chosen: Tensor,
    on_host: torch.Generator,
    on_device: torch.Generator,
    *,
    num_windows: int = NUM_WINDOWS,
) -> list[Tensor]:
    """Shuffle the chosen ones of V batches of views, each (B, 1, I, J, K); `views` stay.

    Args:
        views: On one device.
        chosen: Which to shuffle, bool (V, B) on the host.
        on_host: Of the windows' extents.
        on_device: Of everything else, on the views' device.
        num_windows: Of each view.
    """
    _, _, i, j, k = views[0].shape
    shape, device = (i, j, k), views[0].device
    offsets = _offsets_read(shape, draw_orders(shape, on_device), num_windows)
    shuffled = []
    for batch, is_chosen in zip(views, chosen, strict=True):
        flat = _flattened(batch)
        copy = flat.clone()
        every = is_chosen.nonzero()[:, 0]
        at_once = AT_ONCE if device.type == "cpu" else len(every)
        for at in torch.split(every, at_once) if len(every) else ():
            windows = draw_windows(shape, len(at), on_host, on_device, num_windows=num_windows)
            read_from = _read_from(windows, offsets, shape, num_views=len(at))
            there = to_device(at, device)
            moved = flat.index_select(0, there).flatten().index_select(0, read_from)
            copy.index_copy_(0, there, moved.reshape(len(at), -1))
        shuffled.append(_as_views(copy, shape))
    return shuffled


@functools.cache
def extents(shape: Shape) -> tuple[Shape, ...]:
    """Extents that a window may have: 1 to a tenth of each axis (row 32)."""
    i, j, k = (range(1, max(1, n // 10) + 1) for n in shape)
    return tuple((a, b, c) for a in i for b in j for c in k)


def draw_orders(shape: Shape, random: torch.Generator) -> tuple[Tensor, ...]:
    """For each extent P permutations of its voxels, K counted fastest, int64 (P, n)."""
    return tuple(
        torch.rand(NUM_ORDERS, a * b * c, generator=random, device=random.device).argsort(dim=1)
        for a, b, c in extents(shape)
    )


def draw_windows(
    shape: Shape,
    num_views: int,
    on_host: torch.Generator,
    on_device: torch.Generator,
    *,
    num_windows: int = NUM_WINDOWS,
) -> Windows:
    """Windows of any extent, anywhere inside their view; every view has as many.

    The windows of all views together are dealt to the extents first, then to views and turns, which
    has the distribution of drawing an extent for each.
    """
    every, device, total = extents(shape), on_device.device, num_views * num_windows
    counts = torch.randint(len(every), (total,), generator=on_host).bincount(minlength=len(every))
    places = (torch.tensor(shape) - torch.tensor(every) + 1).float()  # (E, 3), along each axis
    per_window = torch.repeat_interleave(
        to_device(places, device), to_device(counts, device), dim=0, output_size=total
    )
    dealt = torch.randperm(total, generator=on_device, device=device, dtype=torch.int32)
    rank = dealt % max(num_windows, 1)
    u = torch.rand(total, 3, generator=on_device, device=device)
    return Windows(
        counts=counts.tolist(),
        view=dealt // max(num_windows, 1),
        rank=rank,
        start=(u * per_window).int(),
        order=rank % NUM_ORDERS,  # turns are dealt at random, so this is
    )


def shuffle_pixels(views: Tensor, windows: Windows, orders: Sequence[Tensor]) -> Tensor:
    """Shuffle every view, (S, 1, I, J, K)."""
    _, _, i, j, k = views.shape
    num_windows = len(windows.rank) // len(views)
    offsets = _offsets_read((i, j, k), orders, num_windows)
    read_from = _read_from(windows, offsets, (i, j, k), num_views=len(views))
    return _as_views(_flattened(views).flatten().index_select(0, read_from), (i, j, k))


def _flattened(views: Tensor) -> Tensor:
    """Views as they lie in memory (`augment`), slice after slice, (S, K * I * J)."""
    return views[:, 0].permute(0, 3, 1, 2).flatten(1)


def _as_views(flat: Tensor, shape: Shape) -> Tensor:
    i, j, k = shape
    return flat.reshape(-1, k, i, j).permute(0, 2, 3, 1)[:, None]


def _offsets_read(shape: Shape, orders: Sequence[Tensor], num_windows: int) -> tuple[Tensor, ...]:
    """For each extent and order the voxels that a window reads, from its first one, (P, n)."""
    # Half the bytes where they suffice: at 64x64x32 and 10,000 windows they just do.
    fits = (num_windows + 1) << _low_bits(shape) <= 2**31
    dtype = torch.int32 if fits else torch.int64
    boxes = _boxes(shape, orders[0].device)
    return tuple(box[order].to(dtype) for box, order in zip(boxes, orders, strict=True))


def _low_bits(shape: Shape) -> int:
    """Bits that hold the number of any voxel of a view."""
    i, j, k = shape
    return (i * j * k - 1).bit_length()


def _read_from(
    windows: Windows, offsets: Sequence[Tensor], shape: Shape, *, num_views: int
) -> Tensor:
    """Voxel that each voxel takes its value from, counted through all views, (S * K * I * J,)."""
    i, j, k = shape
    num_voxels, device, dtype = i * j * k, windows.start.device, offsets[0].dtype
    low_bits = _low_bits(shape)

    at_i, at_j, at_k = windows.start.unbind(dim=1)
    corner = (at_k * i + at_i) * j + at_j
    ranked = ((windows.rank + 1).to(dtype) << low_bits) + corner
    written = windows.view.long() * num_voxels + corner  # `scatter_reduce_` takes int64 alone
    per_window = (torch.split(x, windows.counts) for x in (ranked, written, windows.order))

    winner = torch.arange(num_voxels, dtype=dtype, device=device).repeat(num_views)
    for box, reads_of, rank_and_corner, first, pick in zip(
        _boxes(shape, device), offsets, *per_window, strict=True
    ):
        reads = reads_of.index_select(0, pick).add_(rank_and_corner[:, None])
        writes = first[:, None] + box
        winner.scatter_reduce_(0, writes.flatten(), reads.flatten(), "amax")
    read_from = winner.bitwise_and_((1 << low_bits) - 1).reshape(num_views, num_voxels)
    if num_views * num_voxels > 2**31:
        read_from = read_from.long()
    first_of_view = torch.arange(num_views, device=device, dtype=read_from.dtype) * num_voxels
    return read_from.add_(first_of_view[:, None]).flatten()


@functools.cache
def _boxes(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """Voxels of a window of each extent, counted from its first one, K fastest, (n,)."""
    i, j, _ = shape
    boxes = []
    for extent in extents(shape):
        a, b, c = (torch.arange(n) for n in extent)
        box = (c * i + a[:, None, None]) * j + b[:, None]
        boxes.append(box.flatten().to(device))
    return tuple(boxes)
