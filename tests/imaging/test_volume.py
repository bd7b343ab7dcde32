from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from imaging.orientation import canonical, on_source_grid
from imaging.volume import Grid

CODES = [
    "".join(pairs[axis][side] for axis, side in zip(order, sides, strict=True))
    for order in permutations(range(3))
    for sides in product((0, 1), repeat=3)
    for pairs in [("LR", "PA", "IS")]
]


def affine_of(codes: str, spacing: tuple[float, ...] = (0.7, 1.3, 2.5)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (code, step) in enumerate(zip(codes, spacing, strict=True)):
        world = next(w for w, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine[world, axis] = step if code in "RAS" else -step
    affine[:3, 3] = (-17.0, 23.5, 1204.25)
    return affine


def test_there_are_48_axis_codes():
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("codes", CODES)
def test_canonical_is_ras_keeps_every_voxel_in_place_and_can_be_undone(codes):
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    affine = affine_of(codes)

    volume = canonical(voxels, affine)
    restored = on_source_grid(volume.voxels, Grid(voxels.shape, affine))

    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert np.array_equal(restored, voxels)
    for index in ((0, 0, 0), (3, 4, 5), (1, 3, 2)):
        world = affine @ [*index, 1]
        there = np.rint(np.linalg.solve(volume.affine, world)).astype(int)[:3]
        assert volume.voxels[tuple(there)] == voxels[index]


@settings(max_examples=60, deadline=None)
@given(
    codes=st.sampled_from(CODES),
    angles=st.tuples(*[st.floats(-25, 25)] * 3),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
)
def test_an_oblique_grid_goes_to_canonical_and_back_without_loss(codes, angles, shape):
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = turn @ affine_of(codes)
    voxels = np.arange(np.prod(shape)).reshape(shape)

    volume = canonical(voxels, affine)

    assert np.array_equal(on_source_grid(volume.voxels, Grid(shape, affine)), voxels)
    mine = [affine @ [*corner, 1] for corner in product(*[(0, n - 1) for n in shape])]
    theirs = [volume.affine @ [*c, 1] for c in product(*[(0, n - 1) for n in volume.shape])]
    assert all(min(np.abs(a - b).max() for b in theirs) < 1e-6 for a in mine)


def test_voxels_of_another_extent_do_not_fit_the_source():
    with pytest.raises(ValueError, match="source axes"):
        on_source_grid(np.zeros((3, 4, 5)), Grid((3, 4, 5), affine_of("SRA")))
