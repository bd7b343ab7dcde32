"""Models: versions, bundles, and aliases that two people move."""

import io
import zipfile

import pytest

from models import bundle


def test_a_model_shows_its_versions_newest_first_and_its_aliases(api, new_model):
    new_model(api, "shown", "encoder", base_width=8)
    new_model(api, "shown", "encoder", base_width=16)
    api("PUT", "/models/shown/aliases/champion", json={"version": 1})

    body = api("GET", "/models/shown").json()

    assert (body["name"], body["kind"]) == ("shown", "encoder")
    assert [version["version"] for version in body["versions"]] == [2, 1]
    assert [(alias["alias"], alias["version"]) for alias in body["aliases"]] == [("champion", 1)]
    assert api("GET", "/models/shown/versions/3").status_code == 404


def test_a_classifier_is_a_model_and_segments_nothing(api, world, new_model):
    new_model(api, "sorter", "classifier", activation="sigmoid")
    before = api.counts()

    asked = api("POST", "/segmentations", json={"volume_id": world.image, "model": "sorter"})

    assert api("GET", "/models/sorter").json()["kind"] == "classifier"
    assert api("GET", "/models/sorter/versions/1").json()["manifest"]["labels"] == ["liver"]
    assert (asked.status_code, asked.json()["code"]) == (422, "wrong_model_kind")
    assert "kind classifier" in asked.json()["detail"] and api.counts() == before


def test_a_model_of_2d_images_is_shown_and_takes_no_volume(api, world, new_model):
    new_model(api, "films", "encoder", is_2d=True)
    before = api.counts()

    asked = api("POST", "/embeddings", json={"volume_id": world.image, "model": "films"})
    recipe = {"labels": {"liver": 1}, "network": {"base_width": 8}}
    body = {"kind": "finetune", "dataset_id": world.labelled, "model_name": "tuned",
            "parent": "films", "recipe": recipe}  # fmt: skip
    tuned = api("POST", "/runs", json=body)

    shown = api("GET", "/models/films/versions/1").json()["manifest"]
    assert shown["recipe"]["network"] == {
        "kind": "resnet18_unet2d", "in_channels": 3, "width": 64
    }  # fmt: skip
    assert (asked.status_code, asked.json()["code"]) == (422, "wrong_model_kind")
    assert "2D images" in asked.json()["detail"]
    assert (tuned.status_code, tuned.json()["code"]) == (422, "incompatible_parent")
    assert "resnet18_unet2d of in_channels 3, width 64" in tuned.json()["detail"]
    assert api.counts() == before


def test_models_are_listed_by_name_page_by_page(api, new_model):
    for name in ("page-c", "page-a", "page-b"):
        new_model(api, name, "encoder")

    seen, query = [], "?page_size=1"
    while query:
        page = api("GET", f"/models{query}").json()
        seen += [item["name"] for item in page["items"]]
        token = page["next_page_token"]
        query = f"?page_size=1&page_token={token}" if token else ""

    assert seen == sorted(set(seen))
    assert {"page-a", "page-b", "page-c"} <= set(seen)


def test_a_downloaded_bundle_is_the_registered_one(api, world, tmp_path):
    response = api("GET", "/models/encoder/versions/1/bundle")

    version = api("GET", "/models/encoder/versions/1").json()
    assert response.headers["content-disposition"] == 'attachment; filename="encoder-1.zip"'
    assert response.headers["x-content-type-options"] == "nosniff"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path)
    assert bundle.digest_of(tmp_path / "encoder-1") == version["digest"]
    assert bundle.load(tmp_path / "encoder-1").kind == "encoder"


def test_the_same_bundle_is_the_same_zip_every_time(api, world):
    first, second = (api("GET", "/models/encoder/versions/1/bundle") for _ in range(2))

    assert first.content == second.content


def test_a_bundle_that_changed_on_the_disk_is_not_given_out(api, new_model):
    new_model(api, "damaged", "encoder", base_width=4)
    digest = api("GET", "/models/damaged/versions/1").json()["digest"]
    (api.store.bundle_dir(digest) / bundle.MODEL).write_bytes(b"something else")

    response = api("GET", "/models/damaged/versions/1/bundle")

    assert (response.status_code, response.json()["code"]) == (500, "bundle_corrupt")


def test_an_alias_is_made_moved_and_removed(api, new_model):
    new_model(api, "aliased", "encoder", base_width=8)
    new_model(api, "aliased", "encoder", base_width=16)
    path = "/models/aliased/aliases/champion"

    made = api("PUT", path, json={"version": 1})
    moved = api("PUT", path, json={"version": 2}, headers={"If-Match": made.headers["etag"]})
    read = api("GET", path)
    removed = api("DELETE", path, headers={"If-Match": read.headers["etag"]})

    assert (made.json()["version"], moved.json()["version"]) == (1, 2)
    assert read.json() == moved.json()
    assert made.headers["etag"] != moved.headers["etag"] == read.headers["etag"]
    assert removed.status_code == 204
    assert api("GET", path).status_code == 404


@pytest.mark.parametrize("if_match", ['"1"', '"999"', 'W/"2"', "rubbish", '"1", "2"'])
@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_an_alias_that_moved_meanwhile_is_not_moved_again(api, world, method, if_match):
    path = "/models/encoder/aliases/contested"
    api("DELETE", path)
    for _ in range(2):
        api("PUT", path, json={"version": 1})
    body = {"json": {"version": 1}} if method == "PUT" else {}

    response = api(method, path, headers={"If-Match": if_match}, **body)

    assert (response.status_code, response.json()["code"]) == (412, "precondition_failed")
    assert api("GET", path).json()["revision"] == 2


def test_if_match_star_moves_an_alias_that_is_there_and_makes_none(api, world):
    path = "/models/encoder/aliases/star"

    absent = api("PUT", path, json={"version": 1}, headers={"If-Match": "*"})
    api("PUT", path, json={"version": 1})
    there = api("PUT", path, json={"version": 1}, headers={"If-Match": "*"})

    assert (absent.status_code, there.status_code) == (412, 200)


@pytest.mark.parametrize(
    ("alias", "version", "status"),
    [("latest", 1, 422), ("v3", 1, 422), ("Big", 1, 422), ("fine", 99, 404), ("fine", 0, 422)],
)
def test_an_alias_that_cannot_be_is_refused(api, world, alias, version, status):
    response = api("PUT", f"/models/encoder/aliases/{alias}", json={"version": version})

    assert response.status_code == status
    assert api("GET", f"/models/encoder/aliases/{alias}").status_code in {404, 422}
