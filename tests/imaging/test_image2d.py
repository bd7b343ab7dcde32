"""2D images: PNG and JPEG made here, radiographs in DICOM, real ones read in place."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from imaging.errors import ScanError
from imaging.image2d import decode_image, read_image

RAMP = np.arange(20 * 24, dtype=np.uint8).reshape(20, 24)


def picture(array: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def radiograph(stored: np.ndarray, syntax=ExplicitVRLittleEndian, **fields) -> bytes:
    """A DX object; `fields` replace or add attributes."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=["image2d"])
    dataset.Modality, dataset.PatientID, dataset.PatientName = "DX", "p1", "Doe^Jane"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 1 if stored.ndim == 2 else 3
    dataset.PhotometricInterpretation = "MONOCHROME2" if stored.ndim == 2 else "RGB"
    if stored.ndim == 3:
        dataset.PlanarConfiguration = 0
    bits = stored.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    swapped = stored.astype(
        stored.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")
    )
    dataset.PixelData = swapped.tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    if syntax == RLELossless:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    pydicom.dcmwrite(
        buffer, dataset, enforce_file_format=True, little_endian=little, implicit_vr=implicit
    )
    return buffer.getvalue()


def refusal(data: bytes) -> ScanError:
    with pytest.raises(ScanError) as caught:
        decode_image(data)
    return caught.value


@pytest.mark.parametrize(
    "array", [RAMP, RAMP.astype(np.uint16) * 200, RAMP > 100], ids=["8 bit", "16 bit", "1 bit"]
)
def test_a_grey_png_keeps_its_values(array):
    image = decode_image(picture(array))

    assert image.format == "png" and image.modality == "" and image.notes == ()
    assert image.pixels.dtype == np.float32
    np.testing.assert_array_equal(image.pixels, array)


def test_colours_become_luminance():
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)

    image = decode_image(picture(colours))

    red, green, blue = np.moveaxis(colours.astype(float), 2, 0)
    np.testing.assert_allclose(image.pixels, 0.299 * red + 0.587 * green + 0.114 * blue, rtol=1e-6)
    assert image.notes == ("colours became luminance",)
    assert np.abs(image.pixels - colours[..., 0]).max() > 1


def test_grey_stored_as_colours_with_opaque_alpha_is_that_grey():
    stacked = np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 255)])

    image = decode_image(picture(stacked))

    np.testing.assert_allclose(image.pixels, RAMP, atol=1e-4)
    assert image.notes == ("colours became luminance",)


def test_transparency_is_ignored_and_noted():
    image = decode_image(picture(np.dstack([RAMP, 255 - RAMP])))

    np.testing.assert_array_equal(image.pixels, RAMP)
    assert image.notes == ("transparency ignored",)


def test_a_jpeg_is_read_by_its_content(tmp_path):
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    (tmp_path / "xray.txt").write_bytes(picture(smooth, "JPEG", quality=95))

    image = read_image(tmp_path / "xray.txt")

    assert image.format == "jpeg"
    np.testing.assert_allclose(image.pixels, smooth, atol=3)


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless],
    ids=lambda uid: uid.name,
)
def test_a_radiograph_keeps_its_values(syntax):
    stored = RAMP.astype(np.uint16) * 16

    image = decode_image(radiograph(stored, syntax))

    np.testing.assert_array_equal(image.pixels, stored)
    assert (image.format, image.modality, image.notes) == ("dicom", "DX", ())
    assert len(image.patient_key) == 64


def test_monochrome1_is_mirrored():
    stored = RAMP.astype(np.uint16)

    image = decode_image(radiograph(stored, PhotometricInterpretation="MONOCHROME1"))

    np.testing.assert_array_equal(image.pixels, 255 - stored)
    assert image.notes == ("MONOCHROME1: mirrored",)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_rescale_and_window_equal_pydicoms(function):
    stored = RAMP.astype(np.int16) * 10 - 1000
    fields = {
        "RescaleSlope": 2, "RescaleIntercept": -100, "VOILUTFunction": function,
        "WindowCenter": [300, 1], "WindowWidth": [900, 2],
    }  # fmt: skip
    data = radiograph(stored, **fields)

    image = decode_image(data)

    dataset = pydicom.dcmread(io.BytesIO(data))
    theirs = apply_windowing(apply_modality_lut(stored, dataset), dataset)
    low, high = (value * 2.0 - 100 for value in (-(2**15), 2**15 - 1))  # their output range
    np.testing.assert_allclose(image.pixels, (theirs - low) / (high - low), atol=1e-6)
    assert image.notes == ("rescaled", f"windowed ({function}, centre 300, width 900)")
    plain = decode_image(radiograph(stored)).pixels
    assert np.ptp(plain) > 2000 and np.ptp(image.pixels) <= 1


def test_a_window_of_width_one_is_a_threshold():
    image = decode_image(radiograph(RAMP, WindowCenter=100, WindowWidth=1))

    np.testing.assert_array_equal(image.pixels, RAMP > 99.5)


@pytest.mark.parametrize("width", [0, -5, 0.5])
def test_an_unusable_window_is_passed_over(width):
    image = decode_image(radiograph(RAMP, WindowCenter=100, WindowWidth=width))

    np.testing.assert_array_equal(image.pixels, RAMP)
    assert image.notes == ()


def table(entries: list[int], first: int, *, packed: str = "words", big_endian: bool = False):
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, 16]
    if packed == "words":
        item.LUTData = entries
        item["LUTData"].VR = "US"
    else:
        low_first = np.asarray(entries, dtype="u1" if packed == "bytes" else "<u2").view("<u2")
        item.LUTData = low_first.astype(">u2" if big_endian else "<u2").tobytes()
        item["LUTData"].VR = "OW"
    item["LUTDescriptor"].VR = "US"
    return [item]


@pytest.mark.parametrize("packed", ["words", "ow", "bytes"])
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian],
    ids=lambda uid: uid.name,
)  # fmt: skip
def test_look_up_tables_go_before_windows_and_continue_at_their_ends(packed, syntax):
    entries = [(7 * entry) % 200 + entry for entry in range(40)]
    big_endian = syntax == ExplicitVRBigEndian
    fields = {
        "VOILUTSequence": table(entries, 30, packed=packed, big_endian=big_endian),
        "WindowCenter": 100, "WindowWidth": 50,
    }  # fmt: skip

    image = decode_image(radiograph(RAMP, syntax, **fields))

    expected = [[entries[min(max(int(v) - 30, 0), 39)] for v in row] for row in RAMP]
    np.testing.assert_array_equal(image.pixels, expected)
    assert image.notes == ("through the look-up table of interest",)


def test_a_modality_table_takes_the_place_of_the_rescale():
    entries = list(range(1000, 1256))

    image = decode_image(radiograph(RAMP, ModalityLUTSequence=table(entries, 0), RescaleSlope=3))

    np.testing.assert_array_equal(image.pixels, RAMP.astype(int) + 1000)


def test_a_table_shorter_than_it_declares_is_refused():
    short = table([1, 2, 3], 0)
    short[0].LUTDescriptor = [200, 0, 16]

    error = refusal(radiograph(RAMP, VOILUTSequence=short))

    assert error.code == "truncated_file" and "3 entries; 200 declared" in error.detail


def test_a_secondary_capture_counts_by_its_modality():
    colours = np.dstack([RAMP, RAMP, 255 - RAMP])
    capture = {"SOPClassUID": SecondaryCaptureImageStorage}

    image = decode_image(radiograph(colours, **capture, Modality="CR"))

    expected = (0.299 + 0.587) * RAMP + 0.114 * (255.0 - RAMP)
    np.testing.assert_allclose(image.pixels, expected, rtol=1e-5)
    error = refusal(radiograph(colours, **capture, Modality="OT"))
    assert error.code == "not_a_scan" and "secondary capture" in error.detail


@pytest.mark.parametrize(
    ("fields", "code", "detail"),
    [
        ({"SOPClassUID": CTImageStorage}, "not_two_dimensional", "CT Image Storage"),
        ({"SOPClassUID": RTDoseStorage}, "not_a_scan", "RT Dose Storage"),
        ({"NumberOfFrames": 2}, "not_two_dimensional", "2 frames"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "unsupported_format", "neither grey"),
        ({"Rows": 0}, "not_a_scan", "without pixels"),
        ({"Rows": 60000, "Columns": 60000}, "too_large", "60000 x 60000"),
        ({"Rows": 21}, "truncated_file", "480 bytes; the header declares 504"),
        ({"RescaleSlope": "nan", "RescaleIntercept": "0"}, "non_finite_voxels", "not finite"),
        ({"RescaleSlope": "0", "RescaleIntercept": "7"}, "constant_image", "24 x 20 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_an_object_that_is_no_radiograph_is_refused_by_name(fields, code, detail):
    error = refusal(radiograph(RAMP, **fields))

    assert error.code == code and detail in error.detail
    assert "Doe" not in error.detail


def test_cut_off_files_are_refused():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for whole in (picture(noise), picture(noise, "JPEG"), radiograph(noise)):
        decode_image(whole)
        for share in (0.3, 0.9):
            code = refusal(whole[: int(len(whole) * share)]).code
            assert code in ("truncated_file", "not_a_scan")


def test_damaged_bytes_end_in_an_image_or_a_named_refusal():
    random = np.random.default_rng(0)
    window = {"WindowCenter": 100, "WindowWidth": 50, "VOILUTSequence": table([1, 2, 3], 0)}
    wholes = [picture(RAMP), picture(RAMP, "JPEG"), radiograph(RAMP, **window)]
    refused = 0
    for whole in wholes * 150:
        damaged = bytearray(whole)
        for at in random.integers(8, len(whole), 4):
            damaged[at] = random.integers(256)
        try:
            assert decode_image(bytes(damaged)).pixels.ndim == 2
        except ScanError:
            refused += 1

    assert 50 < refused < 400


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "not_a_scan"),
        (b"II*\0 a TIFF", "not_a_scan"),
        (struct.pack("<i", 348) + bytes(340) + b"n+1\0", "not_two_dimensional"),
        (picture(np.full((4, 4), 9, np.uint8)), "constant_image"),
        (b"\x89PNG\r\n\x1a\n and nothing else", "truncated_file"),
    ],
    ids=["empty", "tiff", "nifti", "constant", "magic only"],
)
def test_what_is_no_2d_image_is_refused(data, code):
    assert refusal(data).code == code


def test_an_animation_is_refused():
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 100)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])

    error = refusal(buffer.getvalue())

    assert error.code == "not_two_dimensional" and "2 pictures" in error.detail


@pytest.mark.parametrize("side", [8_200, 9_500, 40_000])
def test_a_png_that_declares_too_many_pixels_is_not_unpacked(side):
    """Above our cap, above Pillow's warning, above Pillow's error."""
    header = struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    data += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT"

    assert refusal(data).code == "too_large"


def test_real_chest_films_are_read(data):
    with zipfile.ZipFile(data / "cxr_nih1000_64" / "trainval.zip") as archive:
        images = [decode_image(archive.read(name)) for name in archive.namelist()]

    assert len(images) == 799
    assert {image.pixels.shape for image in images} == {(64, 64)}
    assert all(0 <= image.pixels.min() < image.pixels.max() <= 255 for image in images)


def test_computed_radiographs_of_pydicom_are_windowed_and_mirrored():
    folder = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests" / "77654033"
    for path in sorted(folder.glob("CR*/*")):
        image = read_image(path)

        dataset = pydicom.dcmread(path)
        assert dataset.SOPClassUID == ComputedRadiographyImageStorage
        assert image.modality == "CR"
        assert image.notes[-1] == "MONOCHROME1: mirrored"
        stored = dataset.pixel_array.astype(float)
        assert np.corrcoef(image.pixels.ravel(), stored.ravel())[0, 1] == pytest.approx(-1)


def test_a_slice_of_a_series_is_no_2d_image(data):
    with pytest.raises(ScanError) as caught:
        read_image(data / "dicom_cases" / "odd" / "CT_small_single_slice.dcm")

    assert caught.value.code == "not_two_dimensional"
