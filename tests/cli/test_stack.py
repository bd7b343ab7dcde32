"""The embedded stack and the command line, whole: real processes, real training, real ONNX."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from imaging import nifti, phantom, phantom_dicom
from service.cli import app
from service.client import Client
from service.settings import Settings
from service.stack import Stack

pytestmark = pytest.mark.slow

SHAPE, SPACING_MM = (48, 48, 32), (8.0, 8.0, 9.0)
PREPROCESSING = {"spacing_mm": [8.0, 8.0, 9.0]}
PRETRAIN = {
    "network": {"base_width": 2},
    "preprocessing": PREPROCESSING,
    "method": {"name": "pcrl", "queue_size": 32},
    "crops": {"crop_sizes": [[16, 16, 16]], "input_size": [16, 16, 16]},
    "num_steps": 6,
    "batch_size": 2,
    "checkpoint_every": 2,
    "log_every": 1,
}
FINETUNE = {
    "labels": {"liver": 1, "tumour": 2},
    "network": {"base_width": 2},
    "preprocessing": PREPROCESSING,
    "patch_size": [16, 16, 16],
    "num_steps": 4,
    "batch_size": 2,
    "validate_every": 4,
    "checkpoint_every": 4,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("stack") / "data",
        port=port,
        train_threads=1,
        inference_threads=1,
        lease_s=3.0,
        heartbeat_s=0.5,
        suspect_s=1.0,
        dispatch_interval_s=0.5,
    )
    with Stack(settings) as started:
        yield started


@pytest.fixture
def run_cli(stack: Stack):
    runner = CliRunner(env={"PCRL_URL": stack.url, "PCRL_TOKEN": stack.admin_token})

    def run(*arguments: str) -> str:
        result = runner.invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout.strip()

    return run


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Three phantoms with labels; the last image is a zipped DICOM series."""
    folder = tmp_path_factory.mktemp("scans")
    pairs = []
    for seed in range(3):
        made = phantom.make(seed, shape=SHAPE, spacing_mm=SPACING_MM)
        pairs.append(phantom.write_pair(made, folder, f"case{seed}"))
    series = folder / "series"
    phantom_dicom.write_dicom_series(made.volume, series, seed=2)
    archive = Path(shutil.make_archive(str(series), "zip", series))
    return [*pairs[:2], (archive, pairs[2][1])]


@pytest.mark.timeout(300)
def test_the_command_line_goes_from_scans_to_a_certified_mask(
    run_cli, scans: list[tuple[Path, Path]], tmp_path: Path
) -> None:
    (tmp_path / "pretrain.json").write_text(json.dumps(PRETRAIN))
    (tmp_path / "finetune.json").write_text(json.dumps(FINETUNE))
    mask = tmp_path / "mask.nii.gz"

    ids = []
    for number, (image, labels) in enumerate(scans):
        image_id = run_cli("upload", str(image), "--subject", f"p{number}")
        labels_id = run_cli("upload", str(labels), "--kind", "labels", "--subject", f"p{number}")
        ids.append(f"{image_id}:{labels_id}")
    dataset = run_cli("dataset", "create", "cli", *ids[:2])
    encoder = run_cli(
        *("pretrain", str(tmp_path / "pretrain.json"), "--dataset", dataset, "--model", "enc")
    ).splitlines()[-1]
    segmenter = run_cli(
        *("finetune", str(tmp_path / "finetune.json"), "--dataset", dataset, "--model", "liver"),
        *("--parent", encoder),
    ).splitlines()[-1]
    run_cli("alias", "liver", "champion", segmenter.rpartition("/")[2])
    unseen = ids[2].partition(":")[0]
    found = json.loads(
        run_cli("segment", unseen, "--model", "models:/liver@champion", "--mask", str(mask))
    )
    vector = json.loads(run_cli("embed", unseen, "--model", "enc"))
    alike = run_cli("similar", unseen, "--model", "enc", "--same-subject")

    volume, grid = nifti.read(mask)
    assert set(found["volumes_ml"]) == {"liver", "tumour"}
    assert grid.shape == SHAPE
    assert set(np.unique(volume.voxels)) <= {0, 1, 2}
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-4)
    assert len(vector) == 32
    rank, similar, cosine, *_ = alike.splitlines()[0].split("\t")
    assert (rank, similar) == ("1", unseen)
    assert float(cosine) == pytest.approx(1.0, abs=1e-6)
    assert "enc" in run_cli("models")
    assert "succeeded" in run_cli("runs")


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_training_whose_worker_is_killed_resumes_and_succeeds_by_itself(
    stack: Stack, scans: list[tuple[Path, Path]]
) -> None:
    assert stack.admin_token is not None
    recipe = {**PRETRAIN, "num_steps": 400, "checkpoint_every": 10}
    with Client(stack.url, stack.admin_token) as client:
        volume = client.upload(scans[0][0], subject="p0")
        dataset = client.create_dataset("killed", [(volume.id, None)])
        run = client.pretrain(dataset.id, recipe, model_name="killed")
        _wait_for_step(client, run.id, at_least=20)

        killed = stack.pid_of("worker-train")
        os.killpg(killed, signal.SIGKILL)
        deadline = time.monotonic() + 240
        while client.run(run.id).state != "succeeded" and time.monotonic() < deadline:
            stack.restart_dead()
            time.sleep(0.5)
        ended = client.run(run.id)
        steps = [point.step for point in client.metrics(run.id).points if point.name == "loss"]

    assert stack.pid_of("worker-train") != killed
    assert ended.state == "succeeded", ended.error
    assert ended.attempt == 2
    assert sorted(set(steps)) == list(range(1, 401))


def test_a_command_without_a_token_says_how_to_get_one() -> None:
    result = CliRunner(env={"PCRL_TOKEN": ""}).invoke(app, ["models"])

    assert result.exit_code == os.EX_DATAERR
    assert "PCRL_TOKEN" in result.output


def test_a_refused_upload_ends_with_the_problems_code(stack: Stack, tmp_path: Path) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"this is no scan")
    runner = CliRunner(env={"PCRL_URL": stack.url, "PCRL_TOKEN": stack.admin_token})

    result = runner.invoke(app, ["upload", str(bad)])

    assert result.exit_code == os.EX_DATAERR
    assert "not_a_scan" in result.output


def test_stopping_the_stack_leaves_no_process(stack: Stack) -> None:
    """The last one: it stops what the others share, after work."""
    parts = [stack.pid_of(name) for name in ("api", "worker-train", "worker-inference")]
    below = [child for pid in parts for child in _children_of(pid)]
    alive = [Path(f"/proc/{pid}").exists() for pid in (*parts, *below)]

    stack.stop()

    assert all(alive) and len(below) >= 2  # each worker has forked the process that works
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*parts, *below))


def _children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_for_step(client: Client, run_id: str, *, at_least: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        run = client.run(run_id)
        assert run.state not in {"failed", "canceled"}, run.error
        if run.progress is not None and (run.progress.step or 0) >= at_least:
            return
        time.sleep(0.1)
    pytest.fail("the training did not get so far")
