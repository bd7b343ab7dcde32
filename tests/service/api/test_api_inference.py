"""Segmentations and embeddings: queued, waited for, downloaded."""

import threading
import time
from unittest.mock import ANY

import pytest

from service.runs import NewArtifact

HEX = "0" * 32
SEGMENTED = {
    "labels": [{"name": "liver", "value": 1, "voxels": 5000, "volume_ml": 1450.5}],
    "volumes_ml": {"liver": 1450.5},
    "voxels": {"liver": 5000},
    "num_windows": 8,
    "provider": "CPUExecutionProvider",
    "certificate": {"shape": [32, 32, 16], "max_corner_error_mm": 0.0, "num_labelled": 5000},
    "timings_s": {"model": 0.5},
}
EMBEDDED = {
    "vector": [0.6, 0.8],
    "num_windows": 3,
    "provider": "CPUExecutionProvider",
    "timings_s": {"model": 0.25},
}


def stored(api, name: str, data: bytes, media_type: str) -> NewArtifact:
    with api.store.receive() as writer:
        writer.write(data)
        sha256, size = api.store.commit_blob(writer)
    return NewArtifact(name, sha256, size, media_type)


@pytest.fixture
def asked(api, world) -> str:
    body = {"volume_id": world.image, "model": world.segmenter}
    return str(api("POST", "/segmentations", json=body).json()["id"])


def finish(api, run: str) -> None:
    artifacts = (
        stored(api, "mask.nii.gz", b"mask " + run.encode(), "application/gzip"),
        stored(api, "preview.png", b"preview " + run.encode(), "image/png"),
    )
    api.work(run, result=SEGMENTED, artifacts=artifacts)


def test_a_segmentation_is_queued_with_the_version_that_the_alias_meant(api, world):
    api("PUT", "/models/segmenter/aliases/inference-test", json={"version": 1})
    body = {"volume_id": world.image, "model": "models:/segmenter@inference-test"}

    response = api("POST", "/segmentations", role="annotator", json=body)

    made = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/api/v1/segmentations/{made['id']}"
    assert (made["model"]["name"], made["model"]["version"]) == ("segmenter", 1)
    assert (made["state"], made["result"]) == ("queued", None)


@pytest.mark.parametrize(
    ("collection", "volume", "model", "status", "code"),
    [
        ("segmentations", "image", "encoder", 422, "wrong_model_kind"),
        ("embeddings", "image", "segmenter", 422, "wrong_model_kind"),
        ("segmentations", "labels", "segmenter", 422, "wrong_volume_kind"),
        ("embeddings", "labels", "encoder", 422, "wrong_volume_kind"),
        ("segmentations", "image", "absent", 404, "not_found"),
        ("segmentations", "image", "segmenter/7", 404, "not_found"),
        ("segmentations", "image", "../segmenter", 422, "invalid_request"),
        ("segmentations", f"vol_{HEX}", "segmenter", 404, "not_found"),
    ],
)
def test_a_bad_request_queues_nothing(api, world, collection, volume, model, status, code):
    before = api.counts()
    body = {"volume_id": getattr(world, volume, volume), "model": model}

    response = api("POST", f"/{collection}", json=body)

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert api.counts() == before


def test_regions_that_may_overlap_fit_no_mask(api, world, new_model):
    new_model(api, "regions", "segmenter", activation="sigmoid")
    before = api.counts()

    asked = api("POST", "/segmentations", json={"volume_id": world.image, "model": "regions"})

    assert (asked.status_code, asked.json()["code"]) == (422, "wrong_model_kind")
    assert "may overlap" in asked.json()["detail"] and api.counts() == before


def test_a_result_is_not_there_before_the_run_has_succeeded(api, asked):
    early = api("GET", f"/segmentations/{asked}/mask")
    api("POST", f"/segmentations/{asked}:cancel", role="annotator")
    never = api("GET", f"/segmentations/{asked}/mask")

    assert (early.status_code, early.json()["code"]) == (409, "not_ready")
    assert early.json()["state"] == "queued"
    assert "retry-after" in early.headers
    assert (never.status_code, never.json()["state"]) == (409, "canceled")
    assert "retry-after" not in never.headers


def test_mask_and_preview_are_downloads(api, asked):
    finish(api, asked)

    made = api("GET", f"/segmentations/{asked}").json()
    mask = api("GET", f"/segmentations/{asked}/mask")
    preview = api("GET", f"/segmentations/{asked}/preview")

    assert made["state"] == "succeeded"
    assert made["result"].items() >= {**SEGMENTED, "certificate": ANY}.items()
    assert made["result"]["certificate"].items() >= SEGMENTED["certificate"].items()
    assert mask.content == b"mask " + asked.encode()
    assert f'filename="{asked}.nii.gz"' in mask.headers["content-disposition"]
    assert preview.headers["content-type"] == "image/png"
    for response in (mask, preview):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"


def test_a_mask_that_changed_on_the_disk_is_not_given_out(api, asked):
    finish(api, asked)
    path = api.store.path_of(stored(api, "", b"mask " + asked.encode(), "").sha256)
    path.write_bytes(b"musk " + asked.encode())

    response = api("GET", f"/segmentations/{asked}/mask")

    assert (response.status_code, response.json()["code"]) == (500, "blob_corrupt")


def test_who_prefers_to_wait_gets_the_result(api, world):
    body = {"volume_id": world.image, "model": world.encoder}
    done = threading.Event()

    def waiting() -> set[str]:
        return {made["id"] for made in api("GET", "/embeddings?state=queued").json()["items"]}

    others = waiting()

    def work() -> None:
        while not done.is_set():
            if mine := waiting() - others:
                api.work(mine.pop(), result=EMBEDDED)
                return
            time.sleep(0.05)

    worker = threading.Thread(target=work)
    worker.start()
    response = api("POST", "/embeddings", json=body, headers={"Prefer": "wait=20"})
    done.set()
    worker.join()

    assert response.status_code == 200
    assert response.headers["preference-applied"] == "wait=20"
    found = response.json()["result"]
    assert {name: found[name] for name in EMBEDDED} == EMBEDDED


@pytest.mark.parametrize(
    ("prefer", "least_s", "most_s"),
    [("wait=1", 0.9, 5.0), ("respond-async, wait=0", 0.0, 2.0), ("wait=soon", 0.0, 2.0)],
)
def test_who_waits_in_vain_gets_202(api, world, prefer, least_s, most_s):
    body = {"volume_id": world.image, "model": world.encoder}
    begun_at = time.monotonic()

    response = api("POST", "/embeddings", json=body, headers={"Prefer": prefer})

    assert response.status_code == 202
    assert "preference-applied" not in response.headers
    assert least_s <= time.monotonic() - begun_at <= most_s


def test_nobody_waits_longer_than_the_operator_allows(serve, scans, new_model):
    strict = serve(wait_max_s=0.2)
    new_model(strict, "encoder", "encoder")
    volume = strict.upload(scans.nifti).json()["id"]
    begun_at = time.monotonic()

    response = strict(
        "POST",
        "/embeddings",
        json={"volume_id": volume, "model": "encoder"},
        headers={"Prefer": "wait=600"},
    )

    assert response.status_code == 202
    assert time.monotonic() - begun_at < 5.0


def test_a_segmentation_is_no_embedding(api, asked):
    assert api("GET", f"/embeddings/emb_{asked[4:]}").status_code == 404
    assert api("GET", f"/embeddings/{asked}").status_code == 422


def test_inferences_are_listed_by_volume_and_state(api, world, asked):
    def ids(query: str) -> list[str]:
        return [item["id"] for item in api("GET", f"/segmentations?{query}").json()["items"]]

    assert asked in ids(f"volume_id={world.image}&state=queued")
    assert asked not in ids(f"volume_id={world.zipped}")


def test_an_embedding_is_canceled(api, world):
    body = {"volume_id": world.image, "model": world.encoder}
    made = api("POST", "/embeddings", json=body).json()["id"]

    response = api("POST", f"/embeddings/{made}:cancel", role="annotator")

    assert (response.status_code, response.json()["state"]) == (202, "canceled")
