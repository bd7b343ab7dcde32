"""Pixel shuffling against the loop that it equals, and against what it must do on average."""

import dataclasses

import numpy as np
import pytest
import torch

from trainer.data.shuffle import (
    NUM_ORDERS,
    Windows,
    draw_orders,
    draw_windows,
    extents,
    shuffle_pixels,
    shuffle_some,
)
from trainer.randomness import generator

SHAPE = (30, 20, 24)


def windows_of(
    num_views: int, num_windows: int = 10_000, shape: tuple[int, int, int] = SHAPE
) -> Windows:
    on_host, on_device = generator(0, 1, "extents"), generator(0, 1, "windows")
    return draw_windows(shape, num_views, on_host, on_device, num_windows=num_windows)


def orders_of(shape: tuple[int, int, int] = SHAPE) -> tuple[torch.Tensor, ...]:
    return draw_orders(shape, generator(0, 1, "orders"))


def extent_of_each(windows: Windows) -> torch.Tensor:
    """Which extent each window has."""
    return torch.arange(len(windows.counts)).repeat_interleave(torch.tensor(windows.counts))


def numbered(num_views: int = 2) -> torch.Tensor:
    """Views whose every voxel has its own value."""
    voxels = num_views * int(np.prod(SHAPE))
    return torch.arange(voxels, dtype=torch.float32).reshape(num_views, 1, *SHAPE)


def slow_loop(
    views: torch.Tensor, windows: Windows, orders: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    shuffled = views.clone()
    which = extent_of_each(windows)
    for w in windows.rank.argsort().tolist():
        s = int(windows.view[w])
        extent = extents(SHAPE)[int(which[w])]
        i, j, k = (slice(int(a), int(a) + n) for a, n in zip(windows.start[w], extent, strict=True))
        order = orders[int(which[w])][windows.order[w]]
        box = views[s, 0, i, j, k]
        shuffled[s, 0, i, j, k] = box.flatten()[order].reshape(box.shape)
    return shuffled


def in_slices(views: torch.Tensor) -> torch.Tensor:
    """The same views, K first in memory."""
    return views.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize("num_windows", [1, 1000])
def test_shuffling_equals_the_loop_over_windows(num_windows: int) -> None:
    views = numbered()
    windows, orders = windows_of(2, num_windows), orders_of()

    shuffled = shuffle_pixels(views, windows, orders)

    expected = slow_loop(views, windows, orders)
    assert torch.equal(shuffled, expected)
    assert torch.equal(shuffle_pixels(in_slices(views), windows, orders), expected)
    if num_windows > 1:
        backwards = dataclasses.replace(windows, rank=num_windows - 1 - windows.rank)
        assert not torch.equal(shuffled, slow_loop(views, backwards, orders))  # turns matter
        assert 0.1 < float((shuffled != views).float().mean()) < 1


def test_no_windows_change_nothing_and_one_window_keeps_its_values() -> None:
    views, orders = numbered(1), orders_of()

    assert torch.equal(shuffle_pixels(views, windows_of(1, 0), orders), views)
    one = shuffle_pixels(views, windows_of(1, 1), orders)
    assert torch.equal(one.flatten().sort().values, views.flatten())


def test_only_the_chosen_views_are_shuffled_and_the_originals_stay() -> None:
    views = [numbered(12), numbered(12)]
    chosen = torch.zeros(2, 12, dtype=torch.bool)
    chosen[0, 1:] = True  # more than a CPU shuffles at once

    def shuffled() -> list[torch.Tensor]:
        return shuffle_some(views, chosen, generator(0, 1, "extents"), generator(0, 1, "windows"))

    first, again = shuffled(), shuffled()

    is_changed = torch.stack(
        [(a != b).flatten(1).any(dim=1) for a, b in zip(first, views, strict=True)]
    )
    assert torch.equal(is_changed, chosen)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(view, numbered(12)) for view in views)
    moves = [first[0][at] - views[0][at] for at in (1, 2)]
    assert not torch.equal(*moves)  # every view has windows of its own


def test_windows_have_the_extents_and_places_of_the_official_code() -> None:
    shape = (64, 64, 32)
    windows = windows_of(2, 10_000, shape)

    extent = torch.tensor(extents(shape))[extent_of_each(windows)]
    room = torch.tensor(shape) - extent
    assert extent.shape == (20_000, 3)
    assert extent.min(dim=0).values.tolist() == [1, 1, 1]
    assert extent.max(dim=0).values.tolist() == [6, 6, 3]
    for view in (0, 1):
        own = windows.view == view
        assert windows.rank[own].sort().values.tolist() == list(range(10_000))
        np.testing.assert_allclose(extent[own].float().mean(dim=0), [3.5, 3.5, 2], atol=0.08)
        ranked = np.corrcoef(windows.rank[own], extent[own].prod(dim=1))[0, 1]
        assert abs(ranked) < 0.04  # big windows come early and late
    assert (windows.start >= 0).all() and (windows.start <= room).all()
    assert (windows.start == room).any(dim=0).all()
    np.testing.assert_allclose((windows.start / room).mean(dim=0), [0.5] * 3, atol=0.02)


def public_loop(view: np.ndarray, num_windows: int, random: np.random.Generator) -> np.ndarray:
    """A permutation of its own for each window, drawn in turn."""
    shuffled = view.copy()
    for _ in range(num_windows):
        extent = [random.integers(1, n // 10 + 1) for n in view.shape]
        first = [random.integers(0, n - e + 1) for n, e in zip(view.shape, extent, strict=True)]
        at = tuple(slice(f, f + e) for f, e in zip(first, extent, strict=True))
        shuffled[at] = random.permutation(view[at].ravel()).reshape(extent)
    return shuffled


def test_values_travel_as_far_as_in_a_loop_with_a_permutation_for_each_window() -> None:
    shape, num_windows = (30, 30, 20), 1500
    random = np.random.default_rng(0)
    numbers = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    place = np.stack(np.unravel_index(np.arange(numbers.size), shape), axis=-1)

    def distances(shuffled: np.ndarray) -> np.ndarray:
        read_from = np.unravel_index(shuffled.astype(np.int64).reshape(len(shuffled), -1), shape)
        return np.abs(np.stack(read_from, axis=-1) - place)  # (S, voxels, 3)

    loop = np.stack([public_loop(numbers, num_windows, random) for _ in range(20)])
    views = torch.from_numpy(numbers).expand(60, 1, *shape)
    windows = windows_of(60, num_windows, shape)
    ours = shuffle_pixels(views, windows, orders_of(shape))[:, 0].numpy()

    expected, actual = distances(loop), distances(ours)
    np.testing.assert_allclose(actual.mean(axis=(0, 1)), expected.mean(axis=(0, 1)), rtol=0.03)
    stayed = [(x == 0).all(axis=2).mean() for x in (expected, actual)]
    np.testing.assert_allclose(stayed[1], stayed[0], atol=0.01)
    assert actual.max(axis=(0, 1)).tolist() == expected.max(axis=(0, 1)).tolist() == [2, 2, 1]
    kept = [np.mean([len(np.unique(x)) / x.size for x in many]) for many in (loop, ours)]
    assert kept[0] < 0.97 and abs(kept[0] - kept[1]) < 0.01  # what is overwritten is lost
    half = shuffle_pixels(views, windows_of(60, num_windows // 2, shape), orders_of(shape))
    assert (distances(half[:, 0].numpy()) == 0).all(axis=2).mean() > stayed[0] + 0.1


def test_every_voxel_of_a_window_is_read_equally_often() -> None:
    orders = [order for order in orders_of((64, 64, 32)) if order.shape[1] == 8]

    first = torch.cat(orders)[:, 0]

    counts = torch.bincount(first, minlength=8)
    assert len(first) == NUM_ORDERS * len(orders) and int(counts.sum()) == len(first)
    expected = len(first) / 8
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # chi square, p = 0.001
