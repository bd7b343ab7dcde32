"""Files that a training left: listed once it has succeeded, and downloaded."""

from __future__ import annotations

import hashlib

import pytest

from service.runs import NewArtifact

PNG = b"\x89PNG of a reconstruction"


@pytest.fixture
def trained(api, world) -> str:
    recipe = {"network": {"base_width": 8}}
    body = {"kind": "pretrain", "dataset_id": world.unlabelled, "model_name": "files"}
    run = str(api("POST", "/runs", json={**body, "recipe": recipe}).json()["id"])
    with api.store.receive() as writer:
        writer.write(PNG)
        sha256, size = api.store.commit_blob(writer)
    api.work(run, artifacts=(NewArtifact("preview-500.png", sha256, size, "image/png"),))
    return run


def test_previews_are_listed_and_downloaded(api, trained):
    listed = api("GET", f"/runs/{trained}/files", role="viewer").json()["files"]

    found = api("GET", f"/runs/{trained}/files/{listed[0]['name']}", role="viewer")

    assert [one["name"] for one in listed] == ["preview-500.png"]
    assert listed[0]["sha256"] == hashlib.sha256(PNG).hexdigest()
    assert (found.status_code, found.content) == (200, PNG)
    assert found.headers["content-type"] == "image/png"
    assert "attachment" in found.headers["content-disposition"]


@pytest.mark.parametrize("name", ["preview-501.png", "..%2Fsecret", "UPPER"])
def test_what_is_not_there_is_not_given(api, trained, name):
    found = api("GET", f"/runs/{trained}/files/{name}")

    assert found.status_code in {404, 422}


def test_a_segmentation_has_routes_of_its_own(api, world):
    body = {"volume_id": world.image, "model": world.segmenter}
    run = api("POST", "/segmentations", json=body).json()["id"]

    assert api("GET", f"/runs/{run}/files").status_code == 404
