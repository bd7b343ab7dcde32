"""The work: small scans whose mask is known, a model that finds it, clients that never give up."""

from __future__ import annotations

import gzip
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models import bundle
from models.bundle import Lineage, Manifest, TensorSpec
from models.recipe import FinetuneRecipe, Preprocessing, Window
from service import db, registry
from service.settings import Settings
from service.storage import Store

MODEL = "box"
SHAPE = (24, 20, 16)
INSIDE_HU, OUTSIDE_HU = 800, 100
PAUSE_S = 0.3
TRAINING: dict[str, Any] = {
    "network": {"base_width": 2},
    "preprocessing": {"spacing_mm": [1.0, 1.0, 1.0]},
    "method": {"name": "pcrl", "queue_size": 16, "embedding_size": 16},
    "crops": {"crop_sizes": [[16, 16, 16]], "input_size": [16, 16, 16]},
    "num_steps": 60,
    "batch_size": 2,
    "checkpoint_every": 10,
    "log_every": 1,
}


@dataclass
class Accepted:
    """What the service took, and what must come of it."""

    segmentations: dict[int, str] = field(default_factory=dict)
    """Scan number to run id."""
    trainings: dict[int, str] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Answers that no client should get."""
    last_at: float = 0.0
    gate: float = float("inf")
    """Scans from this number on are held back: a worker to freeze must have something to hold."""


def scan_of(number: int) -> NDArray[np.int16]:
    """A scan (I, J, K) in HU with a bright box, different for every number."""
    rng = np.random.default_rng(number)
    voxels = rng.integers(0, OUTSIDE_HU, SHAPE).astype(np.int16)
    first = rng.integers(2, 6, 3)
    last = first + rng.integers(4, 9, 3)
    box = tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    voxels[box] = INSIDE_HU
    return voxels


def mask_of(number: int) -> NDArray[np.uint8]:
    """What the model must find in it."""
    mask: NDArray[np.uint8] = (scan_of(number) == INSIDE_HU).astype(np.uint8)
    return mask


def file_of(number: int) -> bytes:
    """The scan as a .nii.gz."""
    image = nib.Nifti1Image(scan_of(number), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 1, mtime=0)


def register_model(settings: Settings, folder: Path) -> None:
    """Put a real, tiny ONNX segmenter into the store: class 1 above 500 HU."""
    weight = np.array([-1.0, 1.0], np.float32).reshape(2, 1, 1, 1, 1)
    bias = np.array([0.5, -0.5], np.float32)
    shape: list[str | int | None] = ["batch", 1, "i", "j", "k"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight", "bias"], ["logits"])],
        "box",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, "i", "j", "k"])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    manifest = Manifest(
        kind="segmenter",
        labels=("box",),
        inputs=(TensorSpec(name="image", shape=("batch", 1, "i", "j", "k")),),
        outputs=(TensorSpec(name="logits", shape=("batch", 2, "i", "j", "k")),),
        preprocessing=Preprocessing(
            spacing_mm=(1.0, 1.0, 1.0), intensity=Window(low_hu=0.0, high_hu=1000.0)
        ),
        patch_size=(16, 16, 16),
        overlap=0.25,
        recipe=FinetuneRecipe(labels={"box": 1}),
        lineage=Lineage(
            dataset_digest="0" * 64, seed=0, num_steps=1, code_version="chaos", torch_version=""
        ),
        parity=(),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    for key, value in bundle.onnx_metadata(manifest).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    source = folder / "box.onnx"
    onnx.save(model, source)
    bundle.save(folder / "bundle", manifest, {bundle.MODEL: source}, "# box\n")
    digest = Store(settings.data_dir).publish_bundle(folder / "bundle")
    engine = db.connect(settings.database_url)
    with db.sessions(engine)() as session:
        facts = manifest.model_dump(mode="json")
        registry.register(session, MODEL, kind="segmenter", digest=digest, manifest=facts)
        session.commit()
    engine.dispose()


class Client:
    """Sends what may be sent twice until it is answered; a thread's own."""

    def __init__(self, url: str, token: str, accepted: Accepted, until: float) -> None:
        self._accepted, self._until = accepted, until
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(
            base_url=f"{url}/api/v1/", headers=headers, timeout=20.0, trust_env=False
        )

    def send(self, method: str, path: str, **how: Any) -> dict[str, Any]:
        """The answer of a success.

        Raises:
            TimeoutError: Nobody answered until the end of the test.
            ValueError: The service refused for good.
        """
        began = time.monotonic()
        while time.monotonic() < self._until:
            try:
                answer = self._http.request(method, path, **how)
            except httpx.TransportError:
                time.sleep(PAUSE_S)
                continue
            if answer.is_success:
                self._accepted.latencies_s.append(time.monotonic() - began)
                found: dict[str, Any] = answer.json()
                return found
            code = answer.json().get("code") if answer.content else ""
            if answer.status_code < 500 and code != "idempotency_in_flight":
                raise ValueError(f"{method} {path}: {answer.status_code} {code}")
            if answer.status_code == 500:
                self._accepted.faults.append(f"{method} {path}: 500 {code}")
            time.sleep(PAUSE_S)
        raise TimeoutError(f"{method} {path} was not answered")

    def upload(self, number: int) -> str:
        """Send a scan; returns the volume's id."""
        how = {"params": {"subject": f"s{number}"}, "content": file_of(number)}
        headers = {"Content-Type": "application/octet-stream"}
        return str(self.send("POST", "volumes", headers=headers, **how)["id"])

    def segment(self, number: int, volume_id: str) -> str:
        """Ask for a mask, now and then twice; returns the run's id."""
        body = {"volume_id": volume_id, "model": f"{MODEL}/1"}
        headers = {"Idempotency-Key": f"segment-{number}"}
        run_id = str(self.send("POST", "segmentations", json=body, headers=headers)["id"])
        if number % 5 == 0:
            again = self.send("POST", "segmentations", json=body, headers=headers)["id"]
            if again != run_id:
                self._accepted.faults.append(f"key segment-{number} gave two runs")
        return run_id

    def train(self, number: int, volume_ids: list[str]) -> str:
        """Start a training of its own model."""
        items = [{"volume_id": one, "split": "train"} for one in volume_ids]
        key = {"Idempotency-Key": f"dataset-{number}"}
        body: dict[str, Any] = {"name": f"d{number}", "items": items}
        dataset = self.send("POST", "datasets", json=body, headers=key)["id"]
        body = {"kind": "pretrain", "dataset_id": dataset, "recipe": TRAINING}
        body["model_name"] = f"trained-{number}"
        key = {"Idempotency-Key": f"train-{number}"}
        return str(self.send("POST", "runs", json=body, headers=key)["id"])


def send_all(
    url: str, token: str, accepted: Accepted, *, uploads: int, clients: int, trainings: int,
    until: float,
) -> list[threading.Thread]:  # fmt: skip
    """Begin to send everything, from several clients at once."""
    numbers = iter(range(uploads))
    every = max(1, uploads // max(1, trainings))
    lock = threading.Lock()

    def work() -> None:
        client = Client(url, token, accepted, until)
        sent: list[str] = []
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            while number >= accepted.gate and time.monotonic() < until:
                time.sleep(0.05)
            try:
                sent.append(client.upload(number))
                accepted.segmentations[number] = client.segment(number, sent[-1])
                if number % every == 0 and number // every < trainings:
                    accepted.trainings[number] = client.train(number, sent[-1:])
            except (TimeoutError, ValueError) as error:
                accepted.faults.append(str(error))
            accepted.last_at = time.monotonic()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    return threads
