"""SimpleITK against our writer: it reads what was written, where it was meant to lie."""

import itertools

import numpy as np
import pytest
import SimpleITK
from scipy.spatial.transform import Rotation

from imaging import nifti
from imaging.geometry import GeometryError
from imaging.results.certificate import certify_nifti, compare
from imaging.volume import Grid
from service import itk_reader

NAMES = {"liver": 1, "tumour": 2}
SHAPE = (9, 7, 5)


def affines() -> list[np.ndarray]:
    """All 48 orders and directions of the axes, and 24 obliques, anisotropic."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = np.eye(3)[:, order] * signs * (0.7, 1.9, 3.1)
            affine[:3, 3] = (173.2, -140.9, -911.7)
            found.append(affine)
    for turn in Rotation.random(24, rng=0).as_matrix():
        affine = np.eye(4)
        affine[:3, :3] = turn * (0.7, -1.9, 3.1)
        affine[:3, 3] = (-12.5, 60.25, 330.125)
        found.append(affine)
    return found


@pytest.fixture
def labels() -> np.ndarray:
    found = np.zeros(SHAPE, dtype=np.uint8)
    found[0, 0, 0], found[2:6, 3, 1:4] = 2, 1
    return found


@pytest.mark.parametrize("affine", affines())
def test_simpleitk_certifies_a_mask_in_any_direction(tmp_path, labels, affine):
    path = tmp_path / "mask.nii.gz"
    nifti.write(path, labels, affine)

    proven = certify_nifti(path, Grid(SHAPE, affine), labels, NAMES, [itk_reader.read_mask])

    assert proven.max_corner_error_mm < 1e-3
    assert proven.readers[1].startswith("SimpleITK 2")
    assert proven.voxels == {"liver": 12, "tumour": 1}


def flipped(labels, affine):
    return labels[:, ::-1], affine


def half_a_voxel(labels, affine):
    moved = affine.copy()
    moved[:3, 3] += affine[:3, 1] / 2
    return labels, moved


def swapped(labels, affine):
    return np.array([0, 2, 1], np.uint8)[labels], affine


def lost(labels, affine):
    return np.where(labels == 2, 0, labels).astype(np.uint8), affine


def mirrored(labels, affine):
    turned = affine.copy()
    turned[:3, 0] *= -1
    return labels, turned


@pytest.mark.parametrize("change", [flipped, half_a_voxel, swapped, lost, mirrored])
@pytest.mark.parametrize("number", [0, 21, 60])
def test_simpleitk_finds_what_is_wrong_by_itself(tmp_path, labels, change, number):
    affine = affines()[number]
    path = tmp_path / "mask.nii.gz"
    nifti.write(path, labels, affine)
    right = compare(itk_reader.read_mask(path), Grid(SHAPE, affine), labels, NAMES)
    assert right < 1e-3, "without the change it agrees"
    nifti.write(path, *change(labels, affine))

    with pytest.raises(GeometryError):
        compare(itk_reader.read_mask(path), Grid(SHAPE, affine), labels, NAMES)


def test_what_simpleitk_cannot_read_is_not_certified(tmp_path):
    (tmp_path / "mask.nii.gz").write_bytes(b"no mask")

    with pytest.raises(GeometryError, match="SimpleITK"):
        itk_reader.read_mask(tmp_path / "mask.nii.gz")


@pytest.mark.parametrize(("shear", "expected"), [(0.0, True), (1e-6, True), (5e-4, False)])
def test_a_sheared_grid_is_left_to_the_other_reader(shear, expected):
    affine = np.diag([0.8, 0.8, 2.0, 1.0])
    affine[0, 2] = 2.0 * shear

    assert itk_reader.can_hold(Grid((512, 512, 200), affine)) is expected


def test_an_image_that_simpleitk_itself_wrote_is_found_where_it_lies(tmp_path):
    """The reader's own geometry, against ITK's physical points."""
    image = SimpleITK.GetImageFromArray(np.zeros((3, 4, 5), np.uint8))
    image.SetSpacing((1.5, 2.5, 3.5))
    image.SetOrigin((10.0, 20.0, 30.0))
    SimpleITK.WriteImage(image, str(tmp_path / "one.nii.gz"))

    reading = itk_reader.read_mask(tmp_path / "one.nii.gz")

    assert reading.grid.shape == (5, 4, 3)
    x, y, z = image.TransformIndexToPhysicalPoint((4, 3, 2))
    assert np.allclose(reading.grid.affine @ [4, 3, 2, 1], [-x, -y, z, 1], atol=1e-4)
