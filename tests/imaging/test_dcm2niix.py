"""Every real series against dcm2niix: same grid, same voxels.

`*.expected.json` in ../shared/data is the reference made by dcm2niix 1.0.20220720; the program
itself (of the `test` extra) converts what has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from imaging.errors import ScanError
from imaging.intake import read_scan
from imaging.orientation import canonical, canonical_affine
from imaging.volume import Grid, corner_distance_mm

REFERENCES = ["chaos_ct_set3", "totalseg_siemens_j2k"]
SERIES = {
    "dicom_series/chaos_ct_set3.zip": 1e-3,
    "dicom_series/totalseg_siemens_j2k.zip": 1e-3,
    "dicom_series/prostatex_0000_multiseries.zip": 1e-3,
    # dcm2niix takes the gap as a difference of float32 numbers: 3.26996 for 3.27 mm, 47 times
    "dicom_series/sts_002_ct_rtstruct.zip": 3e-3,
    "dicom_series/dcmqi_ct3slice_liver_seg.zip": 1e-3,
    "dicom_cases/ct_gantry_tilt_siemens": 1e-3,
    "dicom_cases/enhanced": 1e-3,
    "dicom_cases/mr_enhanced_philips": 1e-3,
    "dicom_cases/mr_series_jpegls": 1e-3,
    "dicom_cases/mr_series_rle": 1e-3,
}
REFUSED = {"duplicate_slices"}  # the 4-D DWI of prostatex


def difference(volume, voxels, affine) -> tuple[float, float]:
    """Corner error in mm and largest relative difference of values, both put in RAS+."""
    theirs = canonical(voxels, affine)
    assert volume.shape == theirs.shape
    corner = corner_distance_mm(volume.affine, theirs.affine, volume.shape)
    apart = np.abs(volume.voxels - theirs.voxels.astype(np.float64)).max()
    return corner, float(apart / max(1.0, np.abs(theirs.voxels).max()))


def converted(path: Path, out: Path) -> dict[str, list[nib.Nifti1Image]]:
    """dcm2niix's 3D volumes by series UID; where it corrects a tilt, the corrected ones."""
    source = path
    if path.suffix == ".zip":
        source = out / "unpacked"
        with zipfile.ZipFile(path) as archive:
            archive.extractall(source)
    program = Path(sys.executable).parent / "dcm2niix"
    command = [program, "-p", "n", "-b", "n", "-z", "n", "-f", "%j", "-o", out, source]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    found: dict[str, list[nib.Nifti1Image]] = {}
    for file in sorted(out.glob("*.nii"), key=lambda file: len(file.name)):
        image = nib.Nifti1Image.from_filename(file)
        uid, _, change = file.stem.partition("_")
        if image.ndim == 3 and (change.startswith("Tilt") or not change):
            found[uid] = [image]
        elif image.ndim == 3:
            found.setdefault(uid, []).append(image)
    return found


@pytest.mark.parametrize("name", SERIES)
def test_grid_and_voxels_equal_those_of_dcm2niix(data, tmp_path, name):
    path = data / name
    theirs = converted(path, tmp_path)

    scans = [read_one(path, uid) for uid in uids(path)]

    compared = 0
    for scan in scans:
        if scan is None:
            continue
        images = theirs.get(scan.series_uid) or next(iter(theirs.values()))
        (image,) = images
        corner, values = difference(scan.volume, np.asarray(image.dataobj), image.affine)
        assert corner < SERIES[name]
        exact = 1e-6 if scan.volume.voxels.dtype == np.float32 else 0.0
        assert values <= exact
        compared += 1
    assert compared >= 1


def uids(path) -> list[str | None]:
    try:
        read_scan(path, kind="image")
    except ScanError as error:
        assert error.code == "several_series"
        return [series["series_uid"] for series in error.extra["series"]]
    return [None]


def read_one(path, uid):
    try:
        return read_scan(path, kind="image", series_uid=uid)
    except ScanError as error:
        assert error.code in REFUSED
        return None


@pytest.mark.parametrize("name", REFERENCES)
def test_grid_and_voxels_equal_the_shared_reference(data, name):
    (expected,) = reference(data, name)

    scan = read_scan(data / "dicom_series" / f"{name}.zip", kind="image")

    grid = Grid(tuple(expected["shape"]), np.asarray(expected["affine_ras"]))
    assert scan.volume.shape == grid.shape
    theirs = canonical_affine(grid)
    assert corner_distance_mm(scan.volume.affine, theirs, grid.shape) < 1e-3
    assert (scan.volume.voxels.min(), scan.volume.voxels.max()) == (
        expected["min"],
        expected["max"],
    )
    assert scan.volume.voxels.mean(dtype=np.float64) == pytest.approx(expected["mean"], abs=1e-6)
    for probe in expected["probes"]:
        at = np.linalg.solve(scan.volume.affine, [*probe["world_ras"], 1])[:3]
        assert np.abs(at - np.rint(at)).max() < 0.01
        assert scan.volume.voxels[tuple(np.rint(at).astype(int))] == probe["value"]


def reference(data, name) -> list[dict]:
    return json.loads((data / "dicom_series" / f"{name}.expected.json").read_text())["outputs"]


def test_the_slices_of_a_tilted_series_hold_what_dcm2niix_stacks(data):
    """Its stack has the right values and says itself that the place is not a NIfTI's."""
    stacked, _ = reference(data, "ge_head_tilt_variable_spacing")

    scan = read_scan(data / "dicom_series/ge_head_tilt_variable_spacing.zip", kind="image")

    assert list(scan.slices.shape) == stacked["shape"]
    assert scan.volume.voxels.min() == stacked["min"]
    assert 0.9 * stacked["max"] < scan.volume.voxels.max() <= stacked["max"]
    axis = scan.slices.positions_mm[-1] - scan.slices.positions_mm[0]
    normal = scan.slices.affine_of(0)[:3, 2]
    tilt = np.degrees(np.arccos(abs(axis @ normal) / np.linalg.norm(axis)))
    assert tilt == pytest.approx(18.5, abs=0.1), "of dcm2niix's log"


def half_a_voxel(volume):
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 0] / 2
    return volume.voxels, affine


def flipped(volume):
    return volume.voxels[::-1], volume.affine


@pytest.mark.parametrize("change", [half_a_voxel, flipped])
def test_a_wrong_conversion_would_be_seen(data, change):
    """The negative control of the tests above."""
    volume = read_scan(data / "dicom_series/totalseg_siemens_j2k.zip", kind="image").volume

    corner, values = difference(volume, *change(volume))

    assert corner > 1e-3 or values > 0
