"""Pixel shuffling against the loop that it equals, and against what it must do on average."""

import numpy as np
import pytest
import torch

from trainer.data.shuffle import NUM_ORDERS, Windows, draw_windows, shuffle_pixels, shuffle_some
from trainer.randomness import generator

SHAPE = (30, 20, 24)


def numbered(num_views: int = 2) -> torch.Tensor:
    """Views whose every voxel has its own value."""
    voxels = num_views * int(np.prod(SHAPE))
    return torch.arange(voxels, dtype=torch.float32).reshape(num_views, 1, *SHAPE)


def slow_loop(views: torch.Tensor, windows: Windows) -> torch.Tensor:
    shuffled = views.clone()
    for s in range(len(views)):
        for w in range(windows.extent.shape[1]):
            which = int(windows.extent[s, w])
            first = windows.start[s, w]
            i, j, k = (
                slice(int(a), int(a + n))
                for a, n in zip(first, windows.extents[which], strict=True)
            )
            box = views[s, 0, i, j, k]
            order = windows.orders[which][windows.order[s, w]]
            shuffled[s, 0, i, j, k] = box.flatten()[order].reshape(box.shape)
    return shuffled


def in_slices(views: torch.Tensor) -> torch.Tensor:
    """The same views, K first in memory."""
    return views.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize("num_windows", [1, 1000])
def test_shuffling_equals_the_loop_over_windows(num_windows: int) -> None:
    views = numbered()
    windows = draw_windows(SHAPE, 2, generator(0, 1, "windows"), num_windows=num_windows)

    shuffled = shuffle_pixels(views, windows)

    expected = slow_loop(views, windows)
    assert torch.equal(shuffled, expected)
    assert torch.equal(shuffle_pixels(in_slices(views), windows), expected)
    if num_windows > 1:
        assert not torch.equal(shuffled, slow_loop(views, _backwards(windows)))  # order matters
        assert 0.1 < float((shuffled != views).float().mean()) < 1


def _backwards(windows: Windows) -> Windows:
    turned = (x.flip(1) for x in (windows.extent, windows.start, windows.order))
    extent, start, order = turned
    return Windows(windows.extents, extent, start, order, windows.orders)


def test_no_windows_change_nothing_and_one_window_keeps_its_values() -> None:
    views = numbered(1)
    none = draw_windows(SHAPE, 1, generator(0, 1, "windows"), num_windows=0)
    one = draw_windows(SHAPE, 1, generator(0, 2, "windows"), num_windows=1)

    assert torch.equal(shuffle_pixels(views, none), views)
    assert torch.equal(shuffle_pixels(views, one).flatten().sort().values, views.flatten())


def test_windows_have_the_extents_and_places_of_the_official_code() -> None:
    shape = (64, 64, 32)
    windows = draw_windows(shape, 1, generator(0, 1, "windows"))

    extent = windows.extents[windows.extent[0]]
    room = torch.tensor(shape) - extent
    assert extent.shape == (10_000, 3)
    assert extent.min(dim=0).values.tolist() == [1, 1, 1]
    assert extent.max(dim=0).values.tolist() == [6, 6, 3]
    np.testing.assert_allclose(extent.float().mean(dim=0), [3.5, 3.5, 2], atol=0.06)
    assert (windows.start[0] >= 0).all() and (windows.start[0] <= room).all()
    assert (windows.start[0] == room).any(dim=0).all()
    middle = (windows.start[0] / room).mean(dim=0)
    np.testing.assert_allclose(middle, [0.5] * 3, atol=0.02)


def test_values_travel_as_far_as_in_the_loop_that_draws_a_permutation_for_each_window() -> None:
    shape, num_windows = (40, 40, 30), 4000
    random = np.random.default_rng(0)
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)

    def distances(read_from: np.ndarray) -> np.ndarray:
        i, j, k = np.unravel_index(read_from.astype(np.int64), shape)
        return np.abs(np.stack([i, j, k], axis=-1) - place).reshape(-1, 3)

    numbers = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    loop = numbers.copy()
    for _ in range(num_windows):
        a, b, c = (random.integers(1, n // 10 + 1) for n in shape)
        i, j, k = (
            random.integers(0, n - side + 1) for n, side in zip(shape, (a, b, c), strict=True)
        )
        box = numbers[i : i + a, j : j + b, k : k + c]
        loop[i : i + a, j : j + b, k : k + c] = random.permutation(box.ravel()).reshape(a, b, c)
    windows = draw_windows(shape, 1, generator(0, 1, "windows"), num_windows=num_windows)
    ours = shuffle_pixels(torch.from_numpy(numbers)[None, None], windows)[0, 0].numpy()

    expected, actual = distances(loop), distances(ours)
    np.testing.assert_allclose(actual.mean(axis=0), expected.mean(axis=0), rtol=0.05)
    np.testing.assert_allclose(
        (actual == 0).all(axis=1).mean(), (expected == 0).all(axis=1).mean(), atol=0.02
    )
    assert actual.max(axis=0).tolist() == expected.max(axis=0).tolist() == [3, 3, 2]
    lost = [len(np.unique(x)) / x.size for x in (loop, ours)]  # overwritten values are gone
    assert lost[0] < 0.9 and abs(lost[0] - lost[1]) < 0.02


def test_every_voxel_of_a_window_is_read_equally_often() -> None:
    windows = draw_windows((64, 64, 32), 1, generator(0, 1, "windows"), num_windows=1)
    orders = [order for order in windows.orders if order.shape[1] == 8]

    first = torch.cat(orders)[:, 0]

    counts = torch.bincount(first, minlength=8)
    assert len(first) == NUM_ORDERS * len(orders) and int(counts.sum()) == len(first)
    expected = len(first) / 8
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # chi square, p = 0.001


def test_only_the_chosen_views_are_shuffled_also_when_none_is() -> None:
    views = [in_slices(numbered(3)), in_slices(numbered(3))]
    chosen = torch.tensor([[False, True, False], [False, False, False]])

    one, none = shuffle_some(views, chosen, generator(0, 1, "windows"))

    assert torch.equal(none, views[1])
    assert torch.equal(one[[0, 2]], views[0][[0, 2]])
    assert not torch.equal(one[1], views[0][1])
    assert torch.isin(one[1], views[0][1]).all()
