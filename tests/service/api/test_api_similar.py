"""`POST /embeddings:search` and `pcrl similar`: similar cases, over HTTP and from the terminal."""

import os

import numpy as np
import pytest
from typer.testing import CliRunner

from imaging.phantom import make, write_pair
from service.cli import app
from service.client import Client
from service.embeddings import NewEmbedding

HEX = "0" * 32
VECTORS = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.0, 1.0], "a2": [0.8, 0.6]}


def embed(api, volume: str, model: str, vector, **regions) -> str:
    made = api("POST", "/embeddings", json={"volume_id": volume, "model": model}).json()
    pointer = made["model"]
    key = (pointer["name"], pointer["version"], pointer["digest"])
    stored = [
        NewEmbedding(*key, np.array(one, np.float32), region)
        for region, one in {"": vector, **regions}.items()
    ]
    result = {
        "vector": vector,
        "num_windows": 1,
        "timings_s": {},
        "bundle_digest": pointer["digest"],
    }
    api.work(made["id"], result=result, vectors=stored)
    return str(made["id"])


@pytest.fixture(scope="module")
def cases(api, world, new_model, tmp_path_factory):
    """Volume and embedding ids by name; `a2` is of the subject of `a`."""
    new_model(api, "similar", "encoder")
    new_model(api, "unlike", "encoder", base_width=16)
    folder = tmp_path_factory.mktemp("similar")
    found = {}
    for seed, (name, vector) in enumerate(VECTORS.items(), start=50):
        phantom = make(seed, shape=(16, 16, 8), spacing_mm=(12.0, 12.0, 18.0))
        path, _ = write_pair(phantom, folder, name)
        volume = api.upload(path.read_bytes(), subject=f"similar-{name[0]}").json()["id"]
        found[name] = (volume, embed(api, volume, "similar/1", vector))
    embed(api, found["b"][0], "unlike/1", [0.1, 0.2, 0.3])
    return found


def search(api, role="viewer", **body):
    return api("POST", "/embeddings:search", role=role, json=body)


def names(cases, response) -> list[str]:
    assert response.status_code == 200, response.text
    by_id = {volume: name for name, (volume, _) in cases.items()}
    return [by_id[item["volume_id"]] for item in response.json()["items"]]


def test_the_most_alike_of_other_subjects_come_first(api, cases):
    volume, _ = cases["a"]

    response = search(api, volume_id=volume, model="similar/1")

    body = response.json()
    assert names(cases, response) == ["b", "c"]
    first = body["items"][0]
    assert (first["rank"], first["embedding_id"]) == (1, cases["b"][1])
    assert (first["subject"], body["num_compared"]) == ("similar-b", 2)
    assert first["cosine"] == pytest.approx(0.6, abs=1e-6)
    assert (body["model"]["name"], body["model"]["version"]) == ("similar", 1)


def test_a_scan_is_most_like_itself_unless_its_subject_is_left_out(api, cases):
    filters = {"exclude_same_subject": False}

    response = search(api, volume_id=cases["a"][0], model="similar", filters=filters)

    assert names(cases, response) == ["a", "a2", "b", "c"]
    assert response.json()["items"][0]["cosine"] == pytest.approx(1.0, abs=1e-9)


def test_an_embedding_and_a_vector_ask_the_same(api, cases):
    by_embedding = search(api, embedding_id=cases["a"][1])
    by_vector = search(api, vector=[5.0, 0.0], model="similar/1")

    assert names(cases, by_embedding) == ["b", "c"]
    assert names(cases, by_vector) == ["a", "a2", "b", "c"]


def test_filters_and_limit(api, cases):
    ask = {"vector": [1.0, 0.0], "model": "similar/1"}
    modality = api("GET", f"/volumes/{cases['a'][0]}").json()["modality"]

    assert names(cases, search(api, **ask, limit=1)) == ["a"]
    assert len(names(cases, search(api, **ask, filters={"modality": modality}))) == 4
    assert names(cases, search(api, **ask, filters={"modality": "XX"})) == []
    assert len(names(cases, search(api, **ask, filters={"kind": "image"}))) == 4
    assert names(cases, search(api, **ask, filters={"kind": "labels"})) == []


def test_only_embeddings_of_the_same_bundle_are_compared(api, cases):
    response = search(api, vector=[0.1, 0.2, 0.3], model="unlike")

    assert names(cases, response) == ["b"]
    assert response.json()["num_compared"] == 1


def test_a_scan_without_an_embedding_is_told_to_be_embedded_first(api, cases):
    response = search(api, volume_id=cases["a"][0], model="unlike/1")

    body = response.json()
    assert (response.status_code, body["code"]) == (409, "not_embedded")
    assert "embed it first" in body["detail"]
    assert (body["volume_id"], body["model"]) == (cases["a"][0], "unlike/1")


def test_an_embedding_that_is_not_done_is_409(api, cases):
    ask = {"volume_id": cases["a"][0], "model": "unlike/1"}
    made = api("POST", "/embeddings", json=ask).json()["id"]

    response = search(api, embedding_id=made)

    assert (response.status_code, response.json()["code"]) == (409, "not_ready")
    api("POST", f"/embeddings/{made}:cancel")


def test_what_does_not_exist_or_does_not_fit_is_a_problem(api, world, cases):
    def code(**body):
        response = search(api, **body)
        return response.status_code, response.json()["code"]

    volume, embedding = cases["a"]
    assert code(volume_id=f"vol_{HEX}", model="similar") == (404, "not_found")
    assert code(volume_id=volume, model="nowhere") == (404, "not_found")
    assert code(embedding_id=f"emb_{HEX}") == (404, "not_found")
    assert code(volume_id=volume, model="segmenter") == (422, "wrong_model_kind")
    assert code(volume_id=world.labels, model="similar") == (422, "wrong_volume_kind")
    for body in (
        {},
        {"model": "similar"},
        {"volume_id": volume},
        {"embedding_id": embedding, "model": "similar"},
        {"volume_id": volume, "vector": [1.0, 0.0], "model": "similar"},
        {"vector": [0.0, 0.0], "model": "similar"},
        {"vector": [], "model": "similar"},
        {"vector": [1.0, 0.0, 0.0], "model": "similar"},
        {"volume_id": volume, "model": "similar", "limit": 0},
        {"volume_id": volume, "model": "similar", "limit": 101},
        {"volume_id": volume, "model": "similar", "filters": {"subject": "x"}},
    ):
        assert code(**body) == (422, "invalid_request"), body


def test_the_client_and_the_command_list_similar_cases(api, url, cases):
    volume, _ = cases["a"]

    with Client(url, api.tokens["viewer"]) as client:
        found = client.similar(volume, "similar", limit=1, exclude_same_subject=False)
    runner = CliRunner(env={"PCRL_URL": url, "PCRL_TOKEN": api.tokens["viewer"]})
    listed = runner.invoke(app, ["similar", volume, "--model", "similar"])
    refused = runner.invoke(app, ["similar", volume, "--model", "unlike"])

    assert [item.volume_id for item in found.items] == [volume]
    assert listed.exit_code == 0, listed.output
    lines = [line.split("\t") for line in listed.output.splitlines()]
    assert [line[:2] for line in lines] == [["1", cases["b"][0]], ["2", cases["c"][0]]]
    assert refused.exit_code == os.EX_DATAERR
    assert "not_embedded" in refused.output


def test_a_search_compares_one_region_of_one_model(api, cases):
    volumes = {name: cases[name][0] for name in ("a", "b")}
    for name, vector in (("a", [0.0, 1.0]), ("b", [0.1, 0.9])):
        embed(api, volumes[name], "similar/1", VECTORS[name], liver=vector)

    livers = search(api, volume_id=volumes["a"], model="similar", region="liver").json()
    wholes = search(api, volume_id=volumes["a"], model="similar").json()
    other = search(api, volume_id=cases["c"][0], model="similar", region="liver")

    assert (livers["region"], livers["num_compared"]) == ("liver", 1)
    assert livers["items"][0]["cosine"] == pytest.approx(0.9 / np.hypot(0.1, 0.9))
    assert wholes["region"] == "" and wholes["num_compared"] == 2
    assert (other.status_code, other.json()["code"]) == (409, "not_embedded")
    assert other.json()["region"] == "liver"


def test_regions_need_a_feature_map_and_one_source(api, cases):
    def refused(**body):
        response = api("POST", "/embeddings", json={"volume_id": cases["a"][0], **body})
        return response.status_code, response.json()["code"]

    both = {"segmenter": "segmenter", "segmentation_id": f"seg_{HEX}"}
    assert refused(model="similar", segmenter="segmenter") == (422, "no_feature_map")
    assert refused(model="similar", **both) == (422, "invalid_request")


def test_the_source_of_regions_is_checked_before_the_run_is_queued(api, cases, world, new_model):
    new_model(api, "mapped", "encoder", base_width=24, has_map=True)

    def asked(**source):
        body = {"volume_id": cases["a"][0], "model": "mapped", **source}
        return api("POST", "/embeddings", json=body)

    queued = asked(segmenter="segmenter")
    assert queued.status_code == 202, queued.text
    assert asked(segmenter="mapped").json()["code"] == "wrong_model_kind"
    assert asked(segmentation_id=f"seg_{HEX}").json()["code"] == "not_found"
    body = {"volume_id": cases["a"][0], "model": "segmenter"}
    waiting = api("POST", "/segmentations", json=body).json()["id"]
    assert asked(segmentation_id=waiting).json()["code"] == "not_ready"
    body = {"volume_id": cases["b"][0], "model": "segmenter"}
    elsewhere = api("POST", "/segmentations", json=body).json()["id"]
    assert asked(segmentation_id=elsewhere).json()["code"] == "invalid_request"
