"""Real scans: the same voxels on the same grid with and without identities."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

from imaging.deidentify import deidentify_upload
from imaging.deidentify_dicom import Cleaned, Refused, clean_object
from imaging.deidentify_rules import KEPT_TEXT
from imaging.dicom_header import quiet
from imaging.errors import ScanError
from imaging.identity import Policy, Pseudonyms
from imaging.intake import read_scan

NAMES = Pseudonyms(b"k" * 32)
SERIES = {
    "chaos_ct_set3.zip": None,
    "totalseg_siemens_j2k.zip": None,
    "dcmqi_ct3slice_liver_seg.zip": None,
    "sts_002_ct_rtstruct.zip": None,
}
FOLDERS = ["mr_series_jpegls", "mr_series_rle", "mr_enhanced_philips", "enhanced"]


def outcome(path: Path, series_uid: str | None = None):
    """What the reader says of a scan: voxels and grids, or the problem's code."""
    try:
        scan = read_scan(path, kind="image", series_uid=series_uid)
    except ScanError as error:
        return error.code, sorted(
            str(found["num_files"]) for found in error.extra.get("series", [])
        )
    return scan.volume.voxels, scan.volume.affine, scan.source.affine, scan.modality


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(first, second) for first, second in zip(one, other, strict=True)
    )


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*.dcm")):
            archive.write(file, file.name)
    return target


@pytest.mark.parametrize("name", sorted(SERIES))
def test_a_real_series_is_read_alike(data: Path, tmp_path: Path, name: str) -> None:
    sent = data / "dicom_series" / name

    found = deidentify_upload(sent, tmp_path / "kept", NAMES, Policy())

    assert found is not None
    before, after = outcome(sent), outcome(tmp_path / "kept")
    assert same(before, after), (before[0], after[0])


def test_of_several_real_series_each_is_read_alike(data: Path, tmp_path: Path) -> None:
    sent = data / "dicom_series" / "prostatex_0000_multiseries.zip"
    with pytest.raises(ScanError, match="several_series") as several:
        read_scan(sent, kind="image")

    assert deidentify_upload(sent, tmp_path / "kept", NAMES, Policy()) is not None

    uids = [found["series_uid"] for found in several.value.extra["series"]]
    assert len(uids) > 1
    for uid in uids:
        assert same(outcome(sent, uid), outcome(tmp_path / "kept", NAMES.uid(uid))), uid


@pytest.mark.parametrize("name", FOLDERS)
def test_real_cases_are_read_alike(data: Path, tmp_path: Path, name: str) -> None:
    sent = zipped(data / "dicom_cases" / name, tmp_path / "sent.zip")

    assert deidentify_upload(sent, tmp_path / "kept", NAMES, Policy()) is not None

    before, after = outcome(sent), outcome(tmp_path / "kept")
    assert same(before, after), (before[0], after[0])


def test_pixel_data_and_transfer_syntax_stay(data: Path) -> None:
    seen = set()
    for file in sorted((data / "dicom_cases" / "codec_matrix").glob("*.dcm")):
        sent = file.read_bytes()
        before = pydicom.dcmread(io.BytesIO(sent))

        found = clean_object(sent, NAMES, Policy())

        assert isinstance(found, Cleaned), file.name
        after = pydicom.dcmread(io.BytesIO(found.data))
        syntax = before.file_meta.TransferSyntaxUID
        if not syntax.is_deflated:  # kept as the same data set, inflated
            assert after.file_meta.TransferSyntaxUID == syntax
        assert after.PixelData == before.PixelData, file.name
        seen.add(syntax.name)
    assert len(seen) == 8


def test_no_text_of_a_real_header_survives_unless_it_is_kept_by_name(data: Path) -> None:
    """Patient, study, institution, dates and UIDs of every real file, looked for in its bytes."""
    checked = 0
    for file in sorted((data / "dicom_cases").rglob("*.dcm")):
        sent = file.read_bytes()
        found = clean_object(sent, NAMES, Policy(accept_burned_in=True))
        if isinstance(found, Refused):
            continue
        with quiet():
            before = pydicom.dcmread(io.BytesIO(sent), force=True, stop_before_pixels=True)
            after = pydicom.dcmread(io.BytesIO(found.data), stop_before_pixels=True)
            for tag in KEPT_TEXT & set(after.keys()):
                del after[tag]
            head = str(after) + str(after.file_meta)
            for element in before.iterall():
                risky = element.VR in ("PN", "LT", "ST", "UT", "DA", "DT", "UI") or (
                    element.VR in ("LO", "SH")
                    and any(word in element.keyword for word in ("Patient", "Study", "Institution"))
                )
                value = str(element.value)
                is_class = element.VR == "UI" and value.startswith("1.2.840.10008.")
                if risky and not is_class and len(value) > 5:
                    assert value not in head, (file.name, element.keyword)
                    checked += 1
    assert checked > 200
