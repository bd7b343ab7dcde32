"""Tilted and unevenly spaced slices: to a regular grid by place, and labels back to the slices."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from imaging.errors import ScanError
from imaging.slices import Slices, regular_grid, slices_of, to_grid, to_slices

ANGLES = st.tuples(*[st.floats(-180, 180)] * 3)


def make(angles=(0, 0, 0), gaps=(3.0, 5.0, 4.0, 2.5, 6.0), tilt=(0.2, -0.3), shape=(9, 8)):
    """Slices with any direction, gaps and shear; `tilt` is the shift in mm per mm of depth."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    depth = np.concatenate([[0.0], np.cumsum(gaps)])
    offsets = np.stack([tilt[0] * depth, tilt[1] * depth, depth], axis=1)
    return Slices(
        (*shape, len(depth)), turn[:, 0] * 0.9, turn[:, 1] * 1.3, offsets @ turn.T + (12, -40, 300)
    )


def world(slices: Slices) -> np.ndarray:
    """Places of all pixels, (C, R, S, 3)."""
    c, r = np.meshgrid(*(np.arange(n) for n in slices.shape[:2]), indexing="ij")
    steps = np.stack([slices.column_step_mm, slices.row_step_mm])
    in_plane = np.stack([c, r], axis=-1) @ steps
    return in_plane[:, :, None, :] + slices.positions_mm


def grid_world(grid) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1)
    return index @ grid.affine[:3, :3].T + grid.affine[:3, 3]


def linear(places: np.ndarray) -> np.ndarray:
    return places @ (3.0, -2.0, 1.5) + 7.0


def is_covered(slices, grid) -> np.ndarray:
    """Voxels between pixels of both slices beside them."""
    in_plane, depth = slices.coordinates()
    steps = np.linalg.inv(slices.affine_of(0))
    at = grid_world(grid) @ steps[:3, :3].T + steps[:3, 3]
    inside = np.zeros(grid.shape, dtype=bool)
    for k in range(grid.shape[2]):
        above = int(np.clip(np.searchsorted(depth, at[0, 0, k, 2] - 1e-6), 1, len(depth) - 1))
        both = np.ones(grid.shape[:2], dtype=bool)
        for s in (above - 1, above):
            for axis in (0, 1):
                place = at[:, :, k, axis] - in_plane[s, axis]
                both &= (place > -1e-6) & (place < slices.shape[axis] - 1 + 1e-6)
        inside[:, :, k] = both
    return inside


@settings(max_examples=25, deadline=None)
@given(angles=ANGLES, tilt=st.tuples(*[st.floats(-0.6, 0.6)] * 2))
def test_a_linear_field_keeps_its_values_at_every_place(angles, tilt):
    slices = make(angles, tilt=tilt, shape=(16, 17))
    grid = regular_grid(slices)

    voxels = to_grid(linear(world(slices)), slices, grid)

    inside = is_covered(slices, grid)
    assert inside.sum() > 100
    assert np.allclose(voxels[inside], linear(grid_world(grid))[inside], atol=1e-3)


def test_stacking_the_slices_as_they_come_would_move_the_field():
    """The negative control of the test above."""
    slices = make(tilt=(0.3, 0.0))

    stacked = linear(world(slices))
    even = world(make(gaps=(4.1,) * 5, tilt=(0, 0)))

    assert np.abs(stacked - linear(even)).max() > 1


@settings(max_examples=25, deadline=None)
@given(angles=ANGLES, tilt=st.tuples(*[st.floats(-0.6, 0.6)] * 2))
def test_the_grid_is_a_box_that_holds_every_pixel(angles, tilt):
    slices = make(angles, tilt=tilt)

    grid = regular_grid(slices)

    axes = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    places = world(slices).reshape(-1, 3)
    index = (places - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    assert (index > -1e-6).all()
    assert (index < np.asarray(grid.shape) - 1 + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(angles=ANGLES, tilt=st.tuples(*[st.floats(-0.6, 0.6)] * 2))
def test_labels_go_to_the_pixels_of_their_place(angles, tilt):
    slices = make(angles, tilt=tilt, shape=(24, 20))
    grid = regular_grid(slices)
    centre = world(slices).reshape(-1, 3).mean(axis=0)
    radius = 7.0
    labels = (np.linalg.norm(grid_world(grid) - centre, axis=-1) < radius).astype(np.uint8)

    back = to_slices(labels, grid, slices)

    distance = np.linalg.norm(world(slices) - centre, axis=-1)
    half_voxel = np.linalg.norm(grid.affine[:3, :3] / 2, axis=0)
    slack = np.linalg.norm(half_voxel) + 1e-6
    assert (back[distance < radius - slack] == 1).all()
    assert (back[distance > radius + slack] == 0).all()
    assert back.any()


def test_a_bright_corner_stays_in_its_corner_of_the_slice():
    slices = make((11, -17, 23))
    grid = regular_grid(slices)
    values = np.zeros(slices.shape, dtype=np.int16)
    values[-2:, :2, 3] = 1000

    mask = (to_grid(values, slices, grid) > 300).astype(np.uint8)
    back = to_slices(mask, grid, slices)

    assert back[-1, 0, 3] == 1
    assert back[:-3].sum() == 0
    assert back[:, 3:].sum() == 0
    assert back[:, :, [0, 1, 5]].sum() == 0


def test_even_slices_without_tilt_are_a_grid_already():
    slices = make((5, 6, 7), gaps=(2.5,) * 6, tilt=(0, 0))
    values = np.random.default_rng(0).integers(-1000, 1000, slices.shape).astype(np.int16)

    grid = regular_grid(slices)

    assert grid.shape == slices.shape
    assert np.array_equal(to_grid(values, slices, grid), values)
    assert np.array_equal(to_slices(values, grid, slices), values)


def test_places_that_no_slice_covers_get_the_lowest_value():
    slices = make(gaps=(4.0,) * 4, tilt=(0.9, 0.0))
    values = np.full(slices.shape, 50, dtype=np.int16)
    values[4, 4, 2] = -1024

    voxels = to_grid(values, slices, regular_grid(slices))

    assert voxels[-1, 0, 0] == -1024
    assert voxels[0, 0, 0] == 50
    assert voxels.dtype == np.int16


def test_the_way_back_survives_its_record():
    slices = make((5, 6, 7))

    again = slices_of(json.loads(json.dumps(slices.as_json())))

    assert again.shape == slices.shape
    assert np.array_equal(again.positions_mm, slices.positions_mm)
    labels = np.random.default_rng(1).integers(0, 3, regular_grid(slices).shape).astype(np.uint8)
    assert np.array_equal(
        to_slices(labels, regular_grid(slices), slices),
        to_slices(labels, regular_grid(again), again),
    )


def test_labels_of_another_shape_and_grids_too_large_are_refused():
    slices = make()
    grid = regular_grid(slices)
    far = make(gaps=(4.0, 4.0, 1e6), shape=(512, 512))

    with pytest.raises(ValueError, match="labels are"):
        to_slices(np.zeros((2, 2, 2), np.uint8), grid, slices)
    with pytest.raises(ScanError, match="too_large"):
        regular_grid(far)
