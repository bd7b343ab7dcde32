"""Real series and odd cases, read in place from ../shared/data."""

from __future__ import annotations

import hashlib
import json
import zipfile
from io import BytesIO

import nibabel as nib
import numpy as np
import pydicom
import pytest

from imaging.dicom import read_series
from imaging.dicom_header import read_header, read_pixels
from imaging.errors import ScanError
from imaging.intake import read_scan
from imaging.orientation import canonical, on_source_grid
from imaging.slices import to_slices

GE = "dicom_series/ge_head_tilt_variable_spacing.zip"
CODECS = [
    "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2",
    "DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99",
    "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90",
    "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80",
    "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70",
    "LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1",
    "LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2",
    "RLELosslessTransferSyntax_1.2.840.10008.1.2.5",
]


def refusal(path, **options) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_scan(path, kind="image", **options)
    return caught.value


@pytest.mark.parametrize("name", ["chaos_ct_set3", "totalseg_siemens_j2k"])
def test_real_series_agree_with_dcm2niix(data, name):
    expected = json.loads((data / "dicom_series" / f"{name}.expected.json").read_text())
    (output,) = expected["outputs"]

    scan = read_scan(data / "dicom_series" / f"{name}.zip", kind="image")

    theirs = np.asarray(output["affine_ras"])
    assert scan.volume.shape == tuple(output["shape"])
    assert np.allclose(scan.volume.spacing_mm, np.linalg.norm(theirs[:3, :3], axis=0), atol=1e-4)
    corners = np.array([[i, j, k, 1] for i in (0, 511) for j in (0, 511) for k in (0, 1)])
    corners[:, 2] *= output["shape"][2] - 1
    ours = {tuple(np.round((scan.volume.affine @ c)[:3], 2)) for c in corners}
    assert ours == {tuple(np.round((theirs @ c)[:3], 2)) for c in corners}
    for probe in output["probes"]:
        at = np.linalg.solve(scan.volume.affine, [*probe["world_ras"], 1])[:3]
        assert np.abs(at - np.rint(at)).max() < 0.05
        assert scan.volume.voxels[tuple(np.rint(at).astype(int))] == probe["value"]
    assert scan.volume.voxels.min() == output["min"]
    assert scan.volume.voxels.max() == output["max"]


def test_tilt_and_uneven_gaps_are_resampled_with_a_way_back(data):
    path = data / "dicom_series/ge_head_tilt_variable_spacing.zip"

    scan = read_scan(path, kind="image")

    assert scan.slices is not None
    assert scan.source.shape[:2] == (512, 611), "as dcm2niix' corrected output"
    assert len(scan.slice_files) == 28
    assert "18.5 degrees" in scan.notes[0]
    with pytest.raises(ScanError) as caught:
        read_scan(path, kind="labels")
    assert caught.value.code == "gantry_tilt"
    assert caught.value.extra["angle_deg"] == pytest.approx(18.5, abs=0.1)


def test_bone_found_on_the_regular_grid_is_bone_on_the_slices_that_were_sent(data):
    path = data / GE
    scan = read_scan(path, kind="image")
    level = np.percentile(scan.volume.voxels, 90)
    mask = on_source_grid((scan.volume.voxels > level).astype(np.uint8), scan.source)

    on_slices = to_slices(mask, scan.source, scan.slices)

    with zipfile.ZipFile(path) as archive:
        files = [archive.read(m) for m in archive.infolist() if not m.is_dir()]
    slices = [pydicom.dcmread(BytesIO(files[used.member])) for used in scan.slice_files]
    assert [s.SOPInstanceUID for s in slices] == [used.sop_uid for used in scan.slice_files]
    values = [s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices]
    bone = np.stack(values, axis=-1).transpose(1, 0, 2) > level
    both = np.count_nonzero(bone & (on_slices == 1))
    assert 2 * both / (bone.sum() + on_slices.sum()) > 0.93
    moved = np.roll(on_slices, 2, axis=1)  # the negative control: two pixels aside
    both = np.count_nonzero(bone & (moved == 1))
    assert 2 * both / (bone.sum() + moved.sum()) < 0.9


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("sts_002_ct_rtstruct", (161, 143, 48), "RT Structure Set"),
        ("dcmqi_ct3slice_liver_seg", (512, 512, 3), "Segmentation"),
    ],
)
def test_objects_beside_the_images_are_left_out_with_a_reason(data, name, shape, reason):
    scan = read_scan(data / "dicom_series" / f"{name}.zip", kind="image")

    assert scan.source.shape == shape
    (left_out,) = scan.members
    assert reason in left_out.reason


def test_a_study_of_several_series_must_be_chosen_from(data):
    path = data / "dicom_series/prostatex_0000_multiseries.zip"

    error = refusal(path)
    outcomes = []
    for series in error.extra["series"]:
        try:
            scan = read_scan(path, kind="image", series_uid=series["series_uid"])
            outcomes.append(scan.modality)
        except ScanError as problem:
            outcomes.append(problem.code)

    assert error.code == "several_series"
    assert sorted(outcomes) == ["MR", "MR", "duplicate_slices"], "the 4-D DWI is not stacked"


@pytest.mark.parametrize(
    ("folder", "code"),
    [
        ("ct_missing_slice_ge", "missing_slices"),
        ("ct_not_a_volume", "duplicate_slices"),
    ],
)
def test_unusable_series_are_refused_by_name(data, folder, code):
    assert refusal(data / "dicom_cases" / folder).code == code


@pytest.mark.parametrize("codec", CODECS)
def test_every_transfer_syntax_decodes_to_the_same_pixels(data, codec):
    expected = json.loads((data / "dicom_cases/pixels_expected.json").read_text())
    name = f"codec_matrix/CTImage_{codec}.dcm"
    content = (data / "dicom_cases" / name).read_bytes()

    header = read_header(content, 0)
    (pixels,) = read_pixels(content, header, [0])

    assert pixels.shape == tuple(expected[name]["shape"])
    digest = hashlib.sha256(pixels.astype("<i2").tobytes()).hexdigest()
    assert digest == expected[name]["sha256_pixels"]


@pytest.mark.parametrize("folder", ["mr_series_jpegls", "mr_series_rle", "mr_enhanced_philips"])
def test_mr_series_agree_with_their_reference_conversion(data, folder):
    files = sorted((data / "dicom_cases" / folder).glob("*.dcm"))
    oracle = nib.Nifti1Image.from_filename(data / "dicom_cases" / folder / "reference.nii.gz")

    series = read_series(files)

    values = np.asarray(oracle.dataobj).reshape(oracle.shape[:3])
    theirs = canonical(values, oracle.affine)
    assert np.allclose(series.volume.affine, theirs.affine, atol=2e-2)
    stored = series.volume.voxels.astype(float)
    assert stored.shape == theirs.shape
    assert np.corrcoef(stored.ravel(), theirs.voxels.ravel())[0, 1] > 0.9999


def test_an_enhanced_ct_is_one_volume_in_one_file(data):
    scan = read_scan(data / "dicom_cases/enhanced/eCT_Supplemental.dcm", kind="image")

    assert scan.source.shape == (512, 512, 2)
    assert scan.modality == "CT"
    assert scan.volume.voxels.dtype == np.int16


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("CT_small_single_slice.dcm", "not_three_dimensional"),
        ("rtplan.dcm", "not_a_scan"),
        ("rtdose.dcm", "not_a_scan"),
        ("meta_missing_tsyntax.dcm", "not_a_scan"),
        ("no_meta.dcm", "not_a_scan"),
    ],
)
def test_odd_objects_are_refused_by_name(data, name, code):
    assert refusal(data / "dicom_cases/odd" / name).code == code


def test_truncated_pixels_and_padding_and_sign_mismatch(data):
    odd = data / "dicom_cases/odd"
    expected = json.loads((data / "dicom_cases/pixels_expected.json").read_text())

    truncated = (odd / "MR_truncated.dcm").read_bytes()
    with pytest.raises(ScanError, match="truncated_file"):
        list(read_pixels(truncated, read_header(truncated, 0), [0]))
    for name in ("693_UNCI_padding.dcm", "J2K_pixelrep_mismatch.dcm", "explicit_VR-UN_j2k.dcm"):
        content = (odd / name).read_bytes()
        (pixels,) = read_pixels(content, read_header(content, 0), [0])
        known = expected[f"odd/{name}"]
        assert (pixels.min(), pixels.max()) == (known["min"], known["max"])


def test_pictures_in_a_zip_are_not_a_scan(data):
    assert refusal(data / "dicom_series/chaos_ct_set3_liver_png.zip").code == "not_a_scan"


def test_the_real_liver_label_lies_on_the_real_ct(data):
    ct = read_scan(data / "dicom_series/chaos_ct_set3.zip", kind="image")
    liver = read_scan(data / "dicom_series/chaos_ct_set3_liver_label.nii.gz", kind="labels")

    assert liver.volume.shape == ct.volume.shape
    assert np.allclose(liver.volume.affine, ct.volume.affine, atol=1e-3)
    assert liver.volume.voxels.dtype == np.uint8
    assert 130 < ct.volume.voxels[liver.volume.voxels == 1].mean() < 150


def test_a_zip_is_read_one_file_at_a_time(data, monkeypatch):
    """Peak memory is about one volume: no more than one file's bytes are alive at a time."""
    archive = zipfile.ZipFile(data / "dicom_series/totalseg_siemens_j2k.zip")
    open_now, most = 0, 0

    class Tracked(BytesIO):
        def __enter__(self):
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            return self

        def __exit__(self, *_):
            nonlocal open_now
            open_now -= 1

    with archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
        read_series([lambda m=m: Tracked(archive.read(m)) for m in members])

    assert (open_now, most) == (0, 1)
