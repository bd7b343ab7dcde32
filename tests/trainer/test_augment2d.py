"""2D views against Pillow, `colorsys`, NumPy and slow loops."""

import colorsys
import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.preprocess2d import as_channels
from models.recipe import ImageViews, Normalisation
from trainer.data import augment, augment2d, filters, images2d
from trainer.data.augment2d import Corruption2d, Geometry2d
from trainer.data.images2d import ResidentImages
from trainer.randomness import generator

VIEWS = ImageViews(input_size=32, cutout_size=8)


def colours(batch: int = 3, n: int = 32, seed: int = 1) -> Tensor:
    return torch.rand(batch, 3, n, n, generator=torch.Generator().manual_seed(seed))


def resident(x: Tensor) -> ResidentImages:
    return ResidentImages((x * 255).round().to(torch.uint8))


def nothing(batch: int, n: int = 32) -> Corruption2d:
    """A corruption that changes nothing."""
    boxes = torch.zeros(batch, 0, 2, dtype=torch.long)
    off, zero, one = torch.zeros(batch, dtype=torch.bool), torch.zeros(batch), torch.ones(batch)
    return Corruption2d(
        off, boxes, boxes, boxes, boxes, off, zero, one, one, one, zero, torch.arange(4)
    )


def pillow_crop(image: np.ndarray, start: list[int], extent: list[int], n: int) -> np.ndarray:
    (top, left), (rows, columns) = start, extent
    cut = Image.fromarray(image[top : top + rows, left : left + columns])
    return np.asarray(cut.resize((n, n), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("side", [24, 32, 100])
def test_a_clean_view_is_pillows_crop_and_resize_then_a_flip(side: int) -> None:
    images = resident(colours(6, side))
    drawn = augment2d.draw_geometry(VIEWS, side, 6, generator(0, 1, "geometry"))
    flip = torch.tensor([False, True] * 3)
    geometry = Geometry2d(drawn.start, drawn.extent, flip, torch.zeros(6))
    index = torch.tensor([3, 0, 0, 5, 1, 2])

    views = augment2d.make_clean(images, VIEWS, index, geometry)

    assert views.shape == (6, 3, 32, 32) and views.dtype == torch.float32
    mirrored = 0.0
    for b in range(6):
        for c in range(3):
            whole = images.take(index)[b, c].numpy()
            expected = pillow_crop(whole, drawn.start[b].tolist(), drawn.extent[b].tolist(), 32)
            if flip[b]:
                mirrored = max(mirrored, float(np.abs(views[b, c].numpy() - expected).max()))
                expected = expected[:, ::-1]
            np.testing.assert_allclose(views[b, c].numpy(), expected, atol=1e-5)
    assert mirrored > 0.1


def test_a_rotation_turns_all_channels_about_the_centre() -> None:
    base = colours(1)
    disc = torch.zeros(1, 1, 32, 32)
    disc[..., 4:8, 14:18] = 1.0  # above the centre
    images = ResidentImages(torch.cat([base, disc.expand(-1, 3, -1, -1)]).half())
    whole = torch.tensor([[0, 0], [0, 0]]), torch.full((2, 2), 32)
    angle = torch.tensor([0.0, math.radians(45)])

    views = augment2d.make_clean(
        images, VIEWS, torch.tensor([0, 1]), Geometry2d(*whole, torch.zeros(2).bool(), angle)
    )

    torch.testing.assert_close(views[0], base[0].half().float(), atol=1e-5, rtol=0)
    rows, columns = (views[1, 0].sum(dim=1 - axis) for axis in (0, 1))
    position = torch.arange(32) + 0.5 - 16
    at = [float((mass * position).sum() / mass.sum()) for mass in (rows, columns)]
    assert at[0] == pytest.approx(-10 * math.cos(math.radians(45)), abs=0.2)
    assert abs(at[1]) == pytest.approx(10 * math.sin(math.radians(45)), abs=0.2)
    assert torch.equal(views[1, 0], views[1, 2])


def test_crops_have_the_areas_and_ratios_of_the_recipe_and_lie_inside() -> None:
    views = ImageViews()

    drawn = augment2d.draw_geometry(views, 224, 4000, generator(0, 1, "geometry"))

    rows, columns = drawn.extent.double().unbind(dim=1)
    area, ratio = rows * columns / 224**2, columns / rows
    assert 0.19 < area.min() < 0.22 and 0.98 < area.max() <= 1.0
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.345
    # Large crops of another ratio do not fit and are drawn again, so the mean lies below 0.6.
    assert 0.52 < area.mean() < 0.6
    assert (drawn.start >= 0).all() and (drawn.start + drawn.extent <= 224).all()
    last = drawn.start + drawn.extent == 224
    assert last.any(dim=0).all() and (drawn.start == 0).any(dim=0).all()
    assert 0.45 < drawn.flip.double().mean() < 0.55
    degrees = drawn.angle.rad2deg()
    assert -10.001 <= degrees.min() < -9.9 and 9.9 < degrees.max() <= 10.001


def test_a_crop_that_never_fits_is_the_whole_image() -> None:
    views = ImageViews(crop_area=(0.99, 1.0), crop_ratio=(3.0, 4.0))

    drawn = augment2d.draw_geometry(views, 64, 8, generator(0, 1, "geometry"))

    assert (drawn.extent == 64).all() and (drawn.start == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_corruption_of_nothing_is_the_normalised_clean_view(channels: int) -> None:
    clean = colours()[:, :channels]
    before = clean.clone()

    spoiled = augment2d.corrupt(clean, nothing(3), Normalisation(), generator(0, 1, "noise"))

    torch.testing.assert_close(spoiled, images2d.as_channels(clean, Normalisation()))
    assert spoiled.shape == (3, 3, 32, 32)
    if channels == 1:
        served = as_channels(clean[0, 0].numpy(), Normalisation())
        np.testing.assert_allclose(spoiled[0].numpy(), served, atol=1e-5)
    plain = augment2d.corrupt(clean, nothing(3), None, generator(0, 1, "noise"))
    torch.testing.assert_close(plain, clean.expand(-1, 3, -1, -1))
    assert torch.equal(clean, before)


def test_outpainting_keeps_the_windows_and_puts_noise_elsewhere() -> None:
    clean = colours()
    outpainted = torch.tensor([True, False, True])
    random = generator(0, 1, "painting")
    drawn = augment2d.draw_corruption(VIEWS, outpainted, random)
    only = dataclasses.replace(
        nothing(3),
        outpainted=outpainted,
        window_start=drawn.window_start,
        window_size=drawn.window_size,
    )

    painted = augment2d.corrupt(clean, only, None, generator(0, 1, "noise"))

    kept = torch.zeros(3, 32, 32, dtype=torch.bool)
    for b in range(3):
        for (top, left), (rows, columns) in zip(
            drawn.window_start[b].tolist(), drawn.window_size[b].tolist(), strict=True
        ):
            kept[b, top : top + rows, left : left + columns] = True
    assert not kept[1].any() and kept[0].any() and not kept[0].all()
    kept[1] = True
    same = torch.isclose(painted, clean, atol=1e-6).all(dim=1)
    assert torch.equal(same, kept)
    assert painted.min() >= 0 and painted.max() <= 1
    there = drawn.window_size[drawn.window_size[..., 0] > 0]
    assert there.min() >= 32 - 4 * 32 // 7 and there.max() <= 32 - 3 * 32 // 7


def test_holes_are_zeros_after_the_normalisation_about_uniform_centres() -> None:
    clean = colours()
    drawn = augment2d.draw_corruption(VIEWS, torch.zeros(3).bool(), generator(0, 1, "painting"))
    only = dataclasses.replace(nothing(3), hole_start=drawn.hole_start, hole_size=drawn.hole_size)

    spoiled = augment2d.corrupt(clean, only, Normalisation(), generator(0, 1, "noise"))

    expected = images2d.as_channels(clean, Normalisation()).clone()
    for b in range(3):
        assert len(drawn.hole_start[b]) == 3
        for top, left in drawn.hole_start[b].tolist():
            rows = slice(max(top, 0), max(top + 8, 0))
            expected[b, :, rows, max(left, 0) : max(left + 8, 0)] = 0.0
    torch.testing.assert_close(spoiled, expected)
    assert 0 < (spoiled == 0).all(dim=1).float().mean() <= 3 * 64 / 1024


def test_an_image_is_either_painted_outside_or_cut_out() -> None:
    outpainted = augment2d.draw_outpainting(VIEWS, 1000, generator(0, 1, "painting"))

    drawn = augment2d.draw_corruption(VIEWS, outpainted, generator(0, 2, "painting"))

    assert 0.45 < outpainted.double().mean() < 0.55
    assert torch.equal((drawn.window_size > 0).any(dim=2).any(dim=1), outpainted)
    assert torch.equal((drawn.hole_size > 0).any(dim=2).any(dim=1), ~outpainted)
    centres = (drawn.hole_start + 4)[~outpainted]
    assert centres.min() == 0 and centres.max() == 31


def test_blur_is_a_gaussian_along_both_axes_of_the_drawn_half() -> None:
    clean = colours()
    sigma = torch.tensor([0.0, 0.8, 2.0])

    blurred = augment2d.corrupt(
        clean, dataclasses.replace(nothing(3), blur_sigma=sigma), None, generator(0, 1, "noise")
    )

    torch.testing.assert_close(blurred[0], clean[0])
    matrix = filters.blur_matrix(32, sigma)
    for b in (1, 2):
        for c in range(3):
            expected = matrix[b] @ clean[b, c] @ matrix[b].T
            torch.testing.assert_close(blurred[b, c], expected)
    drawn = augment2d.draw_corruption(ImageViews(), torch.zeros(2000).bool(), generator(0, 1, "p"))
    there = drawn.blur_sigma[drawn.blur_sigma > 0]
    assert 0.45 < len(there) / 2000 < 0.55 and there.min() >= 0.1 and there.max() <= 2.0


def slow_change(image: np.ndarray, name: str, by: float) -> np.ndarray:
    """One change of colour, a pixel at a time, (3, n, n)."""
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    out = np.empty_like(image)
    for r in range(image.shape[1]):
        for c in range(image.shape[2]):
            pixel = image[:, r, c]
            if name == "brightness":
                changed = by * pixel
            elif name == "contrast":
                changed = by * pixel + (1 - by) * grey.mean()
            elif name == "saturation":
                changed = by * pixel + (1 - by) * grey[r, c]
            else:
                hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
                changed = np.array(colorsys.hsv_to_rgb((hue + by) % 1, saturation, value))
            out[:, r, c] = np.clip(changed, 0, 1)
    return out


NAMES = ("brightness", "contrast", "saturation", "hue")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_colours_change_as_a_pixel_at_a_time_in_the_drawn_order(order: tuple[int, ...]) -> None:
    x = colours(2, 6)
    x[0, :, 0, 0] = 0.5  # grey has no hue
    by = {
        "brightness": torch.tensor([1.3, 0.7]), "contrast": torch.tensor([0.6, 1.4]),
        "saturation": torch.tensor([1.4, 0.8]), "hue": torch.tensor([0.35, -0.2]),
    }  # fmt: skip
    corruption = dataclasses.replace(nothing(2), **by, order=torch.tensor(order))

    changed = augment2d.change_colours(x, corruption).numpy()

    for b in range(2):
        expected = x[b].double().numpy()
        for place in order:
            expected = slow_change(expected, NAMES[place], float(by[NAMES[place]][b]))
        np.testing.assert_allclose(changed[b], expected, atol=1e-5)


def test_saturation_hue_and_grayscale_change_colours_and_no_grey_image() -> None:
    each = [{"saturation": torch.tensor([0.6])}, {"hue": torch.tensor([0.3])},
            {"is_grey": torch.tensor([True])}]  # fmt: skip
    coloured, grey = colours(1), colours(1)[:, :1]
    for change in each:
        corruption = dataclasses.replace(nothing(1), **change)
        after = [
            augment2d.corrupt(x, corruption, None, generator(0, 1, "noise"))
            for x in (coloured, grey, grey.expand(-1, 3, -1, -1))
        ]

        assert (after[0] - coloured).abs().max() > 0.1
        torch.testing.assert_close(after[1], grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(after[2], after[1])


def test_changes_are_drawn_as_wide_as_the_recipe_says() -> None:
    views = ImageViews(brightness=0.4, contrast=0.1, saturation=0.0, hue=0.4)

    drawn = augment2d.draw_corruption(views, torch.zeros(2000).bool(), generator(0, 1, "p"))

    for factor, low, high in (
        (drawn.brightness, 0.6, 1.4), (drawn.contrast, 0.9, 1.1), (drawn.saturation, 1.0, 1.0),
        (drawn.hue, -0.4, 0.4),
    ):  # fmt: skip
        assert (
            low - 1e-6 <= factor.min() <= low + 0.01 and high - 0.01 <= factor.max() <= high + 1e-6
        )
    assert 0.17 < drawn.is_grey.double().mean() < 0.23
    assert sorted(drawn.order.tolist()) == [0, 1, 2, 3]


def test_the_clean_view_knows_nothing_of_the_corruption() -> None:
    """Row 10: what was drawn for the painting must not move the target."""
    images = resident(colours(4, 40))
    index = torch.arange(4)

    def make(painting: int) -> tuple[Tensor, Tensor]:
        geometry = augment2d.draw_geometry(VIEWS, 40, 4, generator(0, 1, "geometry"))
        clean = augment2d.make_clean(images, VIEWS, index, geometry)
        random = generator(0, painting, "painting")
        drawn = augment2d.draw_corruption(
            VIEWS, augment2d.draw_outpainting(VIEWS, 4, random), random
        )
        return clean, augment2d.corrupt(clean, drawn, None, generator(0, painting, "noise"))

    one, again, other = make(1), make(1), make(2)

    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])


def test_a_2d_indicator_is_what_numpys_flip_and_rot90_do() -> None:
    x = colours(1, 6)
    codes, expected = [], []
    for bits in range(4):
        for turns in range(4):
            flips = (bits & 1, bits >> 1 & 1)
            codes.append(torch.tensor([*flips, *(int(turns == t) for t in range(4))]).float())
            axes = [1 + axis for axis, flip in enumerate(flips) if flip]
            expected.append(np.rot90(np.flip(x[0].numpy(), axes), turns, axes=(1, 2)))

    actual = augment.apply_indicators(x.expand(16, -1, -1, -1), torch.stack(codes))

    np.testing.assert_array_equal(actual.numpy(), np.stack(expected))
    seen: dict[bytes, int] = {}
    for image in actual:
        seen[image.numpy().tobytes()] = seen.get(image.numpy().tobytes(), 0) + 1
    assert len(seen) == 8 and set(seen.values()) == {2}


def test_drawn_2d_indicators_hold_two_flips_and_exactly_one_quarter_turn() -> None:
    codes = augment.draw_indicators(400, generator(0, 1, "indicators"), dims=2)

    assert codes.shape == (400, 6)
    assert (codes[:, 2:].sum(dim=1) == 1).all()
    assert 0.4 < float(codes[:, :2].mean()) < 0.6
    assert (codes[:, 2:].sum(dim=0) > 60).all()
