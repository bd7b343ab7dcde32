"""2D preprocessing against a slow definition, and the recipes of 2D."""

import numpy as np
import pytest
from pydantic import ValidationError

from models.preprocess2d import as_channels, prepare_image
from models.recipe import (
    ImageViews,
    Normalisation,
    OwnRange,
    Percentiles,
    Preprocessing2d,
    ResNetUNet2d,
)


def shrunk(line: np.ndarray, num_out: int) -> np.ndarray:
    """A line through a triangle that widens with the step."""
    scale = len(line) / num_out
    out = []
    for o in range(num_out):
        centre = (o + 0.5) * scale
        weights = [max(0.0, 1 - abs(p + 0.5 - centre) / max(scale, 1)) for p in range(len(line))]
        out.append(np.average(line, weights=weights))
    return np.array(out)


@pytest.mark.parametrize("shape", [(70, 50), (20, 90), (32, 32)])
def test_an_image_is_scaled_by_its_own_range_and_stretched_without_aliases(shape) -> None:
    pixels = np.random.default_rng(0).normal(300, 50, shape).astype(np.float32)

    square = prepare_image(pixels, Preprocessing2d(size=32))

    scaled = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    tall = np.stack([shrunk(column, 32) for column in scaled.T], axis=1)
    expected = np.stack([shrunk(row, 32) for row in tall])
    assert square.dtype == np.float32 and square.shape == (32, 32)
    np.testing.assert_allclose(square, expected, atol=1e-5)
    nearest = scaled[np.arange(32) * shape[0] // 32][:, np.arange(32) * shape[1] // 32]
    assert shape == (32, 32) or np.abs(square - nearest).max() > 0.1


@pytest.mark.parametrize("gain", [1.0, 37.0])
def test_gain_and_offset_of_the_file_do_not_matter(gain) -> None:
    pixels = np.random.default_rng(0).random((40, 40)).astype(np.float32)

    changed = prepare_image(gain * pixels - 5, Preprocessing2d(size=32))

    np.testing.assert_allclose(changed, prepare_image(pixels, Preprocessing2d(size=32)), atol=1e-5)


def test_percentiles_clip_what_lies_outside() -> None:
    pixels = np.arange(32.0 * 32, dtype=np.float32).reshape(32, 32)
    pixels[0, 0] = 1e6  # a burnt-in mark

    spec = Preprocessing2d(size=32, intensity=Percentiles(low=10, high=90))
    square = prepare_image(pixels, spec)

    low, high = np.percentile(pixels, [10, 90])
    np.testing.assert_allclose(square, np.clip((pixels - low) / (high - low), 0, 1), atol=1e-6)
    by_range = prepare_image(pixels, Preprocessing2d(size=32, intensity=OwnRange()))
    assert np.median(by_range) < 0.01 < 0.4 < np.median(square)


def test_percentiles_of_one_value_fall_back_to_the_range() -> None:
    pixels = np.zeros((32, 32), dtype=np.float32)
    pixels[0, 0] = 5

    square = prepare_image(pixels, Preprocessing2d(size=32, intensity=Percentiles()))

    assert square[0, 0] == 1 and square.sum() == 1


def test_channels_are_normalised_as_imagenets_or_left() -> None:
    square = np.full((2, 2), 0.485, dtype=np.float32)

    channels = as_channels(square, Normalisation())

    assert channels.shape == (3, 2, 2)
    np.testing.assert_allclose(channels[0], 0, atol=1e-6)
    np.testing.assert_allclose(channels[2], (0.485 - 0.406) / 0.225, rtol=1e-5)
    np.testing.assert_array_equal(as_channels(square, None), 0.485 * np.ones((3, 2, 2), np.float32))


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        (ResNetUNet2d, {"width": 6}),
        (Preprocessing2d, {"size": 100}),
        (ImageViews, {"input_size": 225}),
        (ImageViews, {"crop_area": (0.8, 0.2)}),
        (ImageViews, {"crop_area": (0.0, 1.0)}),
        (Percentiles, {"low": 50, "high": 50}),
    ],
)
def test_a_part_that_cannot_be_used_is_refused(part, fields) -> None:
    part()
    with pytest.raises(ValidationError):
        part(**fields)
