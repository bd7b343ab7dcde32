"""The life of a model on the real embedded stack: real workers, through the client and `pcrl`."""

import csv
import io
import json
import os
import signal
import socket
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from imaging import nifti
from models import bundle
from models.bundle import Lineage, Manifest, Metric, Parity, TensorSpec
from models.recipe import FinetuneRecipe, Preprocessing, Window
from service import db, schemas, volumes
from service.cli import app
from service.client import ApiError, Client
from service.settings import Settings
from service.stack import Stack
from service.storage import Store

pytestmark = pytest.mark.slow

SHAPE = ["batch", 1, "i", "j", "k"]
AFFINE = np.array([[-1.5, 0, 0, 40], [0, -1.5, 0, 60], [0, 0, 2, -30], [0, 0, 0, 1]], float)
"""Stored LPS-wise, as most CT is."""
SIZE = (40, 44, 36)
ORGAN = (slice(12, 20), slice(20, 30), slice(8, 16))


def manifest(spacing_mm: float = 1.5, *, digest: str = "0" * 64) -> Manifest:
    return Manifest(
        kind="segmenter",
        labels=("organ",),
        inputs=(TensorSpec(name="image", shape=tuple(SHAPE)),),
        outputs=(TensorSpec(name="logits", shape=("batch", 2, "i", "j", "k")),),
        preprocessing=Preprocessing(
            spacing_mm=(spacing_mm,) * 3, intensity=Window(low_hu=0.0, high_hu=1000.0)
        ),
        patch_size=(16, 16, 16),
        recipe=FinetuneRecipe(labels={"organ": 1}),
        lineage=Lineage(
            dataset_digest=digest, seed=0, num_steps=1, code_version="test", torch_version=""
        ),
        metrics={"dice_organ": Metric(value=0.9, n=3)},
        parity=(
            Parity(
                input_kind="random",
                shape=(1, 1, 16, 16, 16),
                provider="CPUExecutionProvider",
                max_abs_difference=0.0,
                tolerance=1e-4,
                passed=True,
            ),
        ),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def packed(folder: Path, name: str, above: float, spacing_mm: float = 1.5, **more: bytes) -> Path:
    """A bare ONNX file with its description: label 1 where the input is above a value."""
    told = manifest(spacing_mm)
    weight = np.array([-8.0, 8.0], np.float32).reshape(2, 1, 1, 1, 1)
    weights = {"weight": weight, "bias": np.array([8 * above, -8 * above], np.float32)}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight", "bias"], ["logits"])],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, "i", "j", "k"])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, bundle.onnx_metadata(told))
    onnx.save(model, folder / f"{name}.onnx")
    plain = {**told.model_dump(mode="json"), "files": {}}
    parts = {
        bundle.MODEL: (folder / f"{name}.onnx").read_bytes(),
        bundle.MANIFEST: json.dumps(plain).encode(),
        **{part.replace("__", "."): data for part, data in more.items()},
    }
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    return folder / f"{name}.zip"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("live") / "data",
        port=port,
        device="cpu",
        inference_threads=1,
        min_free_bytes=0,
        lease_s=3.0,
        heartbeat_s=0.5,
        suspect_s=1.0,
        dispatch_interval_s=0.5,
    )
    started = Stack(settings)
    started.start(timeout_s=120.0)
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url, stack.admin_token or "") as made:
        yield made


@pytest.fixture
def pcrl(stack: Stack):
    def run(*arguments: str, status: int = 0) -> str:
        runner = CliRunner(env={"PCRL_URL": stack.url, "PCRL_TOKEN": stack.admin_token})
        result = runner.invoke(app, [*arguments])
        assert result.exit_code == status, result.output
        return result.output.strip()

    return run


@pytest.fixture(scope="module")
def scans(client: Client, tmp_path_factory: pytest.TempPathFactory) -> list[schemas.Volume]:
    """Four scans of an organ that is brighter in its core, and the labels of the first."""
    folder, made = tmp_path_factory.mktemp("scans"), []
    for number in range(4):
        voxels = np.full(SIZE, 100 + number, np.int16)
        voxels[ORGAN] = 700
        voxels[14:18, 22:28, 10:14] = 900
        nifti.write(folder / "scan.nii.gz", voxels, AFFINE)
        made.append(client.upload(folder / "scan.nii.gz", subject=f"s{number}"))
    labels = np.zeros(SIZE, np.uint8)
    labels[ORGAN] = 1
    nifti.write(folder / "labels.nii.gz", labels, AFFINE)
    made.append(client.upload(folder / "labels.nii.gz", kind="labels", subject="s0"))
    return made


@pytest.fixture(scope="module")
def versions(
    client: Client, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, int]]:
    """Versions of `liver`: a good one, one that sees the core alone, and one like the first."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, above in (("good", 0.5), ("worse", 0.8), ("better", 0.55)):
        run = client.import_model(packed(folder, name, above), "liver")
        assert run.model is not None, run.error
        found[name] = (run.model.name, run.model.version)
    return found


@pytest.mark.timeout(180)
def test_a_version_goes_live_over_golden_cases_and_comes_back_warm(
    client: Client, pcrl, scans, versions
) -> None:
    label = {"name": "organ", "value": 1, "min_dice": 0.95}
    case = {"labels_id": scans[4].id, "labels": [label]}
    client.set_golden_case("liver", "case-1", scans[0].id, **case)
    with pytest.raises(ApiError) as unchecked:
        client.set_alias("liver", "champion", 1)

    passed = pcrl("model", "check", "liver", "1")
    moved = client.set_alias("liver", "champion", 1)
    first = client.segment(scans[0].id, "liver@champion")
    missed = pcrl("model", "check", "liver", "2", status=os.EX_DATAERR)
    with pytest.raises(ApiError) as worse:
        client.set_alias("liver", "champion", 2)
    pcrl("model", "check", "liver", "3")
    client.set_alias("liver", "champion", 3)
    second = client.segment(scans[0].id, "liver@champion")
    back = pcrl("model", "rollback", "liver", "champion")
    third = client.segment(scans[0].id, "liver@champion")

    assert (unchecked.value.code, worse.value.code) == ("gate_failed", "gate_failed")
    assert "case-1: passed" in passed and "case-1: missed" in missed
    assert (moved.version, back.endswith("is version 1")) == (1, True)
    for done, version in ((first, 1), (second, 3), (third, 1)):
        assert done.result is not None, done.error
        assert (done.model.version, done.result.model_was_resident) == (version, True)
        assert done.result.bundle_digest == done.model.digest
    # The control: a version that no alias names is loaded when the request comes.
    cold = client.segment(scans[0].id, "liver/2")
    assert cold.result is not None
    checks = [check.passed for check in client.version_checks("liver", 2)]
    assert (checks, cold.result.voxels["organ"] < first.result.voxels["organ"]) == ([False], True)


@pytest.mark.timeout(120)
def test_an_exported_model_comes_back_with_its_digest_and_hostile_ones_do_not(
    client: Client, pcrl, versions, tmp_path
) -> None:
    name, version = versions["good"]
    client.download_bundle(name, version, tmp_path / "out.zip")

    again = pcrl("model", "import", str(tmp_path / "out.zip"), "--name", "elsewhere")
    hostile = packed(tmp_path, "hostile", 0.5, weights__pt=b"\x80\x04.")
    refused = pcrl("model", "import", str(hostile), "--name", "elsewhere", status=os.EX_DATAERR)
    (tmp_path / "bare.zip").write_bytes(b"\x80\x04pickle")
    bare = pcrl(
        *("model", "import", str(tmp_path / "bare.zip"), "--name", "elsewhere"),
        status=os.EX_DATAERR,
    )

    assert again.endswith("models:/elsewhere/1")
    there = client.model_version(name, version).digest
    assert client.model_version("elsewhere", 1).digest == there
    assert "import_refused" in refused and "not_an_archive" in bare
    assert len(client.model("elsewhere").versions) == 1


@pytest.mark.timeout(120)
def test_a_cascade_is_composed_goes_live_and_tells_how_sure_it_is(
    client: Client, scans, versions, tmp_path
) -> None:
    coarse = client.import_model(packed(tmp_path, "coarse", 0.5, 4.0), "coarse")
    assert coarse.model is not None, coarse.error
    made = client.create_cascade("cascade", "liver/1", "organ", coarse="coarse/1", margin_mm=9.0)
    client.set_alias("cascade", "champion", made.version)

    found = client.segment(scans[0].id, "cascade@champion", flips=["j"], uncertainty=True)
    plain = client.segment(scans[0].id, "liver/1")

    assert found.result is not None and plain.result is not None, (found.error, plain.error)
    assert found.result.model_was_resident
    assert found.result.cascade is not None and found.result.cascade.fallback is None
    assert found.result.voxels == plain.result.voxels
    assert plain.result.cascade is None
    client.download_uncertainty(found.id, tmp_path / "entropy.nii.gz")
    entropies, grid = nifti.read(tmp_path / "entropy.nii.gz")
    assert 0 < (entropies.voxels > 0).mean() < 0.8
    np.testing.assert_allclose(grid.affine, AFFINE)


@pytest.mark.timeout(180)
def test_a_batch_survives_its_worker_and_tells_of_the_one_broken_scan(
    stack: Stack, client: Client, pcrl, scans, versions, tmp_path
) -> None:
    dataset = client.create_dataset("batch", [(scan.id, None) for scan in scans[:4]])
    store = Store(stack.settings.data_dir)
    broken = _voxels_of(stack, scans[3].id)
    path = store.path_of(broken)
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(b"nothing")

    batch = client.create_batch(dataset.id, "liver/1", "segment")
    while client.batch(batch.id).state == "queued":  # killed at work, not before it
        time.sleep(0.02)
    killed = stack.pid_of("worker-inference")
    os.killpg(killed, signal.SIGKILL)
    ended = _until_ended(stack, client, batch.id)
    (item,) = client.batch_items(batch.id, state="failed")
    path.write_bytes(whole)
    client.retry_batch(batch.id)
    repaired = _until_ended(stack, client, batch.id)
    pcrl("batch", "table", batch.id, str(tmp_path / "table.csv"))

    assert stack.pid_of("worker-inference") != killed
    assert (ended.state, dict(ended.counts)) == ("failed", {"succeeded": 3, "failed": 1})
    assert item.volume_id == scans[3].id and item.error is not None
    assert (repaired.state, dict(repaired.counts)) == ("succeeded", {"succeeded": 4})
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [row["subject"] for row in rows] == ["s0", "s1", "s2", "s3"]
    assert all(float(row["volume_ml:organ"]) > 1.0 for row in rows)
    with pytest.raises(ApiError, match="1 batches"):
        client.delete_dataset(dataset.id)
    with pytest.raises(ApiError, match="1 datasets"):
        client.delete_volume(scans[3].id)


def _voxels_of(stack: Stack, volume_id: str) -> str:
    engine = db.connect(stack.settings.database_url)
    with db.sessions(engine)() as session:
        found = volumes.get(session, volume_id).voxels_sha256
    engine.dispose()
    return found


def _until_ended(stack: Stack, client: Client, batch_id: str) -> schemas.Batch:
    deadline = time.monotonic() + 120.0
    while (batch := client.batch(batch_id)).finished_at is None:
        assert time.monotonic() < deadline, batch
        stack.restart_dead()
        time.sleep(0.2)
    return batch
