from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from imaging.resample import LinearPlanes, argmax_on_grid, resample, resampled_grid
from imaging.volume import Grid

SPACINGS = st.tuples(*[st.floats(0.5, 6.0)] * 3)


def grid(shape: tuple[int, int, int], spacing=(1.0, 1.0, 1.0)) -> Grid:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-30.0, 12.0, 500.0)
    return Grid(shape, affine)


def plane_through(g: Grid) -> np.ndarray:
    """A linear function of the place in the patient, on a grid."""
    index = np.stack(np.meshgrid(*map(np.arange, g.shape), indexing="ij"), axis=-1)
    world = index @ g.affine[:3, :3].T + g.affine[:3, 3]
    return world @ (0.3, -0.7, 0.11) + 4.0


@settings(max_examples=40, deadline=None)
@given(spacing=SPACINGS)
def test_the_new_grid_has_the_spacing_and_the_old_centre(spacing):
    source = grid((20, 31, 8), (0.8, 0.9, 5.0))

    target = resampled_grid(source, spacing)

    assert np.allclose(np.linalg.norm(target.affine[:3, :3], axis=0), spacing)
    middle = [g.affine @ [*((np.asarray(g.shape) - 1) / 2), 1] for g in (source, target)]
    assert np.allclose(*middle)
    covered = np.asarray(target.shape) * spacing
    assert (
        np.abs(covered - np.asarray(source.shape) * (0.8, 0.9, 5.0)) <= np.asarray(spacing)
    ).all()


@settings(max_examples=40, deadline=None)
@given(spacing=SPACINGS)
def test_a_linear_function_is_reproduced_exactly_away_from_the_border(spacing):
    source = grid((40, 42, 38))
    target = resampled_grid(source, spacing)

    result = resample(plane_through(source), source, target, order=1)

    margin = int(np.ceil(max(spacing)))
    index = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), axis=-1)
    place = index * spacing + (np.linalg.solve(source.affine, target.affine)[:3, 3])
    inside = ((place >= margin) & (place <= np.asarray(source.shape) - 1 - margin)).all(axis=-1)
    assert inside.any()
    expected = plane_through(target)
    assert np.abs(result - expected)[inside].max() < 1e-3


def test_finer_voxels_equal_trilinear_interpolation():
    rng = np.random.default_rng(0)
    source = grid((9, 11, 7), (2.0, 1.5, 4.0))
    voxels = rng.normal(size=source.shape)
    target = resampled_grid(source, (0.9, 1.1, 2.2))

    result = resample(voxels, source, target, order=1)

    step = np.linalg.solve(source.affine, target.affine)
    axes = [step[a, 3] + step[a, a] * np.arange(target.shape[a]) for a in range(3)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    assert np.allclose(result, map_coordinates(voxels, places, order=1, mode="nearest"), atol=1e-5)


def test_the_same_grid_changes_nothing():
    source = grid((6, 5, 4), (0.7, 1.0, 3.0))
    voxels = np.random.default_rng(1).normal(size=source.shape).astype(np.float32)

    assert np.array_equal(resample(voxels, source, source, order=1), voxels)
    assert np.array_equal(resample(voxels, source, source, order=0), voxels)


def test_a_checkerboard_is_averaged_and_not_aliased_where_voxels_grow():
    source = grid((32, 32, 32))
    checks = np.indices(source.shape).sum(axis=0) % 2 * 2.0 - 1.0
    target = resampled_grid(source, (4.0, 4.0, 4.0))

    averaged = resample(checks, source, target, order=1)
    picked = resample(checks, source, target, order=0)

    assert np.abs(averaged).max() < 0.05
    assert np.abs(picked).max() == 1.0


def test_nearest_keeps_type_and_values():
    source = grid((10, 10, 10))
    labels = np.random.default_rng(2).integers(0, 4, source.shape).astype(np.uint8)

    result = resample(labels, source, resampled_grid(source, (0.4, 1.7, 2.9)), order=0)

    assert result.dtype == np.uint8
    assert set(np.unique(result)) <= {0, 1, 2, 3}


@pytest.mark.parametrize("target_spacing", [(0.7, 0.9, 1.1), (1.0, 1.0, 2.0), (2.6, 1.9, 3.3)])
def test_argmax_in_slabs_equals_argmax_of_everything(target_spacing, monkeypatch):
    monkeypatch.setattr("imaging.resample.SLAB_BYTES", 4 * 20 * 20 * 3)
    rng = np.random.default_rng(3)
    source = grid((13, 12, 11), (1.5, 1.5, 2.0))
    target = resampled_grid(source, target_spacing)
    logits = rng.normal(size=(4, *source.shape)).astype(np.float32)

    labels = argmax_on_grid(logits, source, target)

    naive = np.stack([resample(one, source, target, order=1) for one in logits]).argmax(axis=0)
    assert labels.dtype == np.uint8
    assert len(np.unique(naive)) == 4
    assert np.array_equal(labels, naive)


def test_grids_that_are_turned_against_each_other_are_refused():
    source = grid((8, 8, 8))
    turned = Grid(source.shape, source.affine[:, [1, 0, 2, 3]])

    with pytest.raises(ValueError, match="parallel"):
        resample(np.zeros(source.shape), source, turned, order=1)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.3, 0.6, 1.7), (0.5, 3.0, 4.1)])
def test_planes_read_one_by_one_equal_the_whole(spacing_mm, order):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (9, 12, 40)).astype(np.int16)
    source = Grid((9, 12, 40), np.eye(4))
    target = resampled_grid(source, spacing_mm)
    whole = resample(voxels, source, target, order=1)
    planes = LinearPlanes.of(np.asarray(voxels, order=order), source, target)
    num_columns, num_planes = target.shape[1:]

    for first, stop in ((0, num_planes), (num_planes // 2, num_planes // 2 + 1)):
        part = planes.read(first, stop, slice(1, num_columns - 1))
        expected = np.moveaxis(whole[:, 1 : num_columns - 1, first:stop], 2, 0)
        np.testing.assert_allclose(part, expected, atol=2e-3)  # of 1000
    # The control: a neighbouring plane is another one.
    assert np.abs(planes.read(0, 1) - planes.read(1, 2)).max() > 1
