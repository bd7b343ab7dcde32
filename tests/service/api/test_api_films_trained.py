"""Films through the real trainer: posted, pretrained on, classified, judged and registered."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from imaging.image2d import read_image
from models.predict2d import embed_image
from models.session import open_session
from service import db
from service import tasks as inference
from service import worker as workers
from trainer import tasks

NETWORK = {"kind": "resnet18_unet2d", "width": 8}
COMMON = {"network": NETWORK, "preprocessing": {"size": 32}, "batch_size": 2, "log_every": 1}
PRETRAIN = {
    "kind": "pretrain",
    **COMMON,
    "crops": {"input_size": 32, "cutout_size": 5},
    "method": {"embedding_size": 8, "queue_size": 16, "outer_rank": 4},
}
CLASSIFY = {
    "kind": "classify",
    **COMMON,
    "labels": ["bright"],
    "crops": {"input_size": 32, "crop_area": [0.8, 1.0]},
    "validate_every": 2,
}
PLAN = {
    "methods": [{"name": "pcrl", "pretrain": PRETRAIN}],
    "finetune": CLASSIFY,
    "ratios": [1.0],
    "seeds": [0],
    "budget": {"pretrain_steps": 2, "finetune_steps": 2},
}


def film(seed: int, *, is_bright: bool) -> bytes:
    pixels = np.random.default_rng(seed).normal(90, 20, (70, 60))
    pixels[20:50, 15:45] += 60 * is_bright
    held = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(held, "PNG")
    return held.getvalue()


def voxels_of(api, volume_id: str) -> str:
    with api.sessions() as session:
        return session.get(db.Volume, volume_id).voxels_sha256


@pytest.mark.timeout(300)  # two trainings, on cores that others use too
@pytest.mark.slow
@pytest.mark.nightly
def test_an_experiment_on_films_is_trained_judged_and_reported(serve):
    api = serve(device="cpu", train_threads=1)
    items = []
    for n, split in enumerate(("train",) * 4 + ("val", "val", "test", "test")):
        data = film(n, is_bright=n % 2 == 1)
        sent = api.upload(data, kind="image_2d", subject=f"p{n}").json()["id"]
        items.append({"volume_id": sent, "classes": {"bright": n % 2}, "split": split})
    dataset = api("POST", "/datasets", json={"name": "Films", "items": items}).json()["id"]
    body = {"name": "Films", "source_dataset_id": dataset, "target_dataset_id": dataset, **PLAN}
    planned = api("POST", "/experiments", json=body)
    assert planned.status_code == 202, planned.text
    where = f"/experiments/{planned.json()['id']}"

    done = workers.work_through(workers.make_worker(api.settings, "train", name="w"), tasks.run)

    trainings = api("GET", f"{where}/trainings").json()["items"]
    assert [(one["key"], one["state"], one["error"]) for one in trainings] == [
        ("pretrain/pcrl/0", "succeeded", None),
        ("finetune/pcrl/100%/0", "succeeded", None),
    ]
    assert done == 2
    pretraining, training = (api("GET", f"/runs/{one['run_id']}").json() for one in trainings)
    assert training["parent_digest"] == pretraining["model"]["digest"]
    points = api("GET", f"/runs/{pretraining['id']}/metrics").json()["points"]
    assert {point["step"] for point in points} == {1, 2}
    kinds = {
        run["id"]: api("GET", f"/models/{run['model']['name']}/versions/1").json()["manifest"]
        for run in (pretraining, training)
    }
    assert kinds[pretraining["id"]]["kind"] == "encoder"
    made = kinds[training["id"]]
    assert (made["kind"], made["labels"], made["patch_size"]) == (
        "classifier",
        ["bright"],
        [32, 32],
    )
    cases = json.loads(api("GET", f"/runs/{training['id']}/files/cases.json").content)
    assert {case["subject"] for case in cases["cases"]} == {"p6", "p7"}
    report = api("GET", f"{where}/report?format=json").json()
    assert (report["measure"], report["num_patients"]) == ("auc", 2)
    assert len(report["points"]) == 1

    encoder = pretraining["model"]["name"]
    for item in items[:3]:
        body = {"volume_id": item["volume_id"], "model": encoder}
        asked = api("POST", "/embeddings", json=body)
        assert asked.status_code == 202, asked.text
    workers.work_through(workers.make_worker(api.settings, "inference", name="i"), inference.run)
    embedded = api("GET", asked.headers["location"].removeprefix("/api/v1")).json()
    assert embedded["state"] == "succeeded", embedded["error"]
    vector, digest = np.array(embedded["result"]["vector"]), pretraining["model"]["digest"]
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    pixels = read_image(api.store.verify(voxels_of(api, items[2]["volume_id"]))).pixels
    alone = embed_image(open_session(api.store.bundle_dir(digest)), pixels)
    np.testing.assert_allclose(vector, alone.vector, atol=1e-6)
    search = {"volume_id": items[0]["volume_id"], "model": encoder}
    similar = api("POST", "/embeddings:search", json=search).json()
    assert {one["volume_id"] for one in similar["items"]} == {
        item["volume_id"] for item in items[1:3]
    }
