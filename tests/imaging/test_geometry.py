from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from imaging import nifti
from imaging.geometry import GeometryError, certify
from imaging.volume import Grid


@pytest.fixture
def source() -> Grid:
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", (7, -12, 20), degrees=True).as_matrix()
    affine[:3, :3] = turn * (-0.71, -0.71, 2.5)
    affine[:3, 3] = (173.2, 140.9, -911.7)
    return Grid((12, 10, 7), affine)


@pytest.fixture
def labels(source) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, source.shape).astype(np.uint8)


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.nii"])
def test_a_mask_on_its_source_grid_is_certified(tmp_path, source, labels, name):
    nifti.write(tmp_path / name, labels, source.affine)

    certificate = certify(tmp_path / name, source, labels)

    assert certificate.shape == source.shape
    assert certificate.max_corner_error_mm < 1e-3
    assert certificate.num_labelled == np.count_nonzero(labels)


def shifted(affine):
    affine[0, 3] += 0.002


def stretched(affine):
    affine[:3, 2] *= 1.0005


def mirrored(affine):
    affine[:3, 0] *= -1


@pytest.mark.parametrize("change", [shifted, stretched, mirrored])
def test_a_mask_with_another_affine_is_not_certified(tmp_path, source, labels, change):
    affine = source.affine.copy()
    change(affine)
    nifti.write(tmp_path / "mask.nii", labels, affine)

    with pytest.raises(GeometryError, match="corner"):
        certify(tmp_path / "mask.nii", source, labels)


def test_a_mask_whose_qform_disagrees_is_not_certified(tmp_path, source, labels):
    image = nib.Nifti1Image(labels, source.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(source.affine, 1)
    moved = source.affine.copy()
    moved[2, 3] += 1
    image.set_qform(moved, 1)
    image.to_filename(tmp_path / "mask.nii")

    with pytest.raises(GeometryError, match="corner"):
        certify(tmp_path / "mask.nii", source, labels)


def test_one_wrong_voxel_is_not_certified(tmp_path, source, labels):
    wrong = labels.copy()
    wrong[3, 4, 5] += 1
    nifti.write(tmp_path / "mask.nii.gz", wrong, source.affine)

    with pytest.raises(GeometryError, match="1 voxels"):
        certify(tmp_path / "mask.nii.gz", source, labels)


def test_flipped_voxels_are_not_certified(tmp_path, source, labels):
    nifti.write(tmp_path / "mask.nii.gz", labels[::-1], source.affine)

    with pytest.raises(GeometryError, match="voxels of the mask differ"):
        certify(tmp_path / "mask.nii.gz", source, labels)


def test_a_mask_of_another_shape_is_not_certified(tmp_path, source, labels):
    nifti.write(tmp_path / "mask.nii", labels[:-1], source.affine)

    with pytest.raises(GeometryError, match="source is"):
        certify(tmp_path / "mask.nii", source, labels)


def test_a_cut_off_mask_is_not_certified(tmp_path, source, labels):
    nifti.write(tmp_path / "mask.nii.gz", labels, source.affine)
    data = (tmp_path / "mask.nii.gz").read_bytes()
    (tmp_path / "mask.nii.gz").write_bytes(data[:-30])

    with pytest.raises(GeometryError, match="damaged"):
        certify(tmp_path / "mask.nii.gz", source, labels)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_large_masks_in_any_direction_are_certified(tmp_path, order):
    """A qform's float32 quaternion is coarse near half a turn: then there must be none."""
    for signs in itertools.product((1, -1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, order] * signs * (0.7, 0.7, 3.1)
        affine[:3, 3] = (173.2, -140.9, -911.7)
        source = Grid((512, 512, 2), affine)
        labels = np.zeros(source.shape, dtype=np.uint8)
        labels[0, 0, 0] = 1
        nifti.write(tmp_path / "mask.nii", labels, affine)

        assert certify(tmp_path / "mask.nii", source, labels).max_corner_error_mm < 1e-3
