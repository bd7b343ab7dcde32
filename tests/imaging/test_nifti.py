from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from imaging import nifti
from imaging.errors import ScanError

VOXELS = np.random.default_rng(0).integers(-1000, 2000, (5, 6, 7)).astype(np.int16)
AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.7, 0, -80], [0, 0, 2.5, 1500], [0, 0, 0, 1.0]])


def refusal(path) -> ScanError:
    with pytest.raises(ScanError) as caught:
        nifti.read(path)
    return caught.value


def save(path, voxels=VOXELS, affine=AFFINE, kind=nib.Nifti1Image, **header):
    image = kind(voxels, affine)
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def patched(path, offset: int, form: str, *values):
    """The file with header bytes overwritten, which no library would write."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *values)
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_what_is_written_is_read_back_and_nibabel_agrees(tmp_path, name, dtype):
    voxels = np.abs(VOXELS).astype(dtype) if np.dtype(dtype).kind == "u" else VOXELS.astype(dtype)
    nifti.write(tmp_path / name, voxels, AFFINE, description="test")

    volume, grid = nifti.read(tmp_path / name)
    oracle = nib.Nifti1Image.from_filename(tmp_path / name)

    assert np.array_equal(volume.voxels, voxels[::-1])
    assert np.array_equal(grid.affine, AFFINE.astype(np.float32))
    assert np.array_equal(np.asarray(oracle.dataobj), voxels)
    assert oracle.get_data_dtype() == dtype
    assert int(oracle.header["sform_code"]) > 0
    assert np.allclose(oracle.get_qform(), AFFINE, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 10)] * 3),
    origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
)
def test_any_box_affine_survives_to_float32_precision(tmp_path_factory, angles, spacing, origin):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = origin
    path = tmp_path_factory.mktemp("a") / "a.nii"

    nifti.write(path, VOXELS, affine)
    _, grid = nifti.read(path)

    assert np.array_equal(grid.affine, affine.astype(np.float32))


def test_the_bytes_depend_on_the_arguments_alone(tmp_path):
    for name in ("one.nii.gz", "two.nii.gz"):
        nifti.write(tmp_path / name, VOXELS, AFFINE)

    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()
    assert b"one" not in (tmp_path / "one.nii.gz").read_bytes()


def test_content_decides_and_not_the_name(tmp_path):
    packed, plain = tmp_path / "packed", tmp_path / "plain.nii.gz"
    nifti.write(tmp_path / "a.nii.gz", VOXELS, AFFINE)
    nifti.write(tmp_path / "a.nii", VOXELS, AFFINE)
    (tmp_path / "a.nii.gz").rename(packed)
    (tmp_path / "a.nii").rename(plain)

    assert np.array_equal(nifti.read(packed)[0].voxels, nifti.read(plain)[0].voxels)


def test_slope_and_intercept_are_applied(tmp_path):
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.header.set_slope_inter(0.5, -1024)
    image.to_filename(tmp_path / "a.nii")
    raw = np.asarray(nib.Nifti1Image.from_filename(tmp_path / "a.nii").dataobj)

    volume, _ = nifti.read(tmp_path / "a.nii")

    assert np.allclose(volume.voxels, raw[::-1], atol=1e-3)


def test_whole_floats_become_int16_and_others_stay_float32(tmp_path):
    whole, _ = nifti.read(save(tmp_path / "a.nii", VOXELS.astype(np.float64)))
    halves, _ = nifti.read(save(tmp_path / "b.nii", VOXELS / 2))
    large, _ = nifti.read(save(tmp_path / "c.nii", VOXELS.astype(np.int32) * 100))

    assert whole.voxels.dtype == np.int16
    assert (halves.voxels.dtype, large.voxels.dtype) == (np.float32, np.float32)
    assert np.array_equal(halves.voxels, VOXELS[::-1] / 2)
    assert np.array_equal(large.voxels, VOXELS[::-1].astype(np.int32) * 100)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_big_endian_and_nifti_2_are_read(tmp_path, kind):
    image = kind(VOXELS, AFFINE)
    header = image.header.as_byteswapped(">")
    kind(VOXELS, AFFINE, header).to_filename(tmp_path / "a.nii")

    volume, grid = nifti.read(tmp_path / "a.nii")

    assert np.array_equal(volume.voxels, VOXELS[::-1])
    assert np.allclose(grid.affine, AFFINE)


def test_the_sform_is_preferred_and_the_qform_is_the_fallback(tmp_path):
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.set_qform(np.diag([1.0, 1, 1, 1]), 1)
    image.set_sform(AFFINE, 2)
    image.to_filename(tmp_path / "both.nii")
    image.set_sform(None, 0)
    image.to_filename(tmp_path / "q.nii")
    image.set_qform(None, 0)
    image.to_filename(tmp_path / "none.nii")

    _, both = nifti.read_stored(tmp_path / "both.nii")
    _, q_only = nifti.read_stored(tmp_path / "q.nii")

    assert both.affine_from == "sform"
    assert np.allclose(both.affine, AFFINE)
    assert q_only.affine_from == "qform"
    assert np.allclose(q_only.affine, np.eye(4))
    assert refusal(tmp_path / "none.nii").code == "bad_geometry"


def test_one_volume_in_four_dimensions_is_a_volume_and_two_are_not(tmp_path):
    one, _ = nifti.read(save(tmp_path / "one.nii", VOXELS[..., None]))

    assert one.shape == VOXELS.shape
    two = save(tmp_path / "two.nii", np.stack([VOXELS, VOXELS], axis=-1))
    assert refusal(two).code == "not_three_dimensional"
    assert refusal(save(tmp_path / "flat.nii", VOXELS[..., :1])).code == "not_three_dimensional"
    assert refusal(save(tmp_path / "2d.nii", VOXELS[..., 0])).code == "not_three_dimensional"


def test_bad_affines_are_refused(tmp_path):
    sheared, flat, nan = AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
    sheared[1, 2] = 0.3
    flat[:3, 2] = 0
    nan[0, 3] = np.nan
    for affine, word in ((sheared, "sheared"), (flat, "spacing"), (nan, "finite")):
        image = nib.Nifti1Image(VOXELS, None)
        image.header.set_sform(affine, 1)
        image.to_filename(tmp_path / "a.nii")

        error = refusal(tmp_path / "a.nii")

        assert error.code == "bad_geometry"
        assert word in error.detail


def test_units_other_than_millimetres_are_refused(tmp_path):
    assert refusal(save(tmp_path / "a.nii", xyzt_units=3)).code == "bad_geometry"


def test_nan_is_refused(tmp_path):
    voxels = VOXELS.astype(np.float32)
    voxels[1, 2, 3] = np.nan

    assert refusal(save(tmp_path / "a.nii", voxels)).code == "non_finite_voxels"


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]])
def test_complex_and_colour_are_refused(tmp_path, dtype):
    voxels = np.zeros(VOXELS.shape, dtype=dtype)

    assert refusal(save(tmp_path / "a.nii", voxels)).code == "unsupported_format"


@pytest.mark.parametrize("keep", [100, 340, 352, 400, -1])
def test_cut_off_files_are_refused(tmp_path, keep):
    save(tmp_path / "a.nii")
    plain = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(plain[:keep])
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(plain[:keep]))
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(plain)[: keep // 4 if keep > 0 else keep])

    for name in ("a.nii", "a.nii.gz", "b.nii.gz"):
        assert refusal(tmp_path / name).code == "truncated_file"


def test_a_header_that_declares_more_than_the_cap_is_refused_before_any_work(tmp_path):
    path = patched(save(tmp_path / "a.nii"), 42, "<3h", 32767, 32767, 32767)

    assert refusal(path).code == "too_large"


def test_a_header_that_declares_more_than_the_file_holds_is_refused(tmp_path):
    path = patched(save(tmp_path / "a.nii"), 42, "<3h", 500, 500, 500)
    packed = tmp_path / "a.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))

    assert refusal(path).code == "truncated_file"
    assert refusal(packed).code == "truncated_file"


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [(40, "<h", 9), (42, "<h", -3), (70, "<h", 9999), (108, "<f", float("nan")), (108, "<f", 1e30)],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, offset, form, value):
    path = patched(save(tmp_path / "a.nii"), offset, form, value)

    assert refusal(path).code in ("not_a_scan", "unsupported_format", "too_large")


def test_a_canonical_file_is_mapped_and_others_are_refused(tmp_path):
    volume, _ = nifti.read(save(tmp_path / "source.nii"))
    nifti.write(tmp_path / "volume.nii", volume.voxels, volume.affine)

    opened = nifti.open_canonical(tmp_path / "volume.nii")

    assert isinstance(opened.voxels, np.memmap)
    assert not opened.voxels.flags.writeable
    assert np.array_equal(opened.voxels, volume.voxels)
    assert np.allclose(opened.affine, volume.affine)
    with pytest.raises(ScanError):
        nifti.open_canonical(tmp_path / "source.nii")


def test_real_odd_files_behave(data):
    cases = data / "nifti_cases"

    oblique, grid = nifti.read(cases / "oblique_ct_pitch.nii.gz")
    tiny, _ = nifti.read(cases / "tiny_7x5x3.nii.gz")

    oracle = nib.Nifti1Image.from_filename(cases / "oblique_ct_pitch.nii.gz")
    assert np.array_equal(oblique.voxels, np.asarray(oracle.dataobj))
    assert np.allclose(grid.affine, oracle.affine)
    assert np.abs(grid.affine[1, 2]) > 0.01
    assert tiny.shape == (7, 5, 3)
    assert refusal(cases / "shear_affine_ct.nii.gz").code == "bad_geometry"
    assert refusal(cases / "mr_4d_pcasl.nii.gz").code == "not_three_dimensional"
    assert refusal(cases / "nifti2.nii.gz").code == "not_three_dimensional"
