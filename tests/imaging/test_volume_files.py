"""NRRD and MetaImage, against what SimpleITK writes and reads; and NIfTI's two affines."""

from __future__ import annotations

import gzip
import zipfile

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its usual name
from scipy.spatial.transform import Rotation

from imaging.errors import ScanError
from imaging.intake import read_scan, report_of
from imaging.orientation import canonical
from imaging.sandbox import run_intake

VOXELS = np.random.default_rng(0).integers(-1000, 2000, (5, 6, 7)).astype(np.int16)


@pytest.fixture
def image() -> sitk.Image:
    """An oblique CT as ITK has it: (K, J, I), LPS."""
    image = sitk.GetImageFromArray(VOXELS.T)
    turn = Rotation.from_euler("xyz", (11, -17, 23), degrees=True).as_matrix()[:, [1, 0, 2]]
    image.SetDirection(turn.ravel().tolist())
    image.SetSpacing((0.7, 1.3, 2.5))
    image.SetOrigin((12.5, -70.25, 333.0))
    return image


def expected(image):
    """Voxels and affine in RAS+ by ITK's own accessors."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return canonical(sitk.GetArrayFromImage(image).T, np.diag([-1.0, -1, 1, 1]) @ affine)


def check(scan, image, form):
    theirs = expected(image)
    assert scan.format == form
    assert np.array_equal(scan.volume.voxels, theirs.voxels)
    assert np.allclose(scan.volume.affine, theirs.affine, atol=1e-4)


def refusal(path, **options) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_scan(path, kind="image", **options)
    return caught.value


def zip_of(path, *files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.name)
    return path


def edited(path, *changes: tuple[bytes, bytes]):
    content = path.read_bytes()
    for old, new in changes:
        assert old in content
        content = content.replace(old, new, 1)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("name", "form"), [("a.nrrd", "nrrd"), ("a.mha", "metaimage")])
def test_what_itk_writes_in_one_file_is_read(tmp_path, image, name, form, is_packed):
    sitk.WriteImage(image, tmp_path / name, useCompression=is_packed)

    check(read_scan(tmp_path / name, kind="image"), image, form)
    packed = zip_of(tmp_path / "a.zip", tmp_path / name)
    check(read_scan(packed, kind="image"), image, form)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("name", "form"), [("a.nhdr", "nrrd"), ("a.mhd", "metaimage")])
def test_a_header_and_its_voxels_are_read_from_a_zip_and_a_folder(
    tmp_path, image, name, form, is_packed
):
    folder = tmp_path / "folder"
    folder.mkdir()
    sitk.WriteImage(image, folder / name, useCompression=is_packed)
    files = sorted(folder.iterdir())
    assert len(files) == 2

    scan = read_scan(zip_of(tmp_path / "a.zip", *files), kind="image")

    check(scan, image, form)
    assert [used.member for used in scan.used] == [0, 1]
    check(read_scan(folder, kind="image"), image, form)
    assert refusal(folder / name).code == "unsupported_format"


def test_the_voxels_of_a_header_are_found_by_their_size_and_the_rest_is_explained(tmp_path, image):
    sitk.WriteImage(image, tmp_path / "a.mhd")
    (tmp_path / "notes.txt").write_text("about this scan")
    files = [tmp_path / "a.raw", tmp_path / "notes.txt", tmp_path / "a.mhd"]

    scan = read_scan(zip_of(tmp_path / "a.zip", *files), kind="image")

    check(scan, image, "metaimage")
    assert [used.member for used in scan.used] == [0, 2]
    assert [(m.member, m.reason) for m in scan.members] == [(1, "not a scan")]
    (tmp_path / "a.raw").write_bytes((tmp_path / "a.raw").read_bytes()[:-1])
    assert refusal(zip_of(tmp_path / "b.zip", *files)).code == "truncated_file"


def test_the_name_in_a_header_is_not_followed(tmp_path, image):
    sitk.WriteImage(image, tmp_path / "a.mhd")
    secret = tmp_path / "secret"
    secret.write_bytes(VOXELS.tobytes())
    edited(tmp_path / "a.mhd", (b"a.raw", str(secret).encode()))

    assert refusal(tmp_path / "a.mhd").code == "unsupported_format"
    assert refusal(zip_of(tmp_path / "a.zip", tmp_path / "a.mhd")).code == "unsupported_format"


@pytest.mark.parametrize(
    "kind", [sitk.sitkUInt8, sitk.sitkUInt16, sitk.sitkInt32, sitk.sitkFloat32]
)
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_every_type_of_voxel_is_read(tmp_path, image, name, kind):
    typed = sitk.Cast(sitk.Abs(image), kind)
    sitk.WriteImage(typed, tmp_path / name)

    scan = read_scan(tmp_path / name, kind="image")

    assert np.array_equal(scan.volume.voxels, expected(typed).voxels)


def test_big_endian_voxels_are_read(tmp_path, image):
    sitk.WriteImage(image, tmp_path / "a.nrrd")
    sitk.WriteImage(image, tmp_path / "a.mha")
    swapped = VOXELS.T.astype(">i2").tobytes()
    for name, little, big in (
        ("a.nrrd", b"endian: little", b"endian: big"),
        ("a.mha", b"BinaryDataByteOrderMSB = False", b"BinaryDataByteOrderMSB = True"),
    ):
        edited(tmp_path / name, (little, big), (VOXELS.T.tobytes(), swapped))
        assert np.array_equal(
            read_scan(tmp_path / name, kind="image").volume.voxels, expected(image).voxels
        )


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("RAS", (1, 1, 1)),
    ],
)
def test_the_spaces_of_nrrd_differ_by_signs(tmp_path, image, space, signs):
    sitk.WriteImage(image, tmp_path / "a.nrrd")
    edited(tmp_path / "a.nrrd", (b"left-posterior-superior", space.encode()))
    as_written = np.eye(4)
    as_written[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    as_written[:3, 3] = image.GetOrigin()

    scan = read_scan(tmp_path / "a.nrrd", kind="image")

    assert np.allclose(scan.source.affine, np.diag([*signs, 1.0]) @ as_written, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "old", "new", "code"),
    [
        ("a.nrrd", b"space: left-posterior-superior", b"space: scanner-xyz", "bad_geometry"),
        ("a.nrrd", b"space directions", b"spacing directions", "bad_geometry"),
        ("a.nrrd", b"space origin", b"nowhere", "bad_geometry"),
        ("a.nrrd", b"encoding: raw", b"encoding: hex", "unsupported_format"),
        ("a.nrrd", b"type: short", b"type: block", "unsupported_format"),
        ("a.nrrd", b"sizes: 5 6 7", b"sizes: 5 6 9", "truncated_file"),
        ("a.nrrd", b"sizes: 5 6 7", b"sizes: 5 6", "not_a_scan"),
        ("a.nrrd", b"sizes: 5 6 7", b"sizes: 5 6 99999999", "too_large"),
        ("a.nrrd", b"sizes: 5 6 7", b"sizes: 5 6 -7", "not_three_dimensional"),
        ("a.nrrd", b"sizes: 5 6 7", b"sizes: 5 6 CANARY", "not_a_scan"),
        ("a.mha", b"TransformMatrix", b"Nothing", "bad_geometry"),
        ("a.mha", b"Offset", b"Nothing", "bad_geometry"),
        ("a.mha", b"MET_SHORT", b"MET_OTHER", "unsupported_format"),
        ("a.mha", b"BinaryData = True", b"BinaryData = False", "unsupported_format"),
        ("a.mha", b"DimSize = 5 6 7", b"DimSize = 5 6 9", "truncated_file"),
        ("a.mha", b"DimSize = 5 6 7", b"DimSize = 5 6 99999999", "too_large"),
        ("a.mha", b"DimSize = 5 6 7", b"DimSize = 5 6 nan", "not_a_scan"),
        ("a.mha", b"LOCAL", b"LIST", "unsupported_format"),
    ],
)
def test_headers_that_do_not_say_enough_are_refused_by_name(tmp_path, image, name, old, new, code):
    sitk.WriteImage(image, tmp_path / name)

    error = refusal(edited(tmp_path / name, (old, new)))

    assert error.code == code
    assert "CANARY" not in str(error)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_packed_voxels_that_are_damaged_are_refused(tmp_path, image, name):
    sitk.WriteImage(image, tmp_path / name, useCompression=True)
    content = (tmp_path / name).read_bytes()

    for damaged in (content[:-40], content[:-6] + b"\xff\xff\xff\xff\xff\xff"):
        (tmp_path / name).write_bytes(damaged)
        assert refusal(tmp_path / name).code == "truncated_file"


def test_one_volume_in_four_dimensions_is_read_and_two_are_not(tmp_path):
    body = VOXELS.tobytes(order="F")
    header = (
        b"NRRD0004\ntype: short\ndimension: 4\nspace: left-posterior-superior\nsizes: %d 5 6 7\n"
        b"space directions: none (1,0,0) (0,1,0) (0,0,2)\nendian: little\nencoding: raw\n"
        b"space origin: (0,0,0)\n\n"
    )
    (tmp_path / "one.nrrd").write_bytes(header % 1 + body)
    (tmp_path / "two.nrrd").write_bytes(header % 2 + body + body)

    scan = read_scan(tmp_path / "one.nrrd", kind="image")

    assert np.array_equal(scan.volume.voxels, VOXELS[::-1, ::-1])
    assert refusal(tmp_path / "two.nrrd").code == "not_three_dimensional"


def test_voxels_counted_from_the_end_are_read(tmp_path, image):
    sitk.WriteImage(image, tmp_path / "a.nrrd")
    edited(tmp_path / "a.nrrd", (b"\n\n", b"\nbyte skip: -1\n\n" + b"x" * 99))

    check(read_scan(tmp_path / "a.nrrd", kind="image"), image, "nrrd")


def test_the_child_reads_them_too(tmp_path, image):
    sitk.WriteImage(image, tmp_path / "a.mhd")
    path = zip_of(tmp_path / "a.zip", tmp_path / "a.mhd", tmp_path / "a.raw")

    report = run_intake(path, tmp_path, kind="image")

    assert report.format == "metaimage"
    assert report.used == [{"member": 0, "sop_uid": ""}, {"member": 1, "sop_uid": ""}]
    back = nib.Nifti1Image.from_filename(report.volume_path)
    assert np.array_equal(np.asarray(back.dataobj), expected(image).voxels)


def test_a_disagreement_of_sform_and_qform_is_noted_with_the_winner(tmp_path):
    affine = np.diag([-1.0, -2, 3, 1])
    both = nib.Nifti1Image(VOXELS, affine)
    both.set_sform(affine, 2)
    both.set_qform(affine, 1)
    both.to_filename(tmp_path / "same.nii")
    moved = affine.copy()
    moved[2, 3] += 5
    both.set_qform(moved, 1)
    both.to_filename(tmp_path / "other.nii.gz")

    same = read_scan(tmp_path / "same.nii", kind="image")
    other = read_scan(tmp_path / "other.nii.gz", kind="image")

    assert same.notes == ()
    (note,) = report_of(other)["notes"]
    assert "5 mm" in note
    assert "sform was used (code 2 against 1)" in note
    assert np.allclose(other.source.affine, affine)


def test_two_volumes_in_a_zip_are_refused(tmp_path, image):
    sitk.WriteImage(image, tmp_path / "a.nrrd")
    sitk.WriteImage(image, tmp_path / "b.mha")
    path = zip_of(tmp_path / "a.zip", tmp_path / "a.nrrd", tmp_path / "b.mha")

    assert refusal(path).code == "unsupported_format"


def test_a_stream_that_unpacks_to_more_than_declared_costs_nothing(tmp_path, image):
    sitk.WriteImage(image, tmp_path / "a.nrrd", useCompression=True)
    content = (tmp_path / "a.nrrd").read_bytes()
    head = content[: content.index(b"\n\n") + 2]
    (tmp_path / "a.nrrd").write_bytes(head + gzip.compress(VOXELS.T.tobytes() + bytes(50 << 20)))

    check(read_scan(tmp_path / "a.nrrd", kind="image"), image, "nrrd")
