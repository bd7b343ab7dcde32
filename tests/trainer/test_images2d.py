"""The cache of 2D images, the tensor they lie in, and which of them a step takes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.preprocess2d import prepare_image
from models.recipe import Preprocessing2d
from trainer.data.images2d import ImageCache, ResidentImages, draw_batch
from trainer.data.scans import ScanFile
from trainer.errors import DataError

SPEC = Preprocessing2d(size=32)


def film(folder: Path, name: str = "film", seed: int = 0) -> ScanFile:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return ScanFile(name, (folder / f"{name}.png",), None, name, "train")


@pytest.mark.parametrize(("stored", "error"), [("uint8", 0.5 / 255), ("float16", 2**-12)])
def test_a_square_is_kept_to_its_precision(tmp_path, stored, error) -> None:
    scan = film(tmp_path)
    cache = ImageCache(tmp_path / "cache", stored)

    images = ResidentImages.of([cache.image(scan, SPEC)], device=torch.device("cpu"))

    with Image.open(scan.image) as picture:
        expected = prepare_image(np.asarray(picture, dtype=np.float32), SPEC)
    taken = images.take(torch.tensor([0]))[0, 0].numpy()
    assert str(images.pixels.dtype) == f"torch.{stored}"
    assert 0 < np.abs(taken - expected).max() <= error + 1e-6


def test_an_image_is_decoded_once(tmp_path, monkeypatch) -> None:
    scan, cache = film(tmp_path), ImageCache(tmp_path / "cache")
    first = cache.image(scan, SPEC)
    monkeypatch.setattr("imaging.image2d.read_image", None)

    np.testing.assert_array_equal(cache.image(scan, SPEC), first)
    without = SPEC.model_copy(update={"normalisation": None})
    np.testing.assert_array_equal(cache.image(scan, without), first)
    with pytest.raises(TypeError):  # another size is another file
        cache.image(scan, Preprocessing2d(size=64))


def test_another_file_or_type_is_another_square(tmp_path) -> None:
    folder = tmp_path / "cache"
    one, two = film(tmp_path, "one", 1), film(tmp_path, "two", 2)

    squares = [
        ImageCache(folder).image(one, SPEC),
        ImageCache(folder).image(two, SPEC),
        ImageCache(folder, "float16").image(one, SPEC),
    ]

    assert len(list(folder.glob("*.npy"))) == 3 == len(list(folder.iterdir()))
    assert not np.array_equal(squares[0], squares[1])
    assert squares[2].dtype == np.float16


def test_an_unreadable_image_is_named_with_its_reason(tmp_path) -> None:
    scan = film(tmp_path)
    scan.image.write_bytes(scan.image.read_bytes()[:300])

    with pytest.raises(DataError) as caught:
        ImageCache(tmp_path / "cache").image(scan, SPEC)

    assert caught.value.code == "unusable_scan"
    assert "film: truncated_file" in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_images_are_taken_by_their_places() -> None:
    squares = [np.full((4, 4), value, np.uint8) for value in (0, 51, 255)]
    images = ResidentImages.of(squares, device=torch.device("cpu"))

    taken = images.take(torch.tensor([2, 0, 1, 1]))

    assert taken.shape == (4, 1, 4, 4)
    torch.testing.assert_close(taken[:, 0, 0, 0], torch.tensor([1.0, 0.0, 0.2, 0.2]))


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (7, 7), (3, 8)])
def test_every_image_comes_once_an_epoch(num_images, batch_size) -> None:
    steps = [draw_batch(num_images, batch_size, seed=3, step=s) for s in range(1, num_images + 1)]

    stream = torch.cat(steps).reshape(-1, num_images)  # as many epochs as a batch is long
    assert len(stream) == batch_size
    for epoch in stream:
        assert epoch.sort().values.tolist() == list(range(num_images))
    assert len({tuple(epoch.tolist()) for epoch in stream}) > 1
    assert torch.equal(draw_batch(num_images, batch_size, seed=3, step=2), steps[1])
    assert not torch.equal(
        torch.cat([draw_batch(num_images, batch_size, seed=4, step=s) for s in (1, 2)]),
        torch.cat(steps[:2]),
    )
