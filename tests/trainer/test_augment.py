"""Views against NumPy and SciPy, and against their own randomness."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from models.recipe import CropPairs
from trainer.data import augment
from trainer.randomness import generator

RECIPE = CropPairs(input_size=(16, 16, 16), crop_sizes=((16, 16, 16),))


def random_batch(batch: int, n: int = 16) -> torch.Tensor:
    return torch.rand(batch, 1, n, n, n, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, 2.0, 6.0])
def test_the_blur_matrix_equals_scipys_filter(sigma: float) -> None:
    signal = np.random.default_rng(0).random(12)

    matrix = augment.blur_matrix(12, torch.tensor([sigma], dtype=torch.float64))[0]

    expected = ndimage.gaussian_filter1d(signal, sigma, mode="nearest") if sigma else signal
    np.testing.assert_allclose(matrix.numpy() @ signal, expected, atol=1e-7)


@pytest.mark.parametrize(("num_in", "num_out"), [(96, 64), (112, 64), (32, 64), (64, 64), (33, 16)])
def test_the_resize_matrix_equals_filter_and_interpolation(num_in: int, num_out: int) -> None:
    signal = np.random.default_rng(0).random(num_in)
    scale = num_in / num_out
    sigma = max(0.0, (scale - 1) / 2)
    smooth = ndimage.gaussian_filter1d(signal, sigma, mode="nearest") if sigma else signal
    expected = np.interp((np.arange(num_out) + 0.5) * scale - 0.5, np.arange(num_in), smooth)

    actual = augment.resize_matrix(num_in, num_out).numpy() @ signal

    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_matrices_along_the_axes_equal_a_3d_gaussian() -> None:
    volume = np.random.default_rng(0).random((2, 8, 9, 10)).astype(np.float32)
    sigma = torch.tensor([[0.5, 1.0, 1.5], [2.0, 0.0, 1.0]])
    matrices = [augment.blur_matrix(n, sigma[:, a]) for a, n in enumerate((8, 9, 10))]

    actual = augment.along_axes(torch.from_numpy(volume), matrices).numpy()

    for b in range(2):
        expected = ndimage.gaussian_filter(volume[b], sigma[b].tolist(), mode="nearest")
        np.testing.assert_allclose(actual[b], expected, atol=1e-5)


def test_a_rotation_equals_scipys_and_no_angle_changes_nothing() -> None:
    x = torch.from_numpy(ndimage.gaussian_filter(np.random.default_rng(0).random((16, 16, 4)), 2))
    x = torch.stack([x, x]).float()

    turned = augment.rotate_in_plane(x, torch.tensor([0.0, float(np.deg2rad(10.0))]))

    torch.testing.assert_close(turned[0], x[0], atol=1e-5, rtol=0)
    both = [
        ndimage.rotate(x[1].numpy(), degrees, axes=(0, 1), reshape=False, order=1)
        for degrees in (10, -10)
    ]
    inner = (slice(4, 12), slice(4, 12))
    errors = [np.abs(turned[1].numpy()[inner] - other[inner]).max() for other in both]
    assert min(errors) < 1e-3 < max(errors)


def indicator(flips: tuple[int, int, int], turns: int) -> torch.Tensor:
    code = torch.zeros(7)
    code[:3] = torch.tensor(flips)
    code[3 + turns] = 1
    return code


def test_an_indicator_is_what_numpys_flip_and_rot90_do() -> None:
    codes, expected = [], []
    x = random_batch(1, 8)
    for bits in range(8):
        for turns in range(4):
            flips = (bits & 1, bits >> 1 & 1, bits >> 2 & 1)
            codes.append(indicator(flips, turns))
            axes = [axis for axis, flip in enumerate(flips) if flip]
            expected.append(np.rot90(np.flip(x[0, 0].numpy(), axes), turns, axes=(0, 1)))

    actual = augment.apply_indicators(x.expand(32, -1, -1, -1, -1), torch.stack(codes))

    np.testing.assert_array_equal(actual[:, 0].numpy(), np.stack(expected))
    seen: dict[bytes, int] = {}
    for volume in actual:
        seen[volume.numpy().tobytes()] = seen.get(volume.numpy().tobytes(), 0) + 1
    assert len(seen) == 16 and set(seen.values()) == {2}


def test_drawn_indicators_hold_exactly_one_quarter_turn() -> None:
    codes = augment.draw_indicators(400, generator(0, 1, "indicators"))

    assert (codes[:, 3:].sum(dim=1) == 1).all()
    assert 0.4 < float(codes[:, :3].mean()) < 0.6
    assert (codes[:, 3:].sum(dim=0) > 60).all()


def test_painting_keeps_its_promises_and_leaves_the_clean_view_alone() -> None:
    clean = random_batch(3)
    before = clean.clone()
    kinds = torch.tensor([augment.NONE, augment.INPAINT, augment.OUTPAINT])
    drawn = augment.draw_corruption(RECIPE, kinds, generator(0, 1, "painting"))
    sharp = augment.Corruption(kinds, drawn.box_start, drawn.box_size, torch.zeros(3, 3))

    noise = torch.rand(clean[:, 0].shape, generator=generator(0, 1, "noise"))
    painted = augment.corrupt(clean, sharp, noise)

    inside = augment.inside_boxes(drawn, clean.shape[2:])[:, None]
    same = torch.isclose(painted, clean, atol=1e-6)
    assert same[0].all()
    assert torch.equal(~same[1], inside[1]) and inside[1].any()
    assert torch.equal(same[2], inside[2]) and inside[2].any() and not inside[2].all()
    assert not inside[1:, :, :3].any() and not inside[1:, :, -3:].any()  # three from the border
    assert torch.equal(clean, before)


def test_boxes_have_the_sizes_of_the_paper() -> None:
    recipe = CropPairs()
    kinds = torch.tensor([augment.INPAINT] * 300 + [augment.OUTPAINT] * 300)

    drawn = augment.draw_corruption(recipe, kinds, generator(0, 1, "painting"))

    for half, (low, high) in (
        (slice(0, 300), ((10, 5), (21, 10))),
        (slice(300, 600), ((28, 14), (37, 19))),
    ):
        there = drawn.box_size[half][drawn.box_size[half][..., 0] > 0]
        assert (int(there[:, 0].min()), int(there[:, 2].min())) == low
        assert (int(there[:, 0].max()), int(there[:, 2].max())) == high
    assert (drawn.box_size[300:, 0] > 0).all()


def test_generators_follow_from_seed_step_and_purpose() -> None:
    def draw(seed: int, step: int, purpose: str) -> float:
        return float(torch.rand((), generator=generator(seed, step, purpose)))

    assert draw(3, 5, "pairs") == draw(3, 5, "pairs")
    assert (
        len({draw(3, 5, "pairs"), draw(3, 6, "pairs"), draw(4, 5, "pairs"), draw(3, 5, "mix")}) == 4
    )
