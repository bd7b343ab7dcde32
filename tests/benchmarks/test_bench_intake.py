"""The intake benchmark runs, and its contenders read the same voxels."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813  # its usual name

from benchmarks import bench_intake
from imaging.orientation import canonical


@pytest.mark.nightly
def test_a_small_run_ends_with_one_json_object() -> None:
    command = ["-m", "benchmarks.bench_intake", "--json", "--rounds=1", "--slices=6", "--size=32"]

    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=100, check=True
    )

    result = json.loads(done.stdout.splitlines()[-1])
    assert result["goals"].keys() <= result.keys()
    assert result["vs_simpleitk"] > 0
    assert result["peak_over_volume"] > 1


def test_all_three_read_the_same_voxels(tmp_path) -> None:
    folder, archive = bench_intake._write(tmp_path, 6, 32)

    ours = bench_intake._ours(folder, archive)
    zipped = bench_intake._zip(folder, archive)
    theirs = bench_intake._simpleitk(folder, archive)
    converted = bench_intake._dicom2nifti(folder, archive)["NII"]

    assert np.array_equal(ours.volume.voxels, zipped.volume.voxels)
    # SimpleITK's K J I in LPS
    itk = sitk.GetArrayFromImage(theirs).T[::-1, ::-1]
    assert np.array_equal(ours.volume.voxels, itk)
    again = canonical(np.asarray(converted.dataobj), converted.affine)
    assert np.array_equal(ours.volume.voxels, again.voxels)
    assert np.allclose(ours.volume.affine, again.affine, atol=1e-4)
