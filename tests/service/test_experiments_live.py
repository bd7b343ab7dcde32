"""An experiment on the real embedded stack: its worker and the API are killed, the table stays."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from imaging import nifti
from imaging.phantom import make
from service.cli import app
from service.client import ApiError, Client
from service.settings import Settings
from service.stack import Stack

NETWORK = {"kind": "unet3d", "base_width": 2}
PREPROCESSING = {"spacing_mm": [12, 12, 20]}
PLAN = {
    "methods": [
        {
            "name": "pcrl",
            "pretrain": {
                "kind": "pretrain",
                "network": NETWORK,
                "preprocessing": PREPROCESSING,
                "crops": {
                    "input_size": [16, 16, 8],
                    "crop_sizes": [[16, 16, 8]],
                    "max_tissue": None,
                },
                "method": {"embedding_size": 8, "queue_size": 16},
                "batch_size": 2,
                "checkpoint_every": 2,
                "log_every": 1,
            },
        }
    ],
    "finetune": {
        "kind": "finetune",
        "network": NETWORK,
        "preprocessing": PREPROCESSING,
        "labels": {"liver": 1, "tumour": 2},
        "patch_size": [16, 16, 8],
        "batch_size": 2,
        "learning_rate": 0.01,
        "validate_every": 2,
    },
    "ratios": [1.0],
    "seeds": [0],
    "budget": {"pretrain_steps": 60, "finetune_steps": 4},
}


@pytest.fixture
def stack(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(
        data_dir=tmp_path / "data",
        port=port,
        device="cpu",
        train_threads=1,
        inference_threads=1,
        min_free_bytes=0,
        lease_s=3.0,
        heartbeat_s=0.5,
        suspect_s=1.0,
        dispatch_interval_s=0.5,
    )
    with Stack(settings) as started:
        yield started


def upload(client: Client, folder: Path) -> str:
    """A dataset of three patients: one trains, one validates, one tests."""
    items = []
    for seed, split in enumerate(("train", "val", "test")):
        phantom = make(seed, shape=(32, 32, 16), spacing_mm=(12.0, 12.0, 20.0))
        ids = []
        for kind, voxels in (("image", phantom.volume.voxels), ("labels", phantom.labels)):
            path = folder / f"{seed}_{kind}.nii.gz"
            nifti.write(path, voxels, phantom.volume.affine @ np.diag([-1.0, -1.0, 1.0, 1.0]))
            ids.append(client.upload(path, kind=kind, subject=f"s{seed}").id)
        items.append((*ids, split))
    return client.create_dataset("phantoms", items).id


def until(stack: Stack, condition, *, timeout_s: float = 240.0):
    """Supervise until the condition holds; an API that is down is asked again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if found := condition():
                return found
        except ApiError:
            pass
        assert time.monotonic() < deadline
        stack.restart_dead()
        time.sleep(0.1)


@pytest.mark.nightly
@pytest.mark.timeout(500)  # two whole experiments
@pytest.mark.slow
def test_an_experiment_whose_worker_and_api_are_killed_ends_with_the_same_table(stack, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    where = ["--url", stack.url, "--token", stack.admin_token]

    def pcrl(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["experiment", *arguments, *where])
        assert result.exit_code == 0, result.output
        return result.output.strip()

    def ended(experiment_id: str):
        return until(stack, lambda: (e := client.experiment(experiment_id)).finished_at and e)

    with Client(stack.url, stack.admin_token) as client:
        dataset = upload(client, tmp_path)
        create = ("create", str(tmp_path / "plan.json"), "--name", "Liver")
        create += ("--source", dataset, "--target", dataset)
        whole = pcrl(*create)
        assert ended(whole).state == "succeeded", pcrl("show", whole)
        killed = pcrl(*create)
        run_id = client.experiment_trainings(killed)[0].run_id

        def step():
            progress = client.run(run_id).progress
            return progress is not None and progress.stage == "pretrain" and progress.step > 4

        until(stack, step)
        for part in ("worker-train", "api"):
            os.killpg(stack.pid_of(part), signal.SIGKILL)
        assert ended(killed).state == "succeeded", pcrl("show", killed)
        attempt = client.run(run_id).attempt
        for experiment_id in (whole, killed):
            pcrl("report", experiment_id, str(tmp_path / experiment_id))

    assert attempt == 2  # it was killed at work, and went on
    for name in ("report.json", "report.md", "curve.svg", "cases.csv"):
        found = [(tmp_path / one / name).read_bytes() for one in (whole, killed)]
        assert found[0] == found[1] and found[0]
    told = json.loads((tmp_path / whole / "report.json").read_text())
    assert told["missing"] == [] and told["num_cases"] == 1
