import numpy as np
import pytest

from imaging.resample import resampled_grid
from imaging.volume import Grid, Volume
from models.preprocess import prepare, prepare_labels
from models.recipe import FinetuneRecipe, Preprocessing, Window, ZScore

LIVER = Preprocessing(intensity=Window(low_hu=-200, high_hu=200))


def volume_of(voxels, spacing=(1.0, 1.0, 1.0)):
    return Volume(voxels, np.diag([*spacing, 1.0]))


def test_a_window_maps_hounsfield_units_to_zero_and_one():
    hu = np.array([-3000, -200, -100, 0, 100, 200, 3000], dtype=np.int16)

    prepared = prepare(volume_of(hu.reshape(7, 1, 1)), LIVER)

    assert prepared.array.dtype == np.float32
    np.testing.assert_allclose(prepared.array.ravel(), [0, 0, 0.25, 0.5, 0.75, 1, 1], atol=1e-6)
    assert prepared.background == 0.0


def test_the_array_lies_on_the_grid_of_the_asked_spacing():
    volume = volume_of(np.zeros((20, 22, 9), np.int16), (0.7, 0.8, 5.0))

    prepared = prepare(volume, Preprocessing(spacing_mm=(1.0, 1.0, 2.0)))

    assert prepared.array.shape == prepared.grid.shape == (14, 18, 22)
    np.testing.assert_allclose(np.diag(prepared.grid.affine)[:3], (1.0, 1.0, 2.0))


def test_a_z_score_is_taken_over_the_voxels_that_are_not_zero():
    voxels = np.random.default_rng(0).normal(300, 50, (12, 12, 12)).astype(np.float32)
    voxels[:6] = 0

    prepared = prepare(volume_of(voxels), Preprocessing(intensity=ZScore()))

    body = prepared.array[6:]
    assert abs(body.mean()) < 1e-4
    assert abs(body.std() - 1) < 1e-4
    np.testing.assert_allclose(prepared.array[:6], prepared.background, rtol=1e-5)
    assert prepared.background < body.min()


def test_a_z_score_of_an_empty_volume_is_finite():
    prepared = prepare(volume_of(np.zeros((4, 4, 4))), Preprocessing(intensity=ZScore()))

    assert not prepared.array.any()


def test_training_and_serving_give_the_network_the_same_array(make_bundle, random_conv_model):
    from models import bundle

    recipe = FinetuneRecipe(labels={"organ": 1}, preprocessing=LIVER)
    folder = make_bundle(random_conv_model, labels=("a", "b"), preprocessing=recipe.preprocessing)
    rng = np.random.default_rng(0)
    scan = volume_of(rng.integers(-1000, 1000, (15, 16, 7), dtype=np.int16), (0.8, 0.9, 3.0))

    in_training = prepare(scan, recipe.preprocessing)
    in_serving = prepare(scan, bundle.load(folder).preprocessing)

    np.testing.assert_array_equal(in_training.array, in_serving.array)
    np.testing.assert_array_equal(in_training.grid.affine, in_serving.grid.affine)


def test_label_values_become_classes_in_the_order_of_the_recipe():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0], labels[1] = 7, 3
    grid = Grid((4, 4, 4), np.eye(4))

    classes = prepare_labels(labels, grid, grid, {"tumour": 3, "liver": 7})

    assert classes.dtype == np.uint8
    assert [int(plane[0, 0]) for plane in classes] == [2, 1, 0, 0]


def test_labels_are_resampled_to_the_largest_share_and_invent_no_class_between_two():
    labels = np.zeros((30, 4, 4), np.uint8)
    labels[10:20], labels[20:] = 1, 3
    source = Grid((30, 4, 4), np.diag([0.5, 1.0, 1.0, 1.0]))
    target = resampled_grid(source, (1.0, 1.0, 1.0))

    classes = prepare_labels(labels, source, target, {"a": 1, "b": 2, "c": 3})

    assert classes[:, 0, 0].tolist() == [0] * 5 + [1] * 5 + [3] * 5


def test_background_wins_a_tie():
    labels = np.array([0, 4], np.uint8).reshape(2, 1, 1)
    source = Grid((2, 1, 1), np.eye(4))
    target = resampled_grid(source, (2.0, 1.0, 1.0))

    assert prepare_labels(labels, source, target, {"a": 4}).tolist() == [[[0]]]


def test_unlisted_label_values_are_refused_by_their_names():
    labels = np.zeros((3, 3, 3), np.uint8)
    labels[0, 0, 0], labels[1, 1, 1], labels[2, 2, 2] = 9, 4, 1
    grid = Grid((3, 3, 3), np.eye(4))

    with pytest.raises(ValueError, match=r"\[4, 9\].*liver = 1"):
        prepare_labels(labels, grid, grid, {"liver": 1})


def test_unlisted_label_values_can_be_background():
    labels = np.full((3, 3, 3), 9, np.uint8)
    labels[1] = 1
    grid = Grid((3, 3, 3), np.eye(4))

    classes = prepare_labels(labels, grid, grid, {"liver": 1}, "background")

    assert np.unique(classes[[0, 2]]).tolist() == [0]
    assert np.unique(classes[1]).tolist() == [1]


def test_labels_of_another_shape_than_their_grid_are_refused():
    grid = Grid((3, 3, 3), np.eye(4))

    with pytest.raises(ValueError, match=r"\(3, 3, 4\)"):
        prepare_labels(np.zeros((3, 3, 4), np.uint8), grid, grid, {"liver": 1})
