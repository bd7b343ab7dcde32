"""Both sides of the input benchmark make the same views from the same numbers."""

import numpy as np
import torch

from benchmarks import common, straightforward
from benchmarks.bench_input import recipes
from models.recipe import CropPairs
from trainer.data import augment
from trainer.randomness import generator

INNER = (slice(12, -12), slice(12, -12), slice(8, -8))
"""Free of what a rotation brings in from outside, where the two differ by a voxel."""


def clean_of_both(crops: CropPairs) -> tuple[np.ndarray, np.ndarray]:
    scans = common.smooth_scans(shape=(120, 120, 100))
    volumes, sampler = common.make_resident(scans, crops, torch.device("cpu"))
    pairs = sampler.draw(8, generator(0, 1, "pairs"))
    geometry = augment.draw_geometry(crops, 8, generator(0, 1, "geometry"))
    ours = augment.make_clean(volumes, crops, pairs, 0, geometry)[:, 0].numpy()
    theirs = []
    for at in range(8):
        size = np.array(crops.crop_sizes[int(pairs.size[at, 0])])
        whole = scans[int(pairs.volume[at])].astype(np.float32)
        crop = straightforward.cut(whole, pairs.start[at, 0].numpy(), size)
        view = straightforward.resize(crop, crops.input_size)
        view = straightforward.flip(view, geometry.flips[at].numpy())
        degrees = np.rad2deg(geometry.angles[at].numpy())
        if crops.rotation == "in_plane":
            theirs.append(straightforward.rotate(view, float(degrees[2])))
        else:
            theirs.append(straightforward.affine(view, degrees, geometry.scales[at].numpy()))
    return ours, np.stack(theirs)


def test_clean_views_of_the_paper_are_the_same() -> None:
    ours, theirs = clean_of_both(recipes()["paper"])

    difference = np.abs(ours - theirs)[:, *INNER]
    assert difference.max() < 2e-3
    assert np.abs(ours - theirs[::-1])[:, *INNER].max() > 0.1


def test_clean_views_with_the_official_transforms_are_the_same() -> None:
    ours, theirs = clean_of_both(recipes()["official"])

    difference = np.abs(ours - theirs)[:, *INNER]
    assert difference.mean() < 1e-4
    assert difference.max() < 5e-3  # two passes of linear interpolation for one of trilinear
    assert np.abs(ours - theirs[::-1])[:, *INNER].max() > 0.1


def test_straightforward_pairs_have_the_shape_and_the_corruption_of_the_recipe() -> None:
    scans = [scan.astype(np.float32) for scan in common.smooth_scans(shape=(120, 120, 100))]
    for crops in recipes().values():
        clean, spoiled = straightforward.make_pair(scans, crops, np.random.default_rng(3))

        assert [view.shape for view in (*clean, *spoiled)] == [crops.input_size] * 4
        assert all(np.abs(a - b).max() > 0.05 for a, b in zip(clean, spoiled, strict=True))


def test_straightforward_shuffling_overwrites_and_reads_the_view_as_it_was() -> None:
    view = np.arange(40 * 40 * 30, dtype=np.float32).reshape(40, 40, 30)

    shuffled = straightforward.shuffle_pixels(view, np.random.default_rng(0), 4000)

    moved = np.unravel_index(shuffled.astype(np.int64), view.shape)
    place = np.meshgrid(*map(np.arange, view.shape), indexing="ij")
    reach = [int(np.abs(a - b).max()) for a, b in zip(moved, place, strict=True)]
    assert reach == [3, 3, 2]  # one window's sides less one: nothing travels through two
    assert len(np.unique(shuffled)) < 0.9 * shuffled.size
