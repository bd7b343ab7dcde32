"""Series in any direction, results of them, and the independent judges; loaded by path in tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from imaging import nifti
from imaging.dicom_header import quiet
from imaging.intake import read_scan
from imaging.orientation import on_source_grid
from imaging.phantom_dicom import write_dicom_series
from imaging.results.__main__ import write_all
from imaging.results.facts import Facts, Label
from imaging.volume import Volume

RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
NAMES = {"liver": 1, "tumour": 2}
ALL = ["dicom-seg", "dicom-sr", "rtstruct"]


def write_series(voxels: np.ndarray, affine: np.ndarray, folder: Path) -> list[Path]:
    """CT files of voxels (C, R, S) that lie where `affine` (to RAS+ mm) says."""
    plain = Volume(voxels[::-1, ::-1, :], np.diag([1.0, 1.0, 1.0, 1.0]))
    files = write_dicom_series(plain, folder, seed=3)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    for s, file in enumerate(files):
        one = pydicom.dcmread(file)
        position = (affine @ [0, 0, s, 1])[:3] * RAS_TO_LPS
        axes = [affine[:3, a] / steps[a] * RAS_TO_LPS for a in (0, 1)]
        one.ImagePositionPatient = [f"{value:.9g}"[:16] for value in position]
        one.ImageOrientationPatient = [f"{value:.12f}"[:16] for value in np.concatenate(axes)]
        one.PixelSpacing = [f"{steps[1]:.6g}", f"{steps[0]:.6g}"]
        one.SliceThickness = f"{steps[2]:.6g}"
        one.save_as(file, enforce_file_format=True)
    return files


def facts_of(mask: np.ndarray, names: dict[str, int] = NAMES, voxel_ml: float = 0.5) -> Facts:
    counts = {name: int(np.count_nonzero(mask == value)) for name, value in names.items()}
    labels = [Label(name, names[name], n * voxel_ml, n) for name, n in counts.items()]
    return Facts("seg_" + "0" * 32, "liver-tumour", "3", "a" * 64, "0.1.0", tuple(labels))


def results_of(
    path: Path, labels: Any, out: Path, *, series_uid: str | None = None,
    names: dict[str, int] = NAMES, formats: list[str] = ALL,
) -> dict[str, Any]:  # fmt: skip
    """Read a scan, make labels of it, and write them in every format.

    Args:
        path: What was sent.
        labels: Of the canonical volume, or a function of it that gives them.
        out: Where files go.
    """
    out.mkdir(parents=True, exist_ok=True)
    scan = read_scan(path, kind="image", series_uid=series_uid)
    found = labels(scan.volume) if callable(labels) else labels
    mask = np.ascontiguousarray(on_source_grid(found.astype(np.uint8), scan.source))
    nifti.write(out / "mask.nii.gz", mask, scan.source.affine)
    job = {
        "facts": asdict(facts_of(mask, names)),
        "shape": list(scan.source.shape),
        "affine": scan.source.affine.tolist(),
        "series_uid": scan.series_uid,
        "sop_uids": [one.sop_uid for one in scan.used],
        "formats": formats,
    }
    with quiet():
        return write_all(job, path, out / "mask.nii.gz", out)


def boxes(volume: Volume) -> np.ndarray:
    """A box of 1 off the middle with a smaller one of 2 in it, and a 2 in the last corner."""
    i, j, k = volume.shape
    labels = np.zeros(volume.shape, dtype=np.uint8)
    labels[i // 4 : i // 2, j // 5 : j // 2, k // 4 : max(k // 2, k // 4 + 1)] = 1
    labels[i // 3 : i // 3 + 3, j // 3 : j // 3 + 2, k // 4] = 2
    labels[-1, -1, -1] = 2
    return labels


def judged(path: Path) -> list[str]:
    """Errors that dicom3tools' `dciodvfy` finds in a file."""
    tool = need("dciodvfy")
    judged = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
    lines = (judged.stdout + judged.stderr).splitlines()
    assert lines, "the judge says nothing at all"
    return [line for line in lines if line.startswith("Error")]


def need(tool: str) -> str:
    """Where a tool is; without it the test is skipped, or fails where skipping is forbidden."""
    beside = Path(sys.executable).parent / tool
    found = shutil.which(tool) or (str(beside) if beside.exists() else None)
    if found is None:
        what = f"{tool} is not installed"
        if os.environ.get("PCRL_TEST_REQUIRE_SERVICES") == "1":
            pytest.fail(what)
        pytest.skip(what)
    return found


def at_world(labels: np.ndarray, affine: np.ndarray, world: np.ndarray) -> np.ndarray:
    """Labels at RAS+ points (N, 3), every one of which must be a voxel's centre."""
    at = np.column_stack([world, np.ones(len(world))]) @ np.linalg.inv(affine).T
    assert np.abs(at[:, :3] - np.rint(at[:, :3])).max() < 0.01
    return labels[tuple(np.rint(at[:, :3]).astype(int).T)]


def grid_points(shape, affine) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 3)
    return index @ affine[:3, :3].T + affine[:3, 3]


def dcmqi_reads(path: Path, folder: Path) -> Any:
    """A SEG with all its segments in one image, by dcmqi (DCMTK and ITK)."""
    out = folder / "dcmqi"
    out.mkdir()
    subprocess.run(
        [
            *(need("segimage2itkimage"), "--inputDICOM", str(path)),
            *("--outputDirectory", str(out), "-t", "nii", "--mergeSegments"),
        ],
        check=True,
        capture_output=True,
    )
    return nib.Nifti1Image.from_filename(out / "1.nii.gz")
