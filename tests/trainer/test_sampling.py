"""Pairs and patches keep the rules of the recipe."""

import numpy as np
import pytest
import torch

from models.recipe import CropPairs
from trainer.data.resident import Resident
from trainer.data.sampling import Pairs, PairSampler, PatchSampler, iou, tissue_mask
from trainer.errors import DataError
from trainer.randomness import generator

SIZES = ((16, 16, 8), (24, 24, 12), (24, 24, 24))
CPU = torch.device("cpu")


def boxes(pairs: Pairs, sizes=SIZES) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and extents of both boxes of each pair, (B, 2, 3)."""
    return pairs.start, torch.tensor(sizes)[pairs.size]


def overlaps(pairs: Pairs, sizes=SIZES) -> torch.Tensor:
    start, extent = boxes(pairs, sizes)
    return iou(start[:, 0], extent[:, 0], start[:, 1], extent[:, 1])


def test_overlap_equals_counting_voxels() -> None:
    random = np.random.default_rng(0)
    starts, extents = random.integers(0, 6, (40, 2, 3)), random.integers(3, 9, (40, 2, 3))
    expected = []
    for start, extent in zip(starts, extents, strict=True):
        inside = np.zeros((2, 16, 16, 16), dtype=bool)
        for box, (i, j, k), (a, b, c) in zip(inside, start, extent, strict=True):
            box[i : i + a, j : j + b, k : k + c] = True
        expected.append((inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum())

    one, other = ((torch.from_numpy(starts[:, n]), torch.from_numpy(extents[:, n])) for n in (0, 1))

    np.testing.assert_allclose(iou(*one, *other).numpy(), expected)
    assert 0 in expected and max(expected) > 0.3


def test_pairs_overlap_enough_have_one_size_and_stay_inside() -> None:
    recipe = CropPairs(crop_sizes=SIZES, input_size=(16, 16, 8))
    shapes = torch.tensor([[40, 50, 30], [24, 24, 24]])

    def draw(recipe: CropPairs) -> Pairs:
        return PairSampler(recipe, shapes).draw(2000, generator(0, 1, "pairs"))

    pairs, control = draw(recipe), draw(recipe.model_copy(update={"min_iou": 0.0}))

    start, extent = boxes(pairs)
    found = overlaps(pairs)
    assert (found > 0.2).all() and float(found.min()) < 0.25  # the whole range is used
    assert float(overlaps(control).min()) < 0.1
    assert (start >= 0).all()
    assert (start + extent <= shapes[pairs.volume][:, None]).all()
    assert torch.equal(pairs.size[:, 0], pairs.size[:, 1])
    assert set(pairs.size.flatten().tolist()) == {0, 1, 2} and set(pairs.volume.tolist()) == {0, 1}


OFFICIAL_SIZES = ((64, 64, 32), (96, 96, 48), (96, 96, 96), (32, 32, 16), (112, 112, 64))


def test_sizes_drawn_apart_meet_only_where_they_can_overlap_enough() -> None:
    """Row 25: of the ten unequal pairs of the official code's sizes six can never pass."""
    recipe = CropPairs(crop_sizes=OFFICIAL_SIZES, equal_sizes=False, min_iou=0.25)
    shapes = torch.tensor([[300, 280, 200], [112, 130, 96]])

    pairs = PairSampler(recipe, shapes).draw(3000, generator(0, 1, "pairs"))

    start, extent = boxes(pairs, OFFICIAL_SIZES)
    met = {tuple(sorted(pair)) for pair in pairs.size.tolist()}
    assert met == {(n, n) for n in range(5)} | {(0, 1), (1, 2), (1, 4), (2, 4)}
    assert {(0, 1), (1, 0)} <= {tuple(pair) for pair in pairs.size.tolist()}
    assert float(overlaps(pairs, OFFICIAL_SIZES).min()) > 0.25
    assert (start >= 0).all() and (start + extent <= shapes[pairs.volume][:, None]).all()


def test_crops_keep_away_from_the_faces_as_far_as_there_is_room() -> None:
    recipe = CropPairs(crop_sizes=SIZES, input_size=(16, 16, 8), border=(10, 4, 2))
    roomy, tight = [60, 60, 60], [28, 24, 24]
    shapes = torch.tensor([roomy, tight])

    pairs = PairSampler(recipe, shapes).draw(1000, generator(0, 1, "pairs"))

    start, extent = boxes(pairs)
    before, after = start, shapes[pairs.volume][:, None] - start - extent
    margin = torch.minimum(before, after).amin(dim=1)  # (B, 3)
    assert margin[pairs.volume == 0].amin(dim=0).tolist() == [10, 4, 2]
    of_24 = (pairs.volume == 1) & (pairs.size[:, 0] > 0)
    assert margin[of_24].amin(dim=0).tolist() == [2, 0, 0]  # half of what is left
    free = PairSampler(recipe.model_copy(update={"border": (0, 0, 0)}), shapes)
    assert int(free.draw(1000, generator(0, 1, "pairs")).start.min()) == 0


def half_tissue() -> np.ndarray:
    image = np.zeros((48, 48, 32), dtype=np.float32)
    image[24:] = 1.0
    return image


@pytest.mark.parametrize("equal_sizes", [True, False])
def test_no_crop_holds_more_tissue_than_allowed(equal_sizes: bool) -> None:
    recipe = CropPairs(
        crop_sizes=SIZES, input_size=(16, 16, 8), max_tissue=0.15, equal_sizes=equal_sizes
    )
    shapes = torch.tensor([[48, 48, 32]])
    mask = tissue_mask(half_tissue(), 0.5)

    pairs = PairSampler(recipe, shapes, [mask]).draw(300, generator(0, 1, "pairs"))

    def most(pairs: Pairs) -> float:
        found = []
        for starts, extents in zip(*boxes(pairs), strict=True):
            for (i, j, k), (a, b, c) in zip(starts.tolist(), extents.tolist(), strict=True):
                found.append(float(mask[i : i + a, j : j + b, k : k + c].mean()))
        return max(found)

    free = PairSampler(recipe.model_copy(update={"max_tissue": None}), shapes)
    assert 0.1 < most(pairs) < 0.15
    assert most(free.draw(300, generator(0, 1, "pairs"))) > 0.5
    assert float(overlaps(pairs).min()) > 0.2


def test_where_few_places_are_free_of_tissue_those_are_found() -> None:
    """One first draw in four finds none of the 64 good places; the search before training did."""
    recipe = CropPairs(crop_sizes=((8, 8, 8),), input_size=(8, 8, 8), max_tissue=0.01)
    mask = np.ones((30, 30, 30), dtype=bool)
    mask[15:26, 5:16, 7:18] = False
    sampler = PairSampler(recipe, torch.tensor([[30, 30, 30]]), [mask])

    pairs = sampler.draw(40, generator(0, 1, "pairs"))

    start = pairs.start.reshape(-1, 3)
    assert ((start >= torch.tensor([15, 5, 7])) & (start <= torch.tensor([18, 8, 10]))).all()
    repeated = (pairs.start[:, 0] == sampler._known[0, 0]).all(dim=1)
    assert 4 < int(repeated.sum()) < 20  # those that fell back


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
