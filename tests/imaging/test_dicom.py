"""Synthetic series with every kind of geometry, against the phantom and against highdicom."""

from __future__ import annotations

import copy
import warnings
from io import BytesIO

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from imaging import phantom
from imaging.dicom import read_series
from imaging.dicom_header import quiet, read_header
from imaging.errors import ScanError
from imaging.orientation import canonical
from imaging.volume import Volume

LPS = np.array([-1.0, -1.0, 1.0])


@pytest.fixture
def slices(small_series):
    return [pydicom.dcmread(file) for file in small_series]


def opened(slices, seed=0):
    """The slices as files in a random order."""
    files = []
    for s in np.random.default_rng(seed).permutation(len(slices)):
        buffer = BytesIO()
        slices[s].save_as(buffer, enforce_file_format=True)
        files.append(lambda data=buffer.getvalue(): BytesIO(data))
    return files


def refusal(slices, **options) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_series(opened(slices), **options)
    return caught.value


def move(slice_, offset_lps):
    place = np.asarray(slice_.ImagePositionPatient, dtype=float) + offset_lps
    slice_.ImagePositionPatient = [f"{x:.9g}" for x in place]


def test_a_phantom_s_series_is_the_phantom(small, slices):
    series = read_series(opened(slices))

    assert np.array_equal(series.volume.voxels, small.volume.voxels)
    assert series.volume.voxels.dtype == np.int16
    assert np.allclose(series.volume.affine, small.volume.affine)
    assert series.modality == "CT"
    assert series.unused == ()
    assert "PHANTOM" not in series.patient_key
    assert len(series.patient_key) == 64


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
@pytest.mark.parametrize("angles", [(0, 0, 0), (11, -17, 23)])
def test_oblique_sagittal_coronal_and_reversed_series_agree_with_highdicom(tmp_path, axes, angles):
    rng = np.random.default_rng(sum(axes) + axes[0])
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, :3] = (turn * (0.9, 1.7, 3.1))[:, list(axes)] * (1, -1, 1)
    affine[:3, 3] = (12.5, -70.25, 333.0)
    voxels = rng.integers(-1000, 2000, (6, 9, 5)).astype(np.int16)
    files = phantom.write_dicom_series(Volume(voxels, affine), tmp_path, seed=2)

    series = read_series(list(rng.permutation(np.asarray(files))))

    expected = canonical(voxels, affine)
    assert np.array_equal(series.volume.voxels, expected.voxels)
    assert np.allclose(series.volume.affine, expected.affine, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = highdicom.get_volume_from_series([pydicom.dcmread(file) for file in files])
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    theirs = canonical(oracle.array, flip @ oracle.affine)
    assert np.array_equal(series.volume.voxels, theirs.voxels)
    assert np.allclose(series.volume.affine, theirs.affine, atol=1e-5)


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian]
)
def test_compressed_series_have_the_same_voxels(small, slices, syntax):
    for slice_ in slices:
        if syntax.is_encapsulated:
            slice_.compress(syntax, generate_instance_uid=False)
        else:
            slice_.file_meta.TransferSyntaxUID = syntax

    assert np.array_equal(read_series(opened(slices)).volume.voxels, small.volume.voxels)


def test_each_slice_has_its_own_slope_and_fractions_become_float32(small, slices):
    for s, slice_ in enumerate(slices):
        slice_.RescaleSlope = str(1 + 0.25 * (s % 3))

    series = read_series(opened(slices))

    stored = small.volume.voxels.astype(np.float64) + 1024
    slopes = 1 + 0.25 * (np.arange(len(slices)) % 3)
    assert series.volume.voxels.dtype == np.float32
    assert np.allclose(series.volume.voxels, stored * slopes - 1024)


def test_signed_pixels_are_read(small, slices):
    for slice_ in slices:
        stored = slice_.pixel_array.astype(np.int16) - 1024
        slice_.PixelRepresentation, slice_.RescaleIntercept = 1, "0"
        slice_.BitsStored, slice_.HighBit = 16, 15
        slice_.PixelData = stored.tobytes()

    assert np.array_equal(read_series(opened(slices)).volume.voxels, small.volume.voxels)


def test_pixel_representation_and_negative_scales_may_change_from_slice_to_slice(small, slices):
    for s, slice_ in enumerate(slices):
        hu = slice_.pixel_array.astype(np.int32) - 1024
        if s % 3 == 0:
            slice_.PixelRepresentation, slice_.RescaleIntercept, stored = 1, "0", hu
        elif s % 3 == 1:
            slice_.PixelRepresentation, slice_.RescaleSlope, stored = 1, "-1", 100 - hu
            slice_.RescaleIntercept = "100"
        else:
            continue
        slice_.BitsStored, slice_.HighBit = 16, 15
        slice_.PixelData = stored.astype("<i2").tobytes()

    series = read_series(opened(slices))

    assert series.volume.voxels.dtype == np.int16
    assert np.array_equal(series.volume.voxels, small.volume.voxels)


def test_sixteen_bits_without_sign_that_do_not_fit_int16_become_float32(slices):
    for slice_ in slices:
        slice_.BitsStored, slice_.HighBit, slice_.RescaleIntercept = 16, 15, "0"
        slice_.PixelData = (slice_.pixel_array.astype(np.uint16) + 40_000).tobytes()

    series = read_series(opened(slices))

    stored = np.stack([s.pixel_array for s in slices], axis=-1)
    assert series.volume.voxels.dtype == np.float32
    assert np.array_equal(series.volume.voxels, stored[::-1, ::-1].transpose(1, 0, 2))


def test_bytes_and_big_endian_and_implicit_pixels_are_read(small, slices):
    wanted = np.clip(small.volume.voxels + 1024, 0, 255) - 1024
    for s, slice_ in enumerate(slices):
        stored = np.clip(slice_.pixel_array, 0, 255)
        if s % 3 == 0:
            slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 8, 8, 7
            slice_.PixelData = stored.astype(np.uint8).tobytes() + bytes(stored.size % 2)
            slice_["PixelData"].VR = "OB"
        elif s % 3 == 1:
            slice_.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            slice_.PixelData = stored.astype("<u2").tobytes()
        else:
            slice_.PixelData = stored.astype("<u2").tobytes()

    assert np.array_equal(read_series(opened(slices)).volume.voxels, wanted)


def test_a_header_longer_than_what_is_read_at_first_is_read(small, slices):
    for s, slice_ in enumerate(slices):
        block = slice_.private_block(0x0009, "PCRL TEST", create=True)
        block.add_new(1, "OB", bytes(15_000 + 200 * s))
        slice_.add_new(0x00190010, "LO", "PCRL TEST")
        slice_.add_new(0x00191001, "OB", bytes(400_000 if s == 3 else 10))

    assert np.array_equal(read_series(opened(slices)).volume.voxels, small.volume.voxels)


def test_a_run_of_zeros_is_not_parsed_to_its_end():
    content = bytes(128) + b"DICM" + bytes(3_000_000)

    with pytest.raises(ScanError) as caught:
        read_series([lambda: BytesIO(content)])

    assert caught.value.code == "not_a_scan"


def test_missing_slices_are_refused_by_name(slices):
    del slices[7:9]

    error = refusal(slices)

    assert error.code == "missing_slices"
    assert "2 slices" in error.detail
    assert len(error.extra["members"]) == 2


def test_two_images_at_one_place_are_refused_and_the_same_image_twice_is_not(slices):
    twin = copy.deepcopy(slices[4])
    again = read_series(opened([*slices, twin]))

    assert [one.reason for one in again.unused] == ["the same image as another file"]
    assert [one.sop_uid for one in again.unused] == [twin.SOPInstanceUID]
    twin.SOPInstanceUID = twin.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    renamed = read_series(opened([*slices, twin]))
    assert "same pixels at the same place" in renamed.unused[0].reason
    twin.RescaleIntercept = "-1000"
    error = refusal([*slices, twin])
    assert error.code == "duplicate_slices"
    assert len(error.extra["members"]) == 2
    assert {twin.SOPInstanceUID, slices[4].SOPInstanceUID} == set(error.extra["sop_uids"])


def test_gaps_too_wide_to_be_filled_are_refused_by_name(slices):
    for s, slice_ in enumerate(slices):
        move(slice_, (0, 0, 0.02 * s * s))  # gaps of 12 mm and more

    assert refusal(slices).code == "uneven_spacing"


def test_uneven_gaps_are_resampled_by_place_or_refused_by_name(slices):
    for s, slice_ in enumerate(slices):
        move(slice_, (0, 0, -5 * s + 0.02 * s * s))  # gaps of 7 to 7.8 mm

    series = read_series(opened(slices))

    assert refusal(slices, may_resample=False).code == "uneven_spacing"
    assert series.slices is not None
    assert "uneven_spacing" in series.notes[0]
    assert 6.6 < series.volume.spacing_mm[2] < 7.02
    top = series.volume.affine @ [0, 0, series.volume.shape[2] - 1, 1]
    assert top[2] == pytest.approx(float(slices[-1].ImagePositionPatient[2]), abs=1e-6)
    assert [u.sop_uid for u in series.slice_files] == [s.SOPInstanceUID for s in slices]


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(slices):
    for s, slice_ in enumerate(slices):
        move(slice_, (0, 0, 0.05 * (-1) ** s))

    assert read_series(opened(slices)).volume.shape[2] == len(slices)


def test_gantry_tilt_is_resampled_by_place_or_refused_by_name(small, slices):
    for s, slice_ in enumerate(slices):
        move(slice_, (0, 1.5 * s, 0))

    series = read_series(opened(slices))
    error = refusal(slices, may_resample=False)

    assert "gantry_tilt" in series.notes[0]
    assert series.volume.shape == (45, 39 + 4, 21), "room for 30 mm of 9 mm pixels"
    assert np.array_equal(series.volume.voxels[:, 4:, 0], small.volume.voxels[:, :, 0])

    assert error.code == "gantry_tilt"
    assert error.extra["angle_deg"] == pytest.approx(np.degrees(np.arctan(1.5 / 12)), abs=0.01)


def test_what_lies_too_far_over_is_no_tilt(slices):
    for s, slice_ in enumerate(slices):
        move(slice_, (0, 13.0 * s, 0))

    assert refusal(slices).code == "gantry_tilt"


def test_every_file_is_used_or_explained(slices):
    slices[-1].SeriesInstanceUID = "2.25.77"
    files = [*opened(slices), lambda: BytesIO(b"notes of the ward " * 20)]

    series = read_series(files, series_uid=slices[0].SeriesInstanceUID)

    told = [one.member for one in series.used] + [one.member for one in series.unused]
    assert sorted(told) == list(range(len(files)))
    known = {s.SOPInstanceUID for s in slices}
    assert {one.sop_uid for one in (*series.used, *series.unused)} == known | {""}


def test_a_refusal_explains_the_files_that_are_no_images(slices):
    capture = copy.deepcopy(slices[0])
    capture.SOPClassUID = capture.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    capture.SOPInstanceUID = capture.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    del slices[7:9]

    error = refusal([*slices, capture])

    assert error.code == "missing_slices"
    (told,) = error.extra["files"]
    assert told["sop_uid"] == capture.SOPInstanceUID
    assert "Secondary Capture" in told["reason"]


def test_one_series_of_two_patients_is_refused(slices):
    slices[2].PatientID = "OTHER"

    error = refusal(slices)

    assert error.code == "mixed_patients"
    assert "OTHER" not in f"{error} {error.extra}"


def test_text_where_a_uid_should_be_is_not_repeated(slices):
    with quiet():
        for s, slice_ in enumerate(slices):
            slice_.SeriesInstanceUID = "CANARY^NAME" if s < 11 else "2.25.5"
            slice_.SOPInstanceUID = f"CANARY^{s}"
            slice_.Modality = "CANARY"
        files = opened(slices)

    with pytest.raises(ScanError) as caught:
        read_series(files)
    choices = caught.value.extra["series"]
    chosen = [read_series(files, series_uid=choice["series_uid"]) for choice in choices]

    assert caught.value.code == "several_series"
    assert "CANARY" not in f"{caught.value} {caught.value.extra}"
    assert {choice["modality"] for choice in choices} == {"CT"}
    assert sorted(series.volume.shape[2] for series in chosen) == [10, 11]
    assert all(used.sop_uid.startswith("2.25.") for series in chosen for used in series.used)


def test_slices_shifted_in_plane_are_refused(slices):
    move(slices[5], (0, 20, 0))

    assert refusal(slices).code == "bad_geometry"


def test_other_objects_are_left_out_with_a_reason(small, slices):
    capture, localizer, text = (copy.deepcopy(slices[0]) for _ in range(3))
    capture.SOPClassUID = capture.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    text.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]
    text.SOPInstanceUID = generate_uid()
    files = [
        *opened(slices),
        *opened([capture]),
        *opened([localizer]),
        *opened([text]),
        lambda: BytesIO(b"notes of the ward " * 20),
    ]

    series = read_series(files)

    assert np.array_equal(series.volume.voxels, small.volume.voxels)
    reasons = [one.reason for one in series.unused]
    assert [one.member for one in series.unused] == [21, 22, 23, 24]
    assert "Secondary Capture" in reasons[0]
    assert "localizer" in reasons[1]
    assert "another direction" in reasons[2]
    assert "not a DICOM object" in reasons[3]


def test_several_series_must_be_chosen_from(small, slices):
    others = [copy.deepcopy(s) for s in slices[:6]]
    for other in others:
        other.SeriesInstanceUID = "2.25.1"
        other.SOPInstanceUID = generate_uid()
        other.Modality, other.SOPClassUID = "MR", MRImageStorage
    both = [*slices, *others]

    error = refusal(both)
    chosen = read_series(opened(both), series_uid="2.25.1")

    assert error.code == "several_series"
    found = {(s["modality"], s["num_files"]) for s in error.extra["series"]}
    assert found == {("CT", 21), ("MR", 6)}
    assert chosen.modality == "MR"
    assert chosen.volume.shape[2] == 6
    assert len(chosen.unused) == 21
    assert refusal(both, series_uid="2.25.2").code == "no_such_series"


def test_two_stacks_in_one_series_are_refused(slices):
    for slice_ in slices[:10]:
        slice_.Rows = slice_.Rows - 1
        slice_.PixelData = slice_.PixelData[: slice_.Rows * slice_.Columns * 2]

    assert refusal(slices).code == "bad_geometry"


def test_one_slice_is_not_a_volume(slices):
    assert refusal(slices[:1]).code == "not_three_dimensional"


def test_unusable_pixels_are_refused_by_name(slices):
    inverted, foreign, colour = (copy.deepcopy(slices) for _ in range(3))
    for slice_ in inverted:
        slice_.PhotometricInterpretation = "MONOCHROME1"
    for slice_ in foreign:
        slice_.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
    for slice_ in colour:
        slice_.SamplesPerPixel = 3

    assert refusal(inverted).code == "unsupported_format"
    assert refusal(colour).code == "unsupported_format"
    files = [lambda d=with_mpeg(s): BytesIO(d) for s in slices]
    with pytest.raises(ScanError) as caught:
        read_series(files)
    assert caught.value.code == "unsupported_transfer_syntax"


def with_mpeg(slice_) -> bytes:
    """The slice claiming MPEG2 pixels; the UID has another length, so it is written afresh."""
    buffer = BytesIO()
    slice_.compress(RLELossless, generate_instance_uid=False)
    slice_.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
    slice_.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_pixels_cut_off_are_refused(slices):
    slices[3].PixelData = slices[3].PixelData[:100]

    error = refusal(slices)

    assert error.code == "truncated_file"
    assert "100 bytes" in error.detail


def test_geometry_that_is_missing_or_not_finite_is_refused(slices):
    without, broken = copy.deepcopy(slices), copy.deepcopy(slices)
    for slice_ in without:
        del slice_.PixelSpacing
    for slice_ in broken:
        slice_.ImageOrientationPatient = ["1", "0", "0", "1", "0", "0"]

    assert refusal(without).code == "bad_geometry"
    assert refusal(broken).code == "bad_geometry"


def test_a_deflated_bomb_is_stopped_by_a_cap(slices, monkeypatch):
    monkeypatch.setattr("imaging.dicom_file.MAX_INFLATED_BYTES", 100_000)
    slices[0].file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    slices[0].PixelData = bytes(1_000_000)
    buffer = BytesIO()
    slices[0].save_as(buffer, enforce_file_format=True)
    assert len(buffer.getvalue()) < 10_000

    with pytest.raises(ScanError, match="too_large"):
        read_header(buffer.getvalue(), 0)


@pytest.mark.parametrize("at", [b"MONOCHROME2 ", b"9\\8.5 ", b"2.25.", b"\\AXIAL"])
def test_nothing_of_the_file_is_said_or_logged(small_series, at, capfd, caplog):
    content = small_series[0].read_bytes()
    assert at in content
    content = content.replace(at, b"CANARYCANARY"[: len(at)]).replace(b"PHANTOM", b"CANARY!")

    with pytest.raises(ScanError) as caught:
        read_series([lambda: BytesIO(content)])

    told = f"{caught.value} {caught.value.extra} {caplog.text} {capfd.readouterr()}"
    assert "CANARY" not in told


def test_pydicom_alone_would_have_told(small_series, caplog):
    """The negative control of the test above."""
    content = small_series[0].read_bytes().replace(b"2.25.", b"CANAR")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _ = pydicom.dcmread(BytesIO(content)).SOPInstanceUID

    assert "CANAR" in caplog.text
    assert any("CANAR" in str(warning.message) for warning in told)


@pytest.mark.parametrize("is_signed", [False, True])
def test_bits_above_those_stored_are_no_part_of_the_value(tmp_path, is_signed):
    from imaging import phantom_dicom
    from imaging.intake import read_scan
    from imaging.volume import Volume

    random = np.random.default_rng(0)
    values = random.integers(-1000 if is_signed else 0, 2000, (8, 9, 4)).astype(np.int16)
    files = phantom_dicom.write_dicom_series(Volume(values, np.eye(4)), tmp_path / "in", seed=0)
    clean = read_scan(tmp_path / "in", kind="image").volume.voxels
    for file in files:
        one = pydicom.dcmread(file)
        stored = np.frombuffer(one.PixelData, "<u2")
        slope, intercept = int(one.RescaleSlope), int(one.RescaleIntercept)
        hu = stored.astype(np.int16).astype(int) * slope + intercept
        one.RescaleIntercept = 0
        one.PixelRepresentation = int(is_signed)
        one.BitsStored, one.HighBit = 12, 11
        overlay = (random.integers(0, 16, stored.shape) << 12).astype("<u2")
        one.PixelData = ((hu & 0x0FFF).astype("<u2") | overlay).tobytes()
        one.save_as(file, enforce_file_format=True)

    voxels = read_scan(tmp_path / "in", kind="image").volume.voxels

    assert np.array_equal(voxels, clean)
