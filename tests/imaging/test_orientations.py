"""Every orientation, through DICOM to RAS+, to a mask, and back to the grid that was sent."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from imaging import nifti, phantom
from imaging.dicom import read_series
from imaging.geometry import certify
from imaging.orientation import canonical, on_source_grid
from imaging.volume import Volume

CODES = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]
SHAPE = (7, 6, 5)
SPACING = (0.8, 1.7, 3.1)


def affine_of(axes, signs, turn=np.eye(3), spacing=SPACING):
    affine = np.eye(4)
    affine[:3, :3] = (turn[:, list(axes)] * signs) * spacing
    affine[:3, 3] = (12.5, -70.25, 333.0)
    return affine


def corner_bright(affine) -> np.ndarray:
    """A volume in which the voxels furthest to the right, front and top are bright."""
    voxels = np.full(SHAPE, -1000, dtype=np.int16)
    ras = canonical(voxels, affine).voxels  # a view
    ras[-2:, -2:, -1:] = 1000
    assert voxels.max() == 1000
    return voxels


def round_trip(affine, tmp_path):
    """The bright places (mm, RAS+) as sent, in the volume, in the mask file and by the slices."""
    voxels = corner_bright(affine)
    files = phantom.write_dicom_series(Volume(voxels, affine), tmp_path, seed=5)
    series = read_series(list(np.random.default_rng(0).permutation(np.asarray(files))))
    mask = on_source_grid((series.volume.voxels > 0).astype(np.uint8), series.source)
    nifti.write(tmp_path / "mask.nii.gz", mask, series.source.affine)
    certify(tmp_path / "mask.nii.gz", series.source, mask)
    back = nib.Nifti1Image.from_filename(tmp_path / "mask.nii.gz")
    return (
        places(voxels > 0, affine),
        places(series.volume.voxels > 0, series.volume.affine),
        places(np.asarray(back.dataobj) > 0, back.affine),
        places_in_files(files, series, mask),
    )


def places(is_bright, affine) -> np.ndarray:
    found = np.argwhere(is_bright) @ affine[:3, :3].T + affine[:3, 3]
    return found[np.lexsort(np.round(found, 2).T)]


def places_in_files(files, series, mask) -> np.ndarray:
    """Where DICOM itself (PS3.3 C.7.6.2.1.1) puts the pixels that the mask marks."""
    found = []
    for file in files:
        slice_ = pydicom.dcmread(file)
        position = np.asarray(slice_.ImagePositionPatient, dtype=float)
        row, column = np.asarray(slice_.ImageOrientationPatient, dtype=float).reshape(2, 3)
        down, across = (float(gap) for gap in slice_.PixelSpacing)
        ras = position * (-1, -1, 1)
        _, _, s = np.linalg.solve(series.source.affine, [*ras, 1])[:3]
        plane = mask[:, :, int(np.rint(s))].T  # (R, C)
        assert np.array_equal(plane > 0, slice_.pixel_array > 1024)
        for r, c in np.argwhere(plane):
            found.append((position + row * across * c + column * down * r) * (-1, -1, 1))
    found = np.asarray(found)
    return found[np.lexsort(np.round(found, 2).T)]


@pytest.mark.parametrize(("axes", "signs"), CODES)
def test_a_bright_corner_stays_in_its_corner_for_every_axis_code(tmp_path, axes, signs):
    affine = affine_of(axes, signs)

    sent, *others = round_trip(affine, tmp_path)

    assert len(sent) == 4
    for found in others:
        assert np.abs(found - sent).max() < 1e-3
    assert len({nib.aff2axcodes(affine_of(*code)) for code in CODES}) == 48


@settings(max_examples=20, deadline=None)
@given(
    code=st.sampled_from(CODES),
    angles=st.tuples(*[st.floats(-44, 44)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 6)] * 3),
)
def test_a_bright_corner_stays_in_its_corner_at_any_angle(tmp_path_factory, code, angles, spacing):
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine = affine_of(*code, turn, spacing)

    sent, *others = round_trip(affine, tmp_path_factory.mktemp("oblique"))

    for found in others:
        assert np.abs(found - sent).max() < 1e-3


def shifted(affine):
    affine[:3, 3] += affine[:3, 0] / 2  # half a voxel


def flipped(affine):
    affine[:3, 3] += affine[:3, 1] * (SHAPE[1] - 1)
    affine[:3, 1] *= -1


@pytest.mark.parametrize("change", [shifted, flipped])
def test_a_wrong_affine_would_be_seen(change):
    """The negative control: the comparison above sees half a voxel, and a flip."""
    affine = affine_of((0, 1, 2), (1, 1, 1))
    voxels = corner_bright(affine)
    wrong = affine.copy()
    change(wrong)

    assert np.abs(places(voxels > 0, wrong) - places(voxels > 0, affine)).max() > 0.3
