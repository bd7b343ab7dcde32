"""Cascades composed over REST, and what a segmentation may be asked for beside its mask."""

import pytest

from models import bundle
from service import registry
from service.runs import NewArtifact


@pytest.fixture(scope="module")
def models(api, tmp_path_factory, new_model):
    """Segmenters `fine` (liver, tumour; 1 mm) and `coarse` (liver; 4 mm), whose ONNX is empty."""
    new_model(api, "cascade-template", "segmenter")
    with api.sessions() as session:
        template = registry.resolve(session, "cascade-template")
        manifest = bundle.load(api.store.bundle_dir(template.digest))
        for name, labels, spacing in (
            ("cascade-fine", ("liver", "tumour"), 1.0),
            ("cascade-coarse", ("liver",), 4.0),
        ):
            folder = tmp_path_factory.mktemp("models")
            (folder / "empty").write_bytes(b"")  # protobuf's empty message
            spec = manifest.preprocessing.model_copy(update={"spacing_mm": (spacing,) * 3})
            made = manifest.model_copy(update={"labels": labels, "preprocessing": spec})
            bundle.save(folder / "bundle", made, {bundle.MODEL: folder / "empty"}, "# Card\n")
            registry.register(
                session,
                name,
                kind="segmenter",
                digest=api.store.publish_bundle(folder / "bundle"),
                manifest=bundle.load(folder / "bundle").model_dump(mode="json"),
            )
        session.commit()


def test_two_models_become_a_version_that_says_both(api, models):
    ask = {"fine": "cascade-fine", "coarse": "models:/cascade-coarse/1", "organ": "liver"}

    made = api(
        "POST", "/models/cascade-fine/versions:cascade", role="researcher",
        json={**ask, "margin_mm": 20.0},
    )  # fmt: skip

    body = made.json()
    assert made.status_code == 201
    assert made.headers["location"] == f"/api/v1/models/cascade-fine/versions/{body['version']}"
    cascade = body["manifest"]["cascade"]
    assert (cascade["organ"], cascade["margin_mm"]) == ("liver", 20.0)
    assert cascade["coarse_spacing_mm"] == [4.0, 4.0, 4.0]
    fine = api("GET", "/models/cascade-fine/versions/1").json()
    coarse = api("GET", "/models/cascade-coarse/versions/1").json()
    assert cascade["fine_digest"] == fine["digest"] != body["digest"]
    assert cascade["coarse"]["bundle_digest"] == coarse["digest"]
    folder = api.store.bundle_dir(body["digest"])
    assert bundle.load(folder).cascade.coarse.labels == ("liver",)
    assert b"margin_mm" in (folder / bundle.MODEL).read_bytes()
    assert not list(api.store.tmp.glob("*.cascade"))


def test_one_model_looks_for_the_organ_itself(api, models):
    ask = {"fine": "cascade-fine/1", "organ": "liver", "parts": ["tumour"]}

    made = api("POST", "/models/cascade-one/versions:cascade", json=ask).json()

    cascade = made["manifest"]["cascade"]
    assert (made["name"], made["version"]) == ("cascade-one", 1)
    assert cascade["coarse"] is None
    assert (cascade["coarse_spacing_mm"], cascade["margin_mm"]) == ([4.0, 4.0, 4.0], 15.0)
    assert (cascade["parts"], cascade["min_organ_ml"]) == (["tumour"], 1.0)


def test_the_same_key_composes_once(api, models):
    ask = {"fine": "cascade-fine/1", "organ": "liver"}
    headers = {"Idempotency-Key": "cascade-once"}

    first, again = (
        api("POST", "/models/cascade-once/versions:cascade", json=ask, headers=headers)
        for _ in range(2)
    )

    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert len(api("GET", "/models/cascade-once").json()["versions"]) == 1
    api("POST", "/models/cascade-once/versions:cascade", json=ask)
    assert len(api("GET", "/models/cascade-once").json()["versions"]) == 2  # the control


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"organ": "spleen"}, 422, "invalid_request"),
        ({"parts": ["spleen"]}, 422, "invalid_request"),
        ({"coarse": "cascade-coarse", "coarse_spacing_mm": 3.0}, 422, "invalid_request"),
        ({"margin_mm": -1.0}, 422, "invalid_request"),
        ({"fine": "encoder"}, 422, "invalid_request"),  # it has no labels
        ({"fine": "cascade-fine/9"}, 404, "not_found"),
        ({"coarse": "absent"}, 404, "not_found"),
        ({"fine": "cascade-done"}, 422, "wrong_model_kind"),  # a cascade itself
        ({"more": 1}, 422, "invalid_request"),
    ],
)
def test_what_makes_no_cascade_registers_nothing(api, world, models, change, status, code):
    ask = {"fine": "cascade-fine/1", "organ": "liver"}
    api(
        "POST", "/models/cascade-done/versions:cascade", json=ask,
        headers={"Idempotency-Key": "cascade-done"},
    )  # fmt: skip
    before = api.counts()

    response = api("POST", "/models/cascade-new/versions:cascade", json={**ask, **change})

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert "spleen" not in response.text
    assert api.counts() == before


def test_a_name_of_another_kind_takes_no_cascade(api, world, models):
    ask = {"fine": "cascade-fine/1", "organ": "liver"}

    response = api("POST", "/models/encoder/versions:cascade", json=ask)
    refused = api("POST", "/models/x/versions:cascade", role="annotator", json=ask)

    assert (response.status_code, response.json()["code"]) == (422, "wrong_model_kind")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    ("given", "axes"),
    [(True, ["i", "j", "k"]), (False, []), (["k", "i"], ["i", "k"]), ([], [])],
)
def test_flips_and_the_map_are_part_of_what_is_run(api, world, given, axes):
    from service import runs

    body = {"volume_id": world.image, "model": world.segmenter}

    made = api("POST", "/segmentations", json={**body, "flips": given, "uncertainty": True})
    plain = api("POST", "/segmentations", json=body)

    with api.sessions() as session:
        spec = runs.get(session, made.json()["id"]).spec
        other = runs.get(session, plain.json()["id"]).spec
    assert (spec["flips"], spec["uncertainty"]) == (axes, True)
    assert (other["flips"], other["uncertainty"]) == ([], False)


@pytest.mark.parametrize("flips", [["x"], ["i", "i"], "i", 1, ["i", "j", "k", "i"]])
def test_flips_that_are_none_are_refused(api, world, flips):
    before = api.counts()
    body = {"volume_id": world.image, "model": world.segmenter, "flips": flips}

    response = api("POST", "/segmentations", json=body)

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert api.counts() == before


def test_the_map_is_a_download_where_it_was_made(api, world):
    body = {"volume_id": world.image, "model": world.segmenter}
    result = {
        "volumes_ml": {"liver": 1.0},
        "voxels": {"liver": 5},
        "timings_s": {},
        "uncertainty": {"mean_foreground_entropy": 0.25, "label_entropies": {}, "map": None},
        "quality": {"flag": "review", "reasons": ["uncertain"], "max_foreground_entropy": 0.1},
    }
    ids = [api("POST", "/segmentations", json=body).json()["id"] for _ in range(2)]
    with api.store.receive() as writer:
        writer.write(b"a map")
        sha256, size = api.store.commit_blob(writer)
    made = NewArtifact("uncertainty.nii.gz", sha256, size, "application/gzip")
    api.work(ids[1], result=result, artifacts=(made,))
    early = api("GET", f"/segmentations/{ids[1]}/uncertainty")

    shown = api("GET", f"/segmentations/{ids[1]}").json()["result"]

    assert early.content == b"a map"
    assert f'filename="{ids[1]}.uncertainty.nii.gz"' in early.headers["content-disposition"]
    assert shown["quality"]["flag"] == "review"
    assert shown["uncertainty"]["mean_foreground_entropy"] == 0.25
    assert (shown["cascade"], shown["flips"]) == (None, [])
    assert api("GET", f"/segmentations/{ids[0]}/uncertainty").status_code == 409
