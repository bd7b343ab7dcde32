"""Pairs and patches keep the rules of the recipe."""

import numpy as np
import pytest
import torch

from models.recipe import CropPairs
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler, PatchSampler, tissue_mask
from trainer.errors import DataError
from trainer.randomness import generator

SIZES = ((16, 16, 8), (24, 24, 12), (24, 24, 24))
CPU = torch.device("cpu")


def iou(pairs_start: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
    shared = (extent - (pairs_start[:, 0] - pairs_start[:, 1]).abs()).clamp(min=0).double()
    overlap, volume = shared.prod(dim=1), extent.double().prod(dim=1)
    return overlap / (2 * volume - overlap)


def test_pairs_overlap_enough_have_one_size_and_stay_inside() -> None:
    recipe = CropPairs(crop_sizes=SIZES, input_size=(16, 16, 8))
    shapes = torch.tensor([[40, 50, 30], [24, 24, 24]])

    pairs = PairSampler(recipe, shapes).draw(2000, generator(0, 1, "pairs"))

    extent = torch.tensor(SIZES)[pairs.size]
    overlaps = iou(pairs.start, extent)
    assert (overlaps > 0.2).all() and float(overlaps.min()) < 0.25  # the whole range is used
    assert (pairs.start >= 0).all()
    assert (pairs.start + extent[:, None] <= shapes[pairs.volume][:, None]).all()
    assert set(pairs.size.tolist()) == {0, 1, 2} and set(pairs.volume.tolist()) == {0, 1}


def half_tissue() -> np.ndarray:
    image = np.zeros((48, 48, 32), dtype=np.float32)
    image[24:] = 1.0
    return image


def test_no_crop_holds_more_tissue_than_allowed() -> None:
    recipe = CropPairs(crop_sizes=SIZES, input_size=(16, 16, 8), max_tissue=0.15)
    shapes = torch.tensor([[48, 48, 32]])
    mask = tissue_mask(half_tissue(), 0.5)

    pairs = PairSampler(recipe, shapes, [mask]).draw(300, generator(0, 1, "pairs"))

    def shares(starts: torch.Tensor, sizes: torch.Tensor) -> list[float]:
        found = []
        for (i, j, k), size in zip(
            starts.reshape(-1, 3).tolist(), sizes.repeat_interleave(2), strict=True
        ):
            a, b, c = SIZES[int(size)]
            found.append(float(mask[i : i + a, j : j + b, k : k + c].mean()))
        return found

    free = PairSampler(recipe.model_copy(update={"max_tissue": None}), shapes)
    control = free.draw(300, generator(0, 1, "pairs"))
    assert max(shares(pairs.start, pairs.size)) < 0.15
    assert max(shares(control.start, control.size)) > 0.5
    assert (iou(pairs.start, torch.tensor(SIZES)[pairs.size]) > 0.2).all()


def test_scans_that_are_all_tissue_are_refused() -> None:
    recipe = CropPairs(crop_sizes=SIZES, input_size=(16, 16, 8), max_tissue=0.15)

    with pytest.raises(DataError, match="too_much_tissue"):
        PairSampler(recipe, torch.tensor([[30, 30, 30]]), [np.ones((30, 30, 30), dtype=bool)])


def test_tissue_counts_only_in_three_consecutive_slices() -> None:
    image = np.zeros((1, 1, 8), dtype=np.float32)
    image[..., [0, 1, 4, 5, 6]] = 1

    assert tissue_mask(image, 0.5).ravel().tolist() == [False] * 5 + [True, False, False]


def test_thin_scans_are_padded_with_their_background() -> None:
    volume = np.arange(1, 1 + 10 * 10 * 3, dtype=np.float16).reshape(10, 10, 3)

    resident = Resident.of([volume, volume], fill=[-1.0, 0.0], at_least=(8, 12, 8), device=CPU)

    whole = resident.crop(torch.tensor([0]), torch.zeros(1, 3, dtype=torch.long), (10, 12, 8))[0]
    assert resident.shapes.tolist() == [[10, 12, 8]] * 2
    assert torch.equal(whole[:, 1:11, 2:5], torch.from_numpy(volume))
    assert int((whole == -1).sum()) == 10 * 12 * 8 - volume.size


def test_crops_equal_slices() -> None:
    random = np.random.default_rng(0)
    volumes = [random.random(shape).astype(np.float16) for shape in ((9, 8, 7), (6, 10, 11))]
    resident = Resident.of(volumes, fill=[0, 0], at_least=(4, 4, 4), device=CPU)

    crops = resident.crop(torch.tensor([1, 0]), torch.tensor([[2, 5, 7], [0, 3, 1]]), (4, 5, 4))

    assert np.array_equal(crops[0], volumes[1][2:6, 5:10, 7:11])
    assert np.array_equal(crops[1], volumes[0][0:4, 3:8, 1:5])


def test_patches_centre_on_the_classes_in_turn() -> None:
    labels = np.zeros((32, 32, 32), dtype=np.uint8)
    labels[16, 16, 16], labels[10, 20, 12] = 1, 2
    resident = Resident.of([labels], fill=[0], at_least=(8, 8, 8), device=CPU)

    def draw(share: float) -> list[list[int]]:
        sampler = PatchSampler(resident, 2, (8, 8, 8), foreground_share=share, flip_probability=0.0)
        return sampler.draw(4, 1, generator(0, 1, "patches")).start.tolist()

    assert draw(1.0) == [[12, 12, 12], [6, 16, 8]] * 2
    assert draw(0.0) != draw(1.0)
