"""The whole chain in real processes: scans in the store, a training, a mask on the source grid."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from imaging import nifti
from imaging.phantom import make
from models.recipe import FinetuneRecipe, Postprocess, Preprocessing, UNet3d, Window
from service import celery_app, datasets, db, migrate, registry, runs, volumes
from service.settings import Settings
from service.storage import Store

_spec = importlib.util.spec_from_file_location("workers", Path(__file__).with_name("workers.py"))
workers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)

RECIPE = FinetuneRecipe(
    labels={"liver": 1, "tumour": 2},
    network=UNet3d(base_width=2),
    preprocessing=Preprocessing(
        spacing_mm=(12.0, 12.0, 20.0), intensity=Window(low_hu=-200.0, high_hu=200.0)
    ),
    patch_size=(16, 16, 8),
    postprocess=Postprocess(
        parts={"liver": ("tumour",)}, keep_largest=("liver",), lesions=("tumour",)
    ),
    num_steps=4,
    batch_size=2,
    validate_every=2,
    checkpoint_every=2,
    log_every=1,
)


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.nightly),
        pytest.param("servers", marks=pytest.mark.services),
    ]
)
def settings(request, tmp_path):
    servers = {}
    if request.param == "servers":
        servers = {
            "database_url": request.getfixturevalue("postgres_url"),
            "broker_url": request.getfixturevalue("redis_url"),
        }
    settings = Settings(
        data_dir=tmp_path / "data",
        device="cpu",
        inference_threads=1,
        train_threads=1,
        heartbeat_s=1.0,
        **servers,
    )
    migrate.upgrade(settings.database_url)
    return settings


@pytest.fixture
def sessions(settings):
    engine = db.connect(settings.database_url)
    yield db.sessions(engine)
    engine.dispose()


def ingest(session, store, path, **facts):
    sha256, size = store.put_file(path)
    volume, _ = volumes.ingest(
        session, store, sha256, size, series_uid=None, principal="t", **facts
    )
    session.commit()
    return volume


def post(sessions, settings, **facts):
    with sessions() as session:
        run = runs.create(session, principal="t", **facts)
        session.commit()
    assert celery_app.ring(run.id, run.queue, settings=settings)
    return run.id


def ended(sessions, run_id, log):
    def has_ended():
        with sessions() as session:
            return runs.get(session, run_id).state in db.TERMINAL

    workers.wait_for(has_ended, timeout_s=90.0, what=log.read_text()[-3000:])
    with sessions() as session:
        run = runs.get(session, run_id)
    assert run.state == "succeeded", (run.error, log.read_text()[-3000:])
    return run


@pytest.mark.slow
def test_scans_become_a_model_and_the_model_a_certified_mask(settings, sessions, tmp_path):
    store = Store(settings.data_dir)
    log = tmp_path / "worker.log"
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])  # files are stored LPS-wise, as most CT is
    pairs = []
    with sessions() as session:
        for seed in range(3):
            phantom = make(seed, shape=(32, 32, 16), spacing_mm=(12.0, 12.0, 20.0))
            ids = []
            for kind, voxels in (("image", phantom.volume.voxels), ("labels", phantom.labels)):
                path = tmp_path / f"{seed}_{kind}.nii.gz"
                nifti.write(path, voxels, phantom.volume.affine @ flip)
                ids.append(ingest(session, store, path, kind=kind, subject=f"s{seed}").id)
            pairs.append(ids)
        items = [datasets.Item(image, labels) for image, labels in pairs]
        dataset = datasets.create(session, name="d", items=items, principal="t")
        session.commit()

    with workers.worker(settings, "train", log):
        spec = {"recipe": RECIPE.model_dump(mode="json"), "parent": None, "model_name": "liver"}
        trained = ended(
            sessions,
            post(sessions, settings, kind="finetune", dataset_id=dataset.id, spec=spec),
            log,
        )
    with sessions() as session:
        version = registry.resolve(session, "liver")
        assert version.run_id == trained.id
        assert {point.name for point in runs.metrics(session, trained.id)}
        scan = volumes.get(session, pairs[0][0])

    with workers.worker(settings, "inference", log):
        model = {"name": "liver", "version": version.version, "digest": version.digest}
        facts = {"kind": "segment", "volume_id": scan.id, "spec": {"model": model}}
        first = ended(sessions, post(sessions, settings, **facts), log)
        second = ended(sessions, post(sessions, settings, **facts), log)

    assert [label["name"] for label in first.result["labels"]] == ["liver", "tumour"]
    assert first.result["bundle_digest"] == version.digest
    assert first.result["certificate"]["shape"] == scan.source_shape
    told = first.result["preflight"]
    assert 0 < told["predicted_bytes"] < told["available_bytes"] and told["degraded"] == []
    with sessions() as session:
        mask = runs.artifact(session, first.id, "mask.nii.gz")
        assert runs.artifact(session, first.id, "preview.png").media_type == "image/png"
        assert runs.artifact(session, second.id, "mask.nii.gz").sha256 == mask.sha256
        logged = [e.data for e in runs.events_after(session, first.id) if e.type == "log"]
    assert logged[0]["message"].startswith("the segmentation needs 0.")
    path = tmp_path / "mask.nii.gz"
    path.write_bytes(store.verify(mask.sha256).read_bytes())
    found, grid = nifti.read(path)
    num_tumours = ndimage.label(found.voxels == 2, np.ones((3, 3, 3)))[1]
    assert first.result["lesions"]["tumour"]["num"] == num_tumours  # the recipe's wish arrived
    assert set(first.result["removed_voxels"]) == {"liver", "tumour"}
    if (found.voxels == 1).any():
        assert ndimage.label(found.voxels > 0, np.ones((3, 3, 3)))[1] == 1
    assert list(grid.shape) == scan.source_shape
    assert np.allclose(grid.affine, scan.source_affine)
