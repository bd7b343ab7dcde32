"""The inference benchmark runs, and its contenders give the same mask."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import bench_inference, bundles
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


@pytest.mark.slow
def test_a_small_run_ends_with_one_json_object() -> None:
    result = ran("benchmarks.bench_inference", "--json", "--smoke", "--rounds=1")

    measured = {"vs_monai_same_windows", "equal_voxels", "vs_monai_defaults", "defaults_liver_dice"}
    assert measured <= result.keys() & bench_inference.GOALS.keys()
    assert result["equal_voxels"] >= 0.9999


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
