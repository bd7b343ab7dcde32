from __future__ import annotations

import json
import shutil
import warnings
import zipfile

import nibabel as nib
import numpy as np
import pytest

from imaging import intake, nifti, phantom
from imaging.errors import ScanError
from imaging.geometry import certify
from imaging.intake import read_scan
from imaging.orientation import on_source_grid
from imaging.sandbox import run_intake
from imaging.volume import Volume

AFFINE = np.diag([-1.0, -2.0, 3.0, 1.0])


def refusal(path, kind="image", **options) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_scan(path, kind=kind, **options)
    return caught.value


def zip_of(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def label_file(tmp_path):
    def write(voxels):
        path = tmp_path / "labels.nii"
        nib.Nifti1Image(voxels, AFFINE).to_filename(path)
        return path

    return write


# --- what is read


def test_a_bright_corner_goes_through_dicom_zip_and_back_to_the_source_grid(tmp_path):
    voxels = np.full((12, 10, 8), -1000, dtype=np.int16)
    voxels[-3:, -2:, -1:] = 1000  # right, anterior, superior
    affine = np.diag([2.0, 2.5, 4.0, 1.0])
    affine[:3, 3] = (-11, 40, 900)
    phantom.write_dicom_zip(Volume(voxels, affine), tmp_path / "scan.zip", seed=3)

    report = run_intake(tmp_path / "scan.zip", tmp_path, kind="image")
    volume = nifti.open_canonical(report.volume_path)
    mask = on_source_grid((volume.voxels > 0).astype(np.uint8), report.source)
    nifti.write(tmp_path / "mask.nii.gz", mask, report.source.affine)
    certify(tmp_path / "mask.nii.gz", report.source, mask)

    back = nib.Nifti1Image.from_filename(tmp_path / "mask.nii.gz")
    bright = np.argwhere(np.asarray(back.dataobj))
    world = {tuple(np.round((back.affine @ [*at, 1])[:3], 3)) for at in bright}
    expected = {
        tuple(np.round((affine @ [i, j, 7, 1])[:3], 3)) for i in (9, 10, 11) for j in (8, 9)
    }
    assert world == expected
    assert report.source_affine[0][0] < 0, "DICOM columns run to the left"


def test_the_child_s_report_equals_what_is_read_in_process(tmp_path, small, small_zip):
    report = run_intake(small_zip, tmp_path, kind="image")
    scan = read_scan(small_zip, kind="image")

    assert report.shape == scan.volume.shape == small.volume.shape
    assert report.spacing_mm == pytest.approx(scan.volume.spacing_mm)
    assert np.allclose(report.affine, scan.volume.affine)
    assert np.allclose(report.source.affine, scan.source.affine)
    assert report.source.shape == scan.source.shape
    assert (report.modality, report.format, report.dtype) == ("CT", "dicom", "int16")
    assert report.series_uid == scan.series_uid
    assert report.patient_key == scan.patient_key != ""
    assert report.members == []
    assert np.array_equal(nifti.open_canonical(report.volume_path).voxels, small.volume.voxels)


def test_a_nifti_file_a_zip_of_it_and_a_folder_are_the_same_scan(tmp_path, small):
    image, _ = phantom.write_pair(small, tmp_path / "pair", "p")
    packed = zip_of(tmp_path / "a.zip", {"notes.txt": b"hello", "x.bin": image.read_bytes()})
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(image, folder / "anything")

    scans = [read_scan(path, kind="image") for path in (image, packed, folder)]

    assert all(np.array_equal(s.volume.voxels, small.volume.voxels) for s in scans)
    assert {s.format for s in scans} == {"nifti"}
    assert {s.affine_from for s in scans} == {"sform"}
    assert [m.member for m in scans[1].members] == [0]


def test_a_folder_of_dicom_files_is_a_scan(small, small_series):
    scan = read_scan(small_series[0].parent, kind="image")

    assert np.array_equal(scan.volume.voxels, small.volume.voxels)


def test_images_are_int16_where_that_is_exact_and_float32_elsewhere(tmp_path):
    outcomes = []
    for voxels in (np.ones((3, 3, 3), np.uint8), np.full((3, 3, 3), 0.5)):
        nib.Nifti1Image(voxels, AFFINE).to_filename(tmp_path / "a.nii")
        outcomes.append(read_scan(tmp_path / "a.nii", kind="image").volume.voxels.dtype)

    assert outcomes == [np.int16, np.float32]


def test_labels_next_to_whole_numbers_are_rounded(label_file):
    voxels = np.zeros((4, 4, 4), dtype=np.float64)
    voxels[1:3] = 0.99999997
    voxels[3] = 6.0004

    labels = read_scan(label_file(voxels), kind="labels").volume.voxels

    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, 6}


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, 1.01])
def test_labels_that_are_no_labels_are_refused(label_file, value):
    voxels = np.zeros((4, 4, 4), dtype=np.float64)
    voxels[2, 2, 2] = value

    assert refusal(label_file(voxels), "labels").code == "labels_not_integers"


# --- the program


def test_the_program_prints_one_json_object(tmp_path, small_zip, capsys):

    good = intake.main([str(small_zip), "--out", str(tmp_path), "--kind", "image"])
    report = json.loads(capsys.readouterr().out)
    (tmp_path / "no").write_bytes(b"no")
    bad = intake.main([str(tmp_path / "no"), "--out", str(tmp_path), "--kind", "image"])
    problem = json.loads(capsys.readouterr().out)

    assert (good, bad) == (0, 65)
    assert report["shape"] == [45, 39, 21]
    assert problem["error"]["code"] == "not_a_scan"
    assert problem["error"]["extra"] == {}
