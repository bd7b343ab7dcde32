"""A 2D image through the sandboxed intake: what is kept of it, and what is refused."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

from imaging import grey_png
from imaging.dicom_header import patient_key
from imaging.errors import ScanError
from imaging.identity import DEFAULT, Pseudonyms
from imaging.image2d import decode_image, read_image
from imaging.sandbox import run_intake
from models.preprocess2d import prepare_image
from models.recipe import Preprocessing2d

RAMP = np.arange(48 * 40, dtype=np.uint16).reshape(48, 40)
NAMES = Pseudonyms(b"k" * 32)


def picture(array, form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def dx(stored=RAMP, **fields) -> bytes:
    """A DX object of a patient."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["dx"])
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
    dataset.Modality, dataset.PatientID, dataset.PatientName = "DX", "MRN-4711", "Doe^Jane"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.PixelData = stored.astype("<u2").tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def intake(folder, data: bytes, kind="image_2d", *, identity=(NAMES, DEFAULT), **options):
    path = folder / "sent"
    path.write_bytes(data)
    out = folder / "out"
    out.mkdir()
    return run_intake(path, out, kind=kind, identity=identity, **options)


@pytest.mark.parametrize("identity", [(NAMES, DEFAULT), None], ids=["cleaned", "as it came"])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_picture_is_kept_as_its_pixels_alone(tmp_path, form, identity):
    secret = PngInfo()
    secret.add_text("Comment", "Doe^Jane")
    notes = {"pnginfo": secret} if form == "PNG" else {"comment": b"Doe^Jane"}
    data = picture((RAMP % 256).astype(np.uint8), form, **notes)
    assert b"Doe^Jane" in data  # the control

    report = intake(tmp_path, data, identity=identity)

    assert (report.shape, report.spacing_mm, report.affine) == ((48, 40), (), [])
    assert (report.format, report.dtype, report.patient_key) == (form.lower(), "uint8", "")
    np.testing.assert_array_equal(read_image(report.volume_path).pixels, decode_image(data).pixels)
    assert b"Doe^Jane" not in report.volume_path.read_bytes()
    if identity is not None:
        original = report.original_path.read_bytes()
        assert b"Doe^Jane" not in original and original.startswith(b"\x89PNG")
        np.testing.assert_array_equal(decode_image(original).pixels, decode_image(data).pixels)


def test_a_radiograph_leaves_its_patient_behind(tmp_path):
    report = intake(tmp_path, dx(WindowCenter=900, WindowWidth=700))

    assert (report.modality, report.format, report.shape) == ("DX", "dicom", (48, 40))
    assert report.deidentified["subject"] == NAMES.patient(patient_key("MRN-4711"))
    kept = report.original_path.read_bytes()
    assert b"MRN-4711" not in kept
    assert b"Doe^Jane" not in kept
    assert grey_png.SCALED in report.notes
    assert any("window" in note for note in report.notes)


def test_training_reads_the_kept_image_as_it_would_read_what_was_sent(tmp_path):
    sent = dx(WindowCenter=900, WindowWidth=700)

    kept = read_image(intake(tmp_path, sent).volume_path).pixels

    spec = Preprocessing2d(size=32)
    apart = prepare_image(kept, spec) - prepare_image(decode_image(sent).pixels, spec)
    assert np.abs(apart).max() < 1 / 2**16


@pytest.mark.parametrize(
    ("pixels", "levels"),
    [
        ([[0.0, 255.0]], np.array([[0, 255]], np.uint8)),
        ([[-1000.0, 3000.0]], np.array([[0, 4000]], np.uint16)),
        ([[7.0, 65535.0]], np.array([[7, 65535]], np.uint16)),
        ([[0.25, 0.75, 0.5]], np.array([[0, 65535, 32768]], np.uint16)),
        ([[-1.0, 65535.0]], np.array([[0, 65535]], np.uint16)),
    ],
    ids=["bytes", "moved up", "words", "fractions", "too many"],
)
def test_whole_numbers_are_kept_and_others_become_levels(pixels, levels):
    found = grey_png.levels_of(np.array(pixels, np.float32))

    np.testing.assert_array_equal(found, levels)
    assert found.dtype == levels.dtype


@pytest.mark.parametrize(
    ("data", "kind", "code"),
    [
        (picture(np.full((9, 9), 7, np.uint8)), "image_2d", "constant_image"),
        (picture(RAMP.astype(np.uint8))[:-30], "image_2d", "truncated_file"),
        (dx(NumberOfFrames=2, PixelData=RAMP.tobytes() * 2), "image_2d", "not_two_dimensional"),
        (dx(BurnedInAnnotation="YES"), "image_2d", "burned_in_annotation"),
        (b"not an image at all", "image_2d", "not_a_scan"),
        (picture(RAMP.astype(np.uint8)), "image", "not_three_dimensional"),
        (dx(), "image", "not_a_scan"),
    ],
    ids=["constant", "cut", "frames", "burned in", "text", "PNG as volume", "DX as volume"],
)
def test_what_cannot_be_used_is_refused_by_a_code(tmp_path, data, kind, code):
    with pytest.raises(ScanError) as caught:
        intake(tmp_path, data, kind)

    assert caught.value.code == code


def test_a_volume_is_no_2d_image_and_a_2d_image_has_no_series(tmp_path, small_zip):
    with pytest.raises(ScanError, match="not_two_dimensional"):
        intake(tmp_path, small_zip.read_bytes())
    (tmp_path / "other").mkdir()
    with pytest.raises(ScanError, match="no_such_series"):
        intake(tmp_path / "other", dx(), series_uid="1.2.3")


@pytest.mark.parametrize("identity", [(NAMES, DEFAULT), None])
@pytest.mark.parametrize(("orientation", "refused"), [(6, True), (2, True), (1, False)])
def test_a_picture_that_is_shown_otherwise_than_it_lies_is_refused(
    tmp_path, orientation, refused, identity
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture((RAMP % 251).astype(np.uint8), "JPEG", exif=exif)

    if not refused:  # the control
        assert intake(tmp_path, data, identity=identity).shape == RAMP.shape
        return
    with pytest.raises(ScanError, match=f"EXIF orientation {orientation}") as caught:
        intake(tmp_path, data, identity=identity)
    assert caught.value.code == "unsupported_format"


def test_a_png_whose_lower_bytes_would_be_dropped_is_refused(tmp_path):
    grey = picture(RAMP)
    deep = bytearray(grey)
    deep[25] = 4  # grey with transparency: the reader is not to get as far as the pixels

    with pytest.raises(ScanError, match="16 bits with colours or transparency"):
        intake(tmp_path, bytes(deep), identity=None)
    assert decode_image(grey).pixels.shape == RAMP.shape  # the control


def test_a_radiograph_beyond_float32_is_refused(tmp_path):
    data = dx(RescaleSlope="1e300", RescaleIntercept="0")

    with pytest.raises(ScanError) as caught:
        intake(tmp_path, data)
    assert caught.value.code == "non_finite_voxels"
