"""Results refer to the images that the scan was read from, to all of them and to no other."""

from __future__ import annotations

import math

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage

from imaging.deidentify import deidentify_upload
from imaging.identity import Policy, Pseudonyms
from imaging.intake import read_scan
from imaging.results.facts import Label

SHAPE, AFFINE = (24, 20, 8), np.diag([0.9, 0.9, 2.5, 1.0])


@pytest.fixture
def files(series, tmp_path):
    voxels = np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)
    return series.write_series(voxels, AFFINE, tmp_path / "in")


def change(file, **values) -> None:
    one = pydicom.dcmread(file)
    for keyword, value in values.items():
        setattr(one, keyword, value)
        if keyword == "SOPInstanceUID":
            one.file_meta.MediaStorageSOPInstanceUID = value
    one.save_as(file, enforce_file_format=True)


def turned(angle: float) -> list[float]:
    return [-math.cos(angle), -math.sin(angle), 0.0, math.sin(angle), -math.cos(angle), 0.0]


def referred(path) -> list[str]:
    (one,) = pydicom.dcmread(path).ReferencedSeriesSequence
    return sorted(image.ReferencedSOPInstanceUID for image in one.ReferencedInstanceSequence)


def test_every_image_that_was_read_and_no_other_is_referred_to(series, files, tmp_path):
    for at, file in enumerate(files):  # colour images at the same places, earlier in the folder
        one = pydicom.dcmread(file)
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.77.{at + 1}"
        one.SamplesPerPixel, one.PhotometricInterpretation = 3, "RGB"
        one.PlanarConfiguration = one.PixelRepresentation = 0
        one.BitsAllocated = one.BitsStored = 8
        one.HighBit = 7
        one.PixelData = bytes(3 * one.Rows * one.Columns)
        one.save_as(file.with_name(f"0_{file.name}"), enforce_file_format=True)

    answer = series.results_of(tmp_path / "in", series.boxes, tmp_path / "out")
    used = read_scan(tmp_path / "in", kind="image").used

    assert not answer["not_made"]
    assert referred(tmp_path / "out/seg.dcm") == sorted(one.sop_uid for one in used)


def test_slices_that_share_a_uid_get_no_result_rather_than_half_of_one(series, files, tmp_path):
    change(files[5], SOPInstanceUID=pydicom.dcmread(files[2]).SOPInstanceUID)

    answer = series.results_of(tmp_path / "in", series.boxes, tmp_path / "out")

    assert answer["files"] == []
    assert {one["code"] for one in answer["not_made"]} == {"source_header_unusable"}
    assert "7 of the 8 images" in answer["not_made"][0]["detail"]


@pytest.mark.parametrize(("angle", "is_made"), [(0.0, True), (1e-7, True), (9e-4, False)])
def test_slices_turned_by_rounding_are_one_direction_and_more_is_refused(
    series, files, tmp_path, angle, is_made
):
    for file in files[::3]:
        change(file, ImageOrientationPatient=[f"{x:.12f}"[:16] for x in turned(angle)])

    answer = series.results_of(tmp_path / "in", series.boxes, tmp_path / "out")

    assert bool(answer["files"]) is is_made
    assert bool(answer["not_made"]) is not is_made
    if not is_made:
        assert "differ in direction" in answer["not_made"][0]["detail"]


@pytest.mark.parametrize("what", ["zeros", "structures"])
def test_an_odd_file_beside_the_series_costs_nothing(series, files, tmp_path, what):
    odd = tmp_path / "in/z.dcm"
    if what == "zeros":
        odd.write_bytes(bytes(128) + b"DICM" + bytes(400))
    else:
        structures(odd)

    answer = series.results_of(tmp_path / "in", series.boxes, tmp_path / "out")

    assert not answer["not_made"]
    assert len(answer["files"]) == 3


def structures(path) -> None:
    """A structure set of more items than are read."""
    one = Dataset()
    one.SOPClassUID, one.SOPInstanceUID = RTStructureSetStorage, "1.2.3.5.1"
    one.ROIContourSequence = Sequence([Dataset() for _ in range(200_500)])
    one.file_meta = pydicom.dataset.FileMetaDataset()
    one.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    one.file_meta.MediaStorageSOPInstanceUID = "1.2.3.5.1"
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.save_as(path, enforce_file_format=True)


def test_a_giant_structure_set_in_a_zip_is_explained_and_the_scan_is_kept(series, files, tmp_path):
    import zipfile

    structures(tmp_path / "structures.dcm")
    with zipfile.ZipFile(tmp_path / "sent.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "structures.dcm", "structures.dcm")
        for file in files:
            archive.write(file, file.name)

    kept = deidentify_upload(
        tmp_path / "sent.zip", tmp_path / "kept.zip", Pseudonyms(bytes(32)), Policy()
    )

    assert kept is not None
    assert kept.places == tuple(range(1, 9))
    assert "items" in kept.left_out[0].reason


@pytest.mark.parametrize("names", [("liver ", "tumour"), ("Leber\\links", "x" * 70)])
def test_names_that_dicom_cannot_hold_are_made_to_fit(series, files, tmp_path, names):
    answer = series.results_of(
        tmp_path / "in", series.boxes, tmp_path / "out", names=dict(zip(names, (1, 2), strict=True))
    )

    assert not answer["not_made"]
    assert len(answer["files"]) == 3


def test_names_shown_are_valid_and_differ() -> None:
    shown = [
        Label(name, at, 0.0, 0).shown for at, name in enumerate(("x" * 70, "x" * 71, "", "a\\b"))
    ]

    assert len(set(shown)) == 4
    assert all(0 < len(text) <= 64 and text == text.strip() and "\\" not in text for text in shown)
    assert Label("liver", 1, 0.0, 0).shown == "liver"
