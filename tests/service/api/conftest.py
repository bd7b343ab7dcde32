"""One real API (SQLite, real store, real intake) for this folder's tests, and what to send it.

Every response that passes through `Api` must have a status that its operation declares.
"""

import io
import json
import re
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import func, select
from starlette.testclient import TestClient

from imaging.phantom import make, write_pair
from imaging.phantom_dicom import write_dicom_zip
from models import bundle
from models.recipe import (
    ClassifyRecipe,
    FinetuneRecipe,
    Preprocessing,
    Preprocessing2d,
    PretrainRecipe,
    PretrainRecipe2d,
    UNet3d,
)
from service import auth, db, registry, runs
from service.app import create_app
from service.auth import Role
from service.settings import Settings

PASSED = bundle.Parity(
    input_kind="random",
    shape=(1, 1, 16, 16, 16),
    provider="CPUExecutionProvider",
    max_abs_difference=0.0,
    tolerance=1e-4,
    passed=True,
)
PREFIX = "/api/v1"
ROLES = tuple(role.value for role in Role)


@dataclass
class Api:
    """A running app, its tokens, and what lies behind it."""

    app: FastAPI
    http: TestClient
    settings: Settings
    tokens: dict[str, str]
    seen: set[tuple[str, str, int]] = field(default_factory=set)

    def __call__(self, method: str, path: str, *, role: str | None = "admin", **how: Any) -> Any:
        """Send a request under `/api/v1` as a role (None: without a token)."""
        headers = dict(how.pop("headers", {}))
        if role is not None:
            headers.setdefault("Authorization", f"Bearer {self.tokens[role]}")
        url = path if path.startswith(("/healthz", "/readyz", "/metrics")) else PREFIX + path
        response = self.http.request(method, url, headers=headers, **how)
        self._check_declared(method, url.partition("?")[0], response.status_code)
        return response

    def _check_declared(self, method: str, url: str, status: int) -> None:
        for template, pattern, operations in _operations(self.app):
            if pattern.fullmatch(url) and method.lower() in operations:
                declared = operations[method.lower()]["responses"]
                assert str(status) in declared, f"{method} {template} answered {status}"
                self.seen.add((method, template, status))
                return

    @property
    def sessions(self) -> Any:
        return self.app.state.sessions

    @property
    def store(self) -> Any:
        return self.app.state.store

    def counts(self) -> dict[str, int]:
        """Rows of every table but the idempotency keys, and files in the store."""
        tables = [t for t in db.Base.metadata.sorted_tables if t.name != "idempotency"]
        with self.sessions() as session:
            found = {
                table.name: session.scalar(select(func.count()).select_from(table)) or 0
                for table in tables
            }
        store = self.settings.data_dir / "store"
        files = [path for path in store.rglob("*") if path.is_file()]
        return {**found, "files": len(files)}

    def upload(self, data: bytes, **params: str) -> Any:
        headers = {"Content-Type": "application/octet-stream"}
        return self("POST", "/volumes", content=data, params=params, headers=headers)

    def work(self, run_id: str, *, state: str = "succeeded", **how: Any) -> None:
        """Be the worker of a run: claim it, report progress and metrics, finish it.

        Other waiting runs of the same queue are ended first, since a claim takes the oldest.
        """
        with self.sessions() as session:
            queue = runs.get(session, run_id).queue
            session.rollback()
            while (lease := runs.claim(session, run_id, queue, "test")) is not None:
                mine = lease.run_id == run_id
                runs.started(session, lease)
                if mine:
                    runs.record(session, lease, "progress", {"stage": "work", "fraction": 0.5})
                    runs.record(session, lease, "metric", {"step": 1, "values": {"loss": 2.5}})
                    runs.record(session, lease, "metric", {"step": 2, "values": {"loss": 1.5}})
                    end = db.RunState(state)
                    outcome = "done" if state == "succeeded" else "error"
                    runs.finish(session, lease, end, outcome=outcome, **how)
                    return
                failed = {"code": "internal_error", "detail": "ended by a test"}
                runs.finish(session, lease, db.RunState.FAILED, outcome="error", error=failed)
        raise AssertionError(f"{run_id} could not be claimed")


Operation = tuple[str, re.Pattern[str], dict[str, Any]]
_OPERATIONS: list[Operation] = []


def _operations(app: FastAPI) -> list[Operation]:
    """What any app declares, by template and pattern of the path; the document takes 1.5 s."""
    if not _OPERATIONS:
        for template, operations in app.openapi()["paths"].items():
            pattern = re.sub(r"\\{\w+\\}", "[^/:]+", re.escape(template))
            _OPERATIONS.append((template, re.compile(pattern), operations))
    return _OPERATIONS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fuzzer after all others that share `api`: it leaves a thousand things there."""
    fuzzing = [item for item in items if item.path.name == "test_api_fuzz.py"]
    if fuzzing:
        others = [item for item in items if item not in fuzzing]
        end = max(
            (n for n, item in enumerate(others, 1) if "service" in item.path.parts), default=0
        )
        items[:] = others[:end] + fuzzing + others[end:]


Migrated = Callable[[str], None]


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory, migrated: Migrated) -> Iterator[Api]:
    """The app over its own data folder, with a token for each role."""
    yield from _serve(tmp_path_factory.mktemp("api"), migrated)


def _serve(folder: Path, migrated: Migrated, **options: Any) -> Iterator[Api]:
    settings = Settings(data_dir=folder, min_free_bytes=0, **options)
    migrated(settings.database_url)
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as http:
        with app.state.sessions() as session:
            tokens = {name: auth.create_token(session, name, Role(name))[1] for name in ROLES}
            session.commit()
        yield Api(app, http, settings, tokens)


@pytest.fixture(scope="module")
def url(api: Api) -> Iterator[str]:
    """The address of a server over the same data folder as `api`."""
    from service.app import create_app

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(api.settings), access_log=False, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


@dataclass(frozen=True)
class Scans:
    """Files that a user would send; phantoms of 32 x 32 x 16 voxels."""

    nifti: bytes
    labels: bytes
    zipped: bytes
    two_series: bytes
    other_labels: bytes
    """Labels of another shape."""


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Scans:
    folder = tmp_path_factory.mktemp("scans")
    phantom = make(1, shape=(32, 32, 16), spacing_mm=(12.0, 12.0, 18.0))
    image, labels = write_pair(phantom, folder, "one")
    smaller = make(2, shape=(32, 32, 12), spacing_mm=(12.0, 12.0, 18.0))
    _, other = write_pair(smaller, folder, "two")
    first = write_dicom_zip(phantom.volume, folder / "first.zip", seed=1)
    second = write_dicom_zip(smaller.volume, folder / "second.zip", seed=2)
    return Scans(
        image.read_bytes(),
        labels.read_bytes(),
        first.read_bytes(),
        _merged(first, second),
        other.read_bytes(),
    )


def _merged(*paths: Path) -> bytes:
    """One zip with the members of several."""
    merged = io.BytesIO()
    with zipfile.ZipFile(merged, "w") as target:
        for number, path in enumerate(paths):
            with zipfile.ZipFile(path) as source:
                for name in source.namelist():
                    target.writestr(f"{number}/{name}", source.read(name))
    return merged.getvalue()


@dataclass(frozen=True)
class World:
    """What most tests refer to; they add to it and take nothing away."""

    image: str
    zipped: str
    labels: str
    other_labels: str
    labelled: str
    """Dataset of `image` with `labels`."""
    unlabelled: str
    encoder: str
    segmenter: str


@pytest.fixture(scope="session")
def world(api: Api, scans: Scans) -> World:
    """Uploaded scans, two datasets, an encoder of base_width 8 and a segmenter."""

    def uploaded(data: bytes, kind: str) -> str:
        response = api.upload(data, kind=kind, subject="subject-1")
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def dataset(**item: str) -> str:
        body = {"name": "A dataset", "items": [item]}
        response = api("POST", "/datasets", json=body)
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    image, labels = uploaded(scans.nifti, "image"), uploaded(scans.labels, "labels")
    zipped, other = uploaded(scans.zipped, "image"), uploaded(scans.other_labels, "labels")
    for name, kind in (("encoder", "encoder"), ("segmenter", "segmenter")):
        register(api, name, kind)
    return World(
        image=image,
        zipped=zipped,
        labels=labels,
        other_labels=other,
        labelled=dataset(volume_id=image, labels_id=labels, split="train"),
        unlabelled=dataset(volume_id=image, split="train"),
        encoder="models:/encoder/1",
        segmenter="models:/segmenter/1",
    )


CELLS = ("batch", 2, 2, 2, 2)
"""Of a feature map."""


def register(
    api: Api,
    name: str,
    kind: str,
    *,
    base_width: int = 8,
    activation: str = "softmax",
    run_id: Any = None,
    is_2d: bool = False,
    parity: tuple[bundle.Parity, ...] = (PASSED,),
    has_map: bool = False,
) -> None:
    """Put a bundle into the store and the registry. The API opens no model, so any bytes do."""
    network = UNet3d(base_width=base_width)
    recipes: dict[str, Any] = {
        "encoder": PretrainRecipe(network=network),
        "segmenter": FinetuneRecipe(labels={"liver": 1}, network=network),
        "classifier": ClassifyRecipe(labels=("liver",), network=network),
    }
    manifest = bundle.Manifest(
        kind=kind,  # type: ignore[arg-type]
        labels=() if kind == "encoder" else ("liver",),
        activation=activation,  # type: ignore[arg-type]
        inputs=(bundle.TensorSpec(name="image", shape=("batch", 1, 16, 16, 16)),),
        outputs=(
            bundle.TensorSpec(name="output", shape=("batch", 2)),
            *([bundle.TensorSpec(name=bundle.FEATURE_MAP, shape=CELLS)] if has_map else []),
        ),
        preprocessing=Preprocessing2d() if is_2d else Preprocessing(),
        patch_size=(224, 224) if is_2d else (16, 16, 16),
        recipe=PretrainRecipe2d() if is_2d else recipes[kind],
        lineage=bundle.Lineage(
            dataset_digest="0" * 64, seed=0, num_steps=1, code_version="0", torch_version="0"
        ),
        metrics={} if kind == "encoder" else {"dice": bundle.Metric(value=0.9, n=3)},
        parity=parity,
        created_at=datetime.now(UTC),
    )
    folder = api.settings.data_dir / f"draft-{name}-{base_width}"
    weights = api.settings.data_dir / "weights"
    weights.write_bytes(b"weights" * 1000)
    files = {bundle.MODEL: weights, bundle.WEIGHTS: weights}
    digest = bundle.save(folder, manifest, files, "# Card\n")
    assert api.store.publish_bundle(folder) == digest
    with api.sessions() as session:
        registry.register(
            session,
            name,
            kind=kind,
            digest=digest,
            manifest=json.loads((folder / bundle.MANIFEST).read_bytes()),
            run_id=run_id,
        )
        session.commit()


@pytest.fixture
def serve(tmp_path: Path, migrated: Migrated) -> Iterator[Any]:
    """Makes an app of a test's own, with settings of its own."""
    running: list[Iterator[Api]] = []

    def start(**options: Any) -> Api:
        served = _serve(tmp_path / str(len(running)), migrated, **options)
        running.append(served)
        return next(served)

    yield start
    for served in reversed(running):
        next(served, None)


@pytest.fixture(scope="session")
def new_model() -> Any:
    """Registers a model: `new_model(api, name, kind, base_width=..., run_id=...)`."""
    return register
