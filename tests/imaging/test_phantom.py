from __future__ import annotations

import time

import numpy as np
import pydicom
import pytest
from scipy.ndimage import label as components

from imaging import nifti, phantom


def test_the_same_seed_gives_the_same_phantom_and_another_seed_another():
    first, again, other = (phantom.make(seed, shape=(48, 48, 24)) for seed in (5, 5, 6))

    assert np.array_equal(first.volume.voxels, again.volume.voxels)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.volume.voxels, other.volume.voxels)


@pytest.mark.parametrize("seed", range(5))
def test_organs_have_plausible_place_size_and_density(seed):
    made = phantom.make(seed)
    voxels, labels = made.volume.voxels, made.labels
    liver, tumour = labels > 0, labels == phantom.TUMOUR
    ml = np.prod(made.volume.spacing_mm) / 1000

    assert voxels.dtype == np.int16
    assert 900 < liver.sum() * ml < 2300
    assert 1 <= components(tumour)[1] <= 4
    assert tumour.sum() < 0.2 * liver.sum()
    assert 95 < voxels[labels == phantom.LIVER].mean() < 125
    assert 45 < voxels[tumour].mean() < 80
    assert voxels[0, 0].max() < -900
    place = made.volume.affine @ [*np.argwhere(liver).mean(axis=0), 1]
    body = made.volume.affine @ [*np.argwhere(voxels > -300).mean(axis=0), 1]
    assert place[0] > body[0] + 20, "the liver lies on the patient's right, +x in RAS"
    spine = made.volume.affine @ [*np.argwhere(voxels > 250).mean(axis=0), 1]
    assert spine[1] < place[1], "the spine lies behind the liver"


def test_noise_has_the_scanner_s_deviation():
    made = phantom.make(0)

    flat = made.volume.voxels[made.labels == phantom.LIVER]

    assert 9 < np.percentile(np.abs(flat - np.median(flat)), 68) < 16


def test_a_phantom_takes_less_than_two_seconds():
    start = time.process_time()

    phantom.make(1)

    assert time.process_time() - start < 2


def test_a_pair_is_read_back_unchanged(tmp_path, small):
    image, label = phantom.write_pair(small, tmp_path, "p7")

    volume, grid = nifti.read(image)
    labels, _ = nifti.read(label)

    assert (image.name, label.name) == ("p7_image.nii.gz", "p7_label.nii.gz")
    assert np.array_equal(volume.voxels, small.volume.voxels)
    assert np.array_equal(labels.voxels, small.labels)
    assert labels.voxels.dtype == np.uint8
    assert np.allclose(grid.affine, small.volume.affine, atol=1e-4)


def test_the_series_is_valid_ct_with_uids_from_the_seed(small, small_series):
    slices = [pydicom.dcmread(file) for file in small_series]

    assert {s.PatientID for s in slices} == {"PHANTOM-7"}
    assert len({s.SOPInstanceUID for s in slices}) == small.volume.shape[2]
    assert {s.SOPClassUID.name for s in slices} == {"CT Image Storage"}
    assert {float(s.RescaleIntercept) for s in slices} == {-1024.0}
    assert [f.name for f in small_series] != sorted(f.name for f in small_series)
    assert {s.SeriesInstanceUID for s in slices} == {phantom_uid(7)}


def phantom_uid(seed: int) -> str:
    from imaging.phantom_dicom import uid

    return uid(seed, "series")


def test_the_same_seed_gives_the_same_zip(tmp_path, small, small_zip):
    again = phantom.write_dicom_zip(small.volume, tmp_path / "again.zip", seed=7)

    assert again.read_bytes() == small_zip.read_bytes()


def test_values_that_do_not_fit_are_refused(tmp_path, small):
    from imaging.volume import Volume

    loud = Volume(small.volume.voxels - 5000, small.volume.affine)

    with pytest.raises(ValueError, match="HU"):
        phantom.write_dicom_series(loud, tmp_path, seed=1)
