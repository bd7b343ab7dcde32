"""Files other than DICOM: what says whose the voxels are goes, what says what they are stays."""

import errno
import gzip
import io
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imaging import nifti
from imaging.deidentify import deidentify_upload
from imaging.deidentify_formats import clean_file, form_of
from imaging.errors import ScanError
from imaging.identity import Policy, Pseudonyms
from imaging.image2d import decode_image
from imaging.intake import read_scan

NAMES = Pseudonyms(b"k" * 32)
AFFINE = np.array([[-1.6, 1.2, 0, 9], [-1.2, -1.6, 0, 8], [0, 0, 3.0, -7], [0, 0, 0, 1]])


def clean(data: bytes) -> bytes:
    form = form_of(data[:1024])
    assert form is not None
    target = io.BytesIO()
    clean_file(io.BytesIO(data), target, form)
    return target.getvalue()


def voxels(shape=(7, 5, 4)) -> np.ndarray:
    return np.random.default_rng(3).integers(-900, 900, shape).astype(np.int16)


def nifti_with_names(kind=nib.Nifti1Image, order: str = "<") -> bytes:
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.int16)
    header["descrip"] = b"CANARY descrip"
    header["aux_file"] = b"CANARY aux"
    header["intent_name"] = b"CANARY intent"
    if kind is nib.Nifti1Image:
        header["db_name"] = b"CANARY db"
        header["data_type"] = b"CANARY"
    else:
        header["unused_str"] = b"CANARY unused"
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"CANARY extension"))
    image = kind(voxels(), AFFINE, header)
    image.header.set_slope_inter(2.0, -10.0)
    image.header.set_xyzt_units("mm")
    image.header["cal_max"] = 77
    return image.to_bytes() + b"CANARY after the voxels"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("packed", [False, True])
def test_a_nifti_keeps_its_grid_and_its_voxels_and_no_text(tmp_path, kind, order, packed) -> None:
    data = nifti_with_names(kind, order)
    assert data.count(b"CANARY") == 7 - (kind is nib.Nifti2Image)
    sent = io.BytesIO()
    with gzip.GzipFile("CANARY_file_name.nii", "wb", fileobj=sent) as file:
        file.write(data)
    (tmp_path / "a").write_bytes(sent.getvalue() if packed else data)

    kept = clean((tmp_path / "a").read_bytes())
    (tmp_path / "b").write_bytes(kept)

    plain = gzip.decompress(kept) if packed else kept
    assert b"CANARY" not in kept + plain
    raw, cleaned = (read_scan(tmp_path / name, kind="image") for name in "ab")
    assert np.array_equal(raw.volume.voxels, cleaned.volume.voxels)
    assert np.array_equal(raw.volume.affine, cleaned.volume.affine)
    assert np.array_equal(raw.source.affine, cleaned.source.affine)
    assert raw.affine_from == cleaned.affine_from
    assert clean(kept) == kept


def test_a_nifti_in_a_zip_loses_its_name(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.comment = b"CANARY comment"
        archive.writestr("CANARY_readme.txt", "CANARY")
        archive.writestr("CANARY_doe.nii", nifti_with_names())

    found = deidentify_upload(tmp_path / "a", tmp_path / "b", NAMES, Policy())

    assert found is not None
    assert (found.places, found.left_out[0].reason) == ((1,), "not a scan")
    assert b"CANARY" not in (tmp_path / "b").read_bytes()
    scan = read_scan(tmp_path / "b", kind="image")
    assert scan.volume.shape == (7, 5, 4)


def test_a_damaged_nifti_is_told_as_the_reader_tells_it(tmp_path) -> None:
    (tmp_path / "a").write_bytes(clean(nifti_with_names()[:400]))
    with pytest.raises(ScanError, match="truncated_file"):
        read_scan(tmp_path / "a", kind="image")
    with pytest.raises(ScanError, match="truncated_file"):
        clean(gzip.compress(nifti_with_names())[:-30])
    bomb = bytearray(nifti_with_names())
    bomb[40:56] = np.array([3, 32767, 32767, 32767, 1, 1, 1, 1], "<i2").tobytes()
    with pytest.raises(ScanError, match="too_large"):
        clean(bytes(bomb))


def test_an_nrrd_loses_comments_and_key_value_pairs() -> None:
    body = voxels().tobytes()
    header = (
        b"NRRD0004\n# CANARY comment\ntype: int16\ndimension: 3\nspace: left-posterior-superior\n"
        b"sizes: 7 5 4\nspace directions: (1,0,0) (0,1,0) (0,0,2)\nkinds: domain domain domain\n"
        b"content: CANARY content\nendian: little\nencoding: %s\nspace origin: (1,2,3)\n"
        b"PatientName:=CANARY\n\n"
    )
    packed = io.BytesIO()
    with gzip.GzipFile("CANARY_name", "wb", fileobj=packed) as file:
        file.write(body)

    raw = clean(header % b"raw" + body + b"CANARY tail")
    gz = clean(header % b"gzip" + packed.getvalue())

    assert b"CANARY" not in raw + gz
    assert raw.endswith(b"\n\n" + body)
    assert gzip.decompress(gz.partition(b"\n\n")[2]) == body
    assert b"space origin: (1,2,3)\n" in raw
    assert b"sizes: 7 5 4\n" in raw


def test_a_metaimage_loses_comments() -> None:
    body = zlib.compress(voxels().tobytes())
    data = (
        b"ObjectType = Image\nNDims = 3\nComment = CANARY\nName = CANARY\nCANARYKey = 1\n"
        b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nElementSpacing = 1 1 2.5\n"
        b"DimSize = 7 5 4\nCompressedData = True\nElementType = MET_SHORT\n"
        b"ElementDataFile = LOCAL\n"
    ) + body
    data += b"CANARY tail"

    kept = clean(data)

    assert b"CANARY" not in kept
    assert kept.endswith(b"ElementDataFile = LOCAL\n" + body)
    assert b"Offset = 1 2 3\n" in kept


def test_voxels_beside_their_header_are_found_and_nothing_before_them_is_kept(tmp_path) -> None:
    header = (
        b"Comment = CANARY\nNDims = 3\nDimSize = 7 5 4\nElementType = MET_SHORT\n"
        b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\nElementSpacing = 1 1 2.5\n"
        b"HeaderSize = 16\nElementDataFile = CANARY_doe.raw\n"
    )
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("letter.txt", "CANARY")
        archive.writestr("CANARY.mhd", header)
        archive.writestr("CANARY_doe.raw", b"CANARY 16 bytes.".ljust(16) + voxels().tobytes())

    found = deidentify_upload(tmp_path / "a", tmp_path / "b", NAMES, Policy())

    assert found is not None
    assert found.places == (1, 2)
    with zipfile.ZipFile(tmp_path / "b") as archive:
        assert archive.namelist() == ["000001", "000002"]
        assert archive.read("000002") == voxels().tobytes()
        assert b"CANARY" not in archive.read("000001")
    raw, cleaned = (read_scan(tmp_path / name, kind="image") for name in "ab")
    assert np.array_equal(raw.volume.voxels, cleaned.volume.voxels)
    assert np.array_equal(raw.volume.affine, cleaned.volume.affine)


def test_a_png_keeps_its_picture_alone() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "CANARY")
    info.add_itxt("Comment", "CANARY", zip=False)
    exif = Image.Exif()
    exif[0x010E] = "CANARY"
    buffer = io.BytesIO()
    picture = Image.fromarray(voxels((9, 6)).astype(np.uint8))
    picture.save(buffer, "PNG", pnginfo=info, exif=exif)
    data = buffer.getvalue() + b"CANARY"
    assert data.count(b"CANARY") == 4

    kept = clean(data)

    assert b"CANARY" not in kept
    assert np.array_equal(decode_image(kept).pixels, decode_image(data).pixels)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_keeps_its_picture_alone(mode: str, progressive: bool) -> None:
    exif = Image.Exif()
    exif[0x010E] = "CANARY"
    buffer = io.BytesIO()
    smooth = Image.linear_gradient("L").resize((40, 24)).convert(mode)
    smooth.save(buffer, "JPEG", exif=exif, comment="CANARY", progressive=progressive)
    data = buffer.getvalue() + b"CANARY"
    assert data.count(b"CANARY") == 3

    kept = clean(data)

    assert b"CANARY" not in kept
    assert np.array_equal(decode_image(kept).pixels, decode_image(data).pixels)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body).to_bytes(4, "big")
    return len(body).to_bytes(4, "big") + kind + body + check


def test_what_lies_behind_the_pixels_of_a_png_or_in_tables_of_a_jpeg_goes() -> None:
    """Where a list of chunks and segments to keep would not look."""
    rows = b"".join(b"\0" + bytes(range(row, row + 20)) for row in range(10))
    header = (20).to_bytes(4, "big") + (10).to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    hidden = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    hidden += png_chunk(b"IDAT", zlib.compress(rows) + b"CANARY") + png_chunk(b"IEND", b"")
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "JPEG")
    unused = b"\xff\xdb" + (67).to_bytes(2, "big") + b"\x03" + b"CANARY".ljust(64, b"C")
    table = buffer.getvalue()[:2] + unused + buffer.getvalue()[2:]

    for data in (hidden, table):
        assert b"CANARY" in data
        kept = clean(data)
        assert b"CANARY" not in kept
        assert np.array_equal(decode_image(kept).pixels, decode_image(data).pixels)


@pytest.mark.parametrize("num_colours", [4, 256])
def test_of_a_palette_the_colours_that_are_seen_stay(num_colours) -> None:
    indices = np.arange(60, dtype=np.uint8).reshape(6, 10) % 4
    picture = Image.fromarray(indices).convert("P")
    colours = bytes([0, 0, 0, 90, 20, 10, 40, 80, 60, 250, 240, 230])
    picture.putpalette((colours + b"CANARY" * 126)[: 3 * num_colours])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = buffer.getvalue()
    assert (b"CANARY" in data) == (num_colours == 256)

    kept = clean(data)

    assert b"CANARY" not in kept
    assert np.array_equal(decode_image(kept).pixels, decode_image(data).pixels)


def test_a_full_disk_is_not_the_pictures_fault() -> None:
    class Full(io.BytesIO):
        def write(self, _data) -> int:
            raise OSError(errno.ENOSPC, "full")

    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    buffer.seek(0)

    with pytest.raises(OSError, match="full"):
        clean_file(buffer, Full(), "png")


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.98])
def test_cut_pictures_are_refused(cut: float) -> None:
    for form in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        Image.linear_gradient("L").save(buffer, form)
        data = buffer.getvalue()
        with pytest.raises(ScanError, match="truncated_file"):
            clean(data[: int(cut * len(data))])


def test_what_is_no_known_format_is_not_cleaned(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"Jane Doe, born in 1961")

    assert form_of(b"Jane Doe") is None
    assert deidentify_upload(tmp_path / "a", tmp_path / "b", NAMES, Policy()) is None
    assert not (tmp_path / "b").exists()


def test_the_writer_of_this_house_writes_what_is_clean_already(tmp_path) -> None:
    nifti.write(tmp_path / "a.nii", voxels(), AFFINE, description="mask")

    kept = clean((tmp_path / "a.nii").read_bytes())

    assert b"mask" not in kept
    assert kept[352:] == (tmp_path / "a.nii").read_bytes()[352:]
