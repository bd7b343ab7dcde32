"""The inference benchmark runs, and its contenders give the same mask."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import bench_inference, bundles, cascade
from models.bundle import volume_input
from models.session import open_session
from models.tiling import Windows


def ran(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.nightly
@pytest.mark.slow
def test_a_small_run_ends_with_one_json_object() -> None:
    result = ran("benchmarks.bench_inference", "--json", "--smoke", "--rounds=1")

    measured = bench_inference.GOALS.keys() - {"peak_gib"}
    assert measured <= result.keys()
    assert result["equal_voxels"] >= 0.9999


@pytest.mark.nightly
@pytest.mark.slow
def test_a_process_says_what_it_took(tmp_path) -> None:
    from benchmarks import peak

    folder = bundles.untrained(tmp_path / "bundle", width=2, patch=(32, 32, 16))

    found = peak.measured(folder, peak.write_noise(tmp_path, (48, 40, 32)))

    assert found["loaded_bytes"] < found["segment_peak_bytes"] <= found["peak_bytes"]
    assert found["segment_peak_bytes"] <= found["predicted_peak_bytes"]


def test_monai_and_we_segment_the_same_and_a_different_network_does_not(tmp_path) -> None:
    folder = bundles.untrained(tmp_path / "bundle", width=2, labels=("liver",), patch=(32, 32, 16))
    session = open_session(folder, num_threads=1)
    _, volume, truth = bench_inference._scan(session.manifest, is_tiny=True)
    _, patch = volume_input(session.manifest)
    rival = bench_inference._Monai(folder, session.manifest, patch, torch.device("cpu"))

    ours = bench_inference._segmenting(session, volume, Windows(patch, 0.5))()
    theirs = rival.segment(volume)
    torch.manual_seed(1)
    torch.nn.init.normal_(rival._network.out.weight)
    control = rival.segment(volume)

    assert truth.shape == ours.shape == volume.shape
    assert len(np.unique(ours)) == 2
    assert (ours == theirs).mean() > 0.9999
    assert (ours == control).mean() < 0.99
    assert bench_inference._dice(ours, theirs) > 0.999 > bench_inference._dice(ours, control)


def test_the_cascade_of_one_bundle_labels_as_its_single_pass_where_it_looks(tmp_path) -> None:
    folder = bundles.untrained(tmp_path / "bundle", width=2, labels=("liver",), patch=(32, 32, 16))
    session = open_session(folder, num_threads=1)
    _, volume, _ = bench_inference._scan(session.manifest, is_tiny=True)

    ours = cascade.Contender(folder, tmp_path, volume, coarse=folder, threads=1)
    found = ours.segment()

    passes = ours.passes()
    assert passes["box_voxels"] == volume.shape  # at random there is liver everywhere
    assert passes["coarse_voxels"] == volume.shape  # its own spacing, not 4 mm
    np.testing.assert_array_equal(found, bench_inference._segmenting(session, volume, None)())
    alone = cascade.Contender(folder, tmp_path / "alone", volume, threads=1)
    alone.segment()
    assert alone.passes()["coarse_voxels"] != volume.shape
