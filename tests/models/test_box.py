import numpy as np
import pytest

from imaging.resample import resample, resampled_grid
from imaging.volume import Grid, Volume
from models import box
from models.box import Box
from models.preprocess import prepare
from models.recipe import Preprocessing, Window, ZScore


def grid(shape, spacing, origin=(-12.0, 5.5, 80.0)):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    affine = turn @ np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return Grid(shape, affine)


def faces_mm(one, place):
    """Lower and upper faces of a box along its grid's axes, mm from a place."""
    step = np.linalg.inv(place.affine) @ one.affine
    return step


def test_the_box_around_a_mask_holds_it_and_nothing_more():
    mask = np.zeros((7, 8, 9), bool)
    mask[2, 3, 4] = mask[4, 3, 8] = True

    assert box.around(mask) == Box((2, 3, 4), (5, 4, 9))
    assert box.around(np.zeros((2, 2, 2), bool)) is None


def test_a_box_grows_within_its_grid_alone():
    small = Box((0, 4, 8), (2, 5, 10))

    assert box.widened(small, (3, 3, 3), (10, 10, 10)) == Box((0, 1, 5), (5, 8, 10))
    assert box.at_least(small, (6, 4, 20), (10, 10, 10)) == Box((0, 3, 0), (6, 7, 10))
    assert box.at_least(small, (1, 1, 1), (10, 10, 10)) == small


@pytest.mark.parametrize("margin_mm", [0.0, 3.7, 15.0])
@pytest.mark.parametrize(("coarse", "fine"), [(4.0, 1.5), (4.0, 0.7), (2.0, 2.0), (1.0, 3.0)])
def test_a_box_carried_to_another_grid_covers_the_same_place_and_the_margin(
    coarse, fine, margin_mm
):
    scan = grid((60, 50, 40), (1.3, 1.3, 2.0))
    one = resampled_grid(scan, (coarse,) * 3)
    other = resampled_grid(scan, (fine,) * 3)
    found = Box((3, 2, 4), (7, 6, 9))

    carried = box.carried(found, one, other, margin_mm)

    to_scan = [np.linalg.inv(scan.affine) @ each.affine for each in (one, other)]
    size = np.asarray([1.3, 1.3, 2.0])
    low = (to_scan[0] @ [*(np.array(found.first) - 0.5), 1])[:3] * size - margin_mm
    high = (to_scan[0] @ [*(np.array(found.stop) - 0.5), 1])[:3] * size + margin_mm
    got_low = (to_scan[1] @ [*(np.array(carried.first) - 0.5), 1])[:3] * size
    got_high = (to_scan[1] @ [*(np.array(carried.stop) - 0.5), 1])[:3] * size
    for axis in range(3):
        at_start = carried.first[axis] == 0
        at_end = carried.stop[axis] == other.shape[axis]
        assert at_start or low[axis] - fine < got_low[axis] <= low[axis] + 1e-6
        assert at_end or high[axis] - 1e-6 <= got_high[axis] < high[axis] + fine
    assert not (carried.first == (0, 0, 0) and carried.stop == other.shape) or margin_mm == 15.0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.6, 0.9, 1.7), (3.0, 2.0, 4.1)])
@pytest.mark.parametrize("intensity", [Window(low_hu=-100, high_hu=900), ZScore()])
def test_a_part_of_the_network_input_is_what_it_is_in_the_whole(spacing, intensity):
    shape = (31, 28, 26)
    voxels = np.random.default_rng(0).integers(-200, 1000, shape).astype(np.int16)
    scan = grid(shape, (1.1, 0.8, 2.5))
    volume = Volume(voxels, scan.affine)
    spec = Preprocessing(spacing_mm=spacing, intensity=intensity)
    whole = prepare(volume, spec)
    size = whole.array.shape
    part = Box((2, 3, 1), (size[0] - 1, size[1] - 2, size[2] - 2))

    got = prepare(volume, spec, part)

    assert got.background == whole.background
    np.testing.assert_allclose(got.array, whole.array[part.slices], atol=1e-5)
    np.testing.assert_allclose(
        got.grid.affine @ [0, 0, 0, 1], whole.grid.affine @ [*part.first, 1], atol=1e-9
    )
    shifted = Box((1, 3, 1), (size[0] - 2, size[1] - 2, size[2] - 2))  # the control
    assert np.abs(got.array - whole.array[shifted.slices]).max() > 0.1


def test_what_resampling_needs_is_all_that_it_looks_at():
    scan = grid((40, 40, 40), (1.0, 1.0, 1.0))
    target = box.grid_of(resampled_grid(scan, (2.5, 0.7, 1.0)), Box((4, 9, 6), (9, 20, 12)))
    voxels = np.random.default_rng(1).normal(size=scan.shape).astype(np.float32)
    seen = box.needed(scan, target)
    spoiled = np.full_like(voxels, 1e9)
    spoiled[seen.slices] = voxels[seen.slices]

    np.testing.assert_array_equal(
        resample(spoiled, scan, target, order=1), resample(voxels, scan, target, order=1)
    )
    assert np.prod(seen.shape) < voxels.size / 10


def test_only_a_face_with_more_scan_behind_it_counts_as_touched():
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[0, 2, 2] = 1

    assert box.touches(mask, Box((1, 0, 0), (5, 5, 6)), (9, 5, 6))
    assert not box.touches(mask, Box((0, 0, 0), (4, 5, 6)), (9, 5, 6))
    mask[0, 2, 2], mask[3, 2, 2] = 0, 1
    assert box.touches(mask, Box((0, 0, 0), (4, 5, 6)), (9, 5, 6))
    mask[3, 2, 2], mask[2, 2, 2] = 0, 1
    assert not box.touches(mask, Box((1, 1, 1), (5, 6, 7)), (9, 9, 9))
