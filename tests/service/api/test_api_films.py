"""Films with classes: datasets, pretraining in 2D, classification and experiments, by REST."""

import io

import numpy as np
import pytest
from PIL import Image

NET_2D = {"kind": "resnet18_unet2d", "width": 8}
PRETRAIN = {"kind": "pretrain", "network": NET_2D}
CLASSIFY = {"kind": "classify", "network": NET_2D, "labels": ["nodule", "effusion"]}
CLASSIFY_3D = {"kind": "classify", "labels": ["nodule"], "crop": "whole"}
SPLITS = ("train",) * 4 + ("val",) * 2 + ("test",) * 2
CLASSES = (
    {"nodule": 1, "effusion": 0},
    {"nodule": 0, "effusion": 1, "mass": None},
    {"nodule": 1, "effusion": 0},
    {"nodule": 0, "effusion": 1},
    {"nodule": 1},
    {"nodule": 0},
    {"nodule": 0},
    {"nodule": 1},
)


def film(seed: int) -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng([9, seed]).integers(0, 256, (40, 36), dtype=np.uint8)
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


@pytest.fixture(scope="module")
def films(api) -> list[str]:
    """A film of each patient."""
    sent = [api.upload(film(n), kind="image_2d", subject=f"film-{n}") for n in range(len(SPLITS))]
    assert {answer.status_code for answer in sent} <= {200, 201}
    return [answer.json()["id"] for answer in sent]


def made(api, items) -> str:
    answer = api("POST", "/datasets", json={"name": "Films", "items": items})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


@pytest.fixture(scope="module")
def classified(api, films) -> str:
    """A dataset of the films with their classes."""
    rows = zip(films, CLASSES, SPLITS, strict=True)
    return made(api, [{"volume_id": id, "classes": known, "split": s} for id, known, s in rows])


@pytest.fixture(scope="module")
def unknown(api, films) -> str:
    """The films, of which nothing is known."""
    rows = zip(films, SPLITS, strict=True)
    return made(api, [{"volume_id": id, "split": split} for id, split in rows])


@pytest.fixture(scope="module")
def scanned(api, scans) -> str:
    """Volumes with classes, two of each, and two that test."""
    items = []
    for n, split in enumerate(("train",) * 4 + ("test",) * 2):
        sent = api.upload(scans.nifti, kind="image", subject=f"classified-{n}").json()["id"]
        items.append({"volume_id": sent, "classes": {"nodule": n % 2}, "split": split})
    return made(api, items)


def run(dataset: str, recipe: dict, **more) -> dict:
    kind = "pretrain" if recipe["kind"] == "pretrain" else "finetune"
    name = {"pretrain": "film-encoder", "finetune": "film-masks", "classify": "film-findings"}
    body = {"kind": kind, "dataset_id": dataset, "recipe": recipe}
    return {**body, "model_name": name[recipe["kind"]], **more}


def experiment(source: str, target: str, **more) -> dict:
    return {
        "name": "Films",
        "source_dataset_id": source,
        "target_dataset_id": target,
        "methods": [{"name": "pcrl", "pretrain": PRETRAIN}, {"name": "scratch"}],
        "finetune": CLASSIFY,
        "ratios": [1.0],
        "seeds": [0],
        **more,
    }


def refused(api, path: str, body: dict) -> dict:
    before = api.counts()
    answer = api("POST", path, json=body)
    assert answer.status_code == 422, answer.text
    assert api.counts() == before
    return answer.json()


def test_a_dataset_keeps_the_classes_that_are_known(api, classified):
    items = api("GET", f"/datasets/{classified}").json()["items"]

    known = [{name: v for name, v in row.items() if v is not None} for row in CLASSES]
    assert [item["classes"] for item in items] == known
    assert [item["split"] for item in items] == list(SPLITS)


def test_the_digest_of_a_dataset_tells_its_classes(api, films, classified, unknown):
    one, other = ({"volume_id": films[0], "classes": {"nodule": value}} for value in (0, 1))
    digests = [api("GET", f"/datasets/{made(api, [item])}").json()["digest"]
               for item in (one, other, one)]  # fmt: skip

    assert digests[0] == digests[2] != digests[1]
    assert len({api("GET", f"/datasets/{id}").json()["digest"] for id in (classified, unknown)}) > 1


@pytest.mark.parametrize("value", [2, -1, "1", 0.5, [1]])
def test_a_class_is_known_or_not_and_nothing_between(api, films, value):
    body = {"name": "Bad", "items": [{"volume_id": films[0], "classes": {"nodule": value}}]}

    assert refused(api, "/datasets", body)["code"] == "invalid_request"


def test_volumes_and_films_are_in_no_dataset_together(api, world, films):
    for first, second in ((world.image, films[0]), (films[0], world.image)):
        body = {"name": "Mixed", "items": [{"volume_id": first}, {"volume_id": second}]}

        problem = refused(api, "/datasets", body)

        assert (problem["code"], problem["volume_id"]) == ("wrong_volume_kind", second)


def test_a_film_has_no_label_volume(api, world, films):
    body = {"name": "Bad", "items": [{"volume_id": films[0], "labels_id": world.labels}]}

    assert refused(api, "/datasets", body)["code"] == "label_shape_mismatch"


def test_patients_with_a_finding_are_split_apart_from_the_others(api, scans):
    sent = [api.upload(film(n), kind="image_2d", subject=f"apart-{n}") for n in range(20, 40)]
    items = [
        {"volume_id": answer.json()["id"], "classes": {"nodule": int(n < 4)}}
        for n, answer in enumerate(sent)
    ]
    body = {"name": "Drawn", "items": items, "split": {"train": 0.5, "val": 0.25, "test": 0.25}}

    drawn = api("POST", "/datasets", json=body).json()["items"]

    with_it = [item["split"] for item in drawn if item["classes"]["nodule"]]
    assert sorted(with_it) == ["test", "train", "train", "val"]


@pytest.mark.parametrize("recipe", [PRETRAIN, CLASSIFY], ids=["pretrain", "classify"])
def test_trainings_on_films_are_queued_with_every_default(api, classified, recipe):
    answer = api("POST", "/runs", json=run(classified, recipe))

    assert answer.status_code == 202, answer.text
    queued = answer.json()
    assert queued["kind"] == ("pretrain" if recipe is PRETRAIN else "finetune")
    assert queued["recipe"]["kind"] == recipe["kind"]
    assert queued["recipe"]["network"] == {**NET_2D, "in_channels": 3}
    assert queued["recipe"]["preprocessing"]["size"] == 224


def test_volumes_are_classified_whole(api, scanned):
    answer = api("POST", "/runs", json=run(scanned, CLASSIFY_3D))
    assert answer.status_code == 202, answer.text
    assert answer.json()["recipe"]["network"]["kind"] == "unet3d"

    problem = refused(api, "/runs", run(scanned, {**CLASSIFY_3D, "crop": "centre"}))

    assert problem["code"] == "invalid_request"
    assert "whole" in problem["errors"][0]["message"]


@pytest.mark.parametrize(
    ("recipe", "on_films"),
    [
        ({"kind": "pretrain"}, True),
        ({"kind": "finetune", "labels": {"liver": 1}}, True),
        (CLASSIFY_3D, True),
        (PRETRAIN, False),
        ({**CLASSIFY, "labels": ["nodule"]}, False),
    ],
    ids=["pretrain 3D", "segment", "classify 3D", "pretrain 2D", "classify 2D"],
)
def test_a_recipe_is_refused_scans_that_its_network_does_not_read(
    api, classified, scanned, recipe, on_films
):
    dataset = classified if on_films else scanned
    first = api("GET", f"/datasets/{dataset}").json()["items"][0]["volume_id"]

    problem = refused(api, "/runs", run(dataset, recipe))

    assert (problem["code"], problem["volume_id"]) == ("wrong_volume_kind", first)
    assert problem["found"] == ("image_2d" if on_films else "image")


def test_classification_needs_scans_with_and_without_each_label(api, classified, unknown):
    one_sided = {**CLASSIFY, "labels": ["nodule", "mass"]}

    for dataset, recipe, label in ((unknown, CLASSIFY, "nodule"), (classified, one_sided, "mass")):
        problem = refused(api, "/runs", run(dataset, recipe))
        assert problem["code"] == "dataset_without_labels"
        assert label in problem["detail"]
    assert api("POST", "/runs", json=run(unknown, PRETRAIN)).status_code == 202  # the control


ONE_OF = {**CLASSIFY, "labels": ["nodule", "effusion"], "exclusive": True}


@pytest.mark.parametrize(
    ("changed", "recipe", "says"),
    [
        ({2: {"effusion": 0}}, CLASSIFY, "nodule needs 2 scans"),
        ({5: {"nodule": 1}}, CLASSIFY, "the val split, which judges"),
        ({}, ONE_OF, "of exclusive labels one must be 1"),
    ],
    ids=["one scan with it", "one class judges", "not exclusive"],
)
def test_a_classification_that_could_only_fail_is_refused(api, films, changed, recipe, says):
    rows = enumerate(zip(films, CLASSES, SPLITS, strict=True))
    items = [
        {"volume_id": id, "classes": changed.get(n, known), "split": split}
        for n, (id, known, split) in rows
    ]

    problem = refused(api, "/runs", run(made(api, items), recipe))

    assert problem["code"] == "dataset_without_labels"
    assert says in problem["detail"]


def test_an_experiment_whose_test_has_one_class_is_refused(api, films, unknown):
    rows = enumerate(zip(films, CLASSES, SPLITS, strict=True))
    items = [
        {"volume_id": id, "classes": {"nodule": 1} if n == 6 else known, "split": split}
        for n, (id, known, split) in rows
    ]
    target = made(api, items)

    problem = refused(api, "/experiments", experiment(unknown, target))

    assert "the test split, which judges" in problem["detail"]
    assert api("POST", "/runs", json=run(target, CLASSIFY)).status_code == 202  # the control


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({**PRETRAIN, "method": {"name": "imagenet"}}, "from a file"),
        ({**CLASSIFY, "channels": ["pa", "lateral"]}, ""),
        ({"kind": "finetune", "network": NET_2D, "labels": {"lung": 1}}, "unet3d"),
    ],
    ids=["imagenet", "two channels", "segment 2D"],
)
def test_what_the_service_does_not_train_is_refused_with_why(api, classified, recipe, says):
    problem = refused(api, "/runs", run(classified, recipe))

    assert problem["code"] == "invalid_request"
    assert says in str(problem["errors"])


def test_a_recipes_kind_is_that_of_its_run(api, classified):
    for kind, recipe in (("pretrain", CLASSIFY), ("finetune", PRETRAIN)):
        problem = refused(api, "/runs", run(classified, recipe, kind=kind))
        assert problem["code"] == "invalid_request"
    unnamed = {name: value for name, value in PRETRAIN.items() if name != "kind"}
    body = {**run(classified, PRETRAIN), "recipe": unnamed}
    assert api("POST", "/runs", json=body).json()["recipe"]["kind"] == "pretrain"


def test_a_name_belongs_to_models_of_one_kind(api, classified, world):
    problem = refused(api, "/runs", run(classified, CLASSIFY, model_name="segmenter"))

    assert problem["code"] == "wrong_model_kind"
    assert "classifier" in problem["detail"]


@pytest.fixture(scope="module")
def encoder(api, new_model) -> str:
    """An encoder of 2D images."""
    new_model(api, "film-embedder", "encoder", is_2d=True)
    return "models:/film-embedder/1"


def test_an_encoder_of_films_embeds_films_and_no_volumes(api, films, world, encoder):
    queued = api("POST", "/embeddings", json={"volume_id": films[0], "model": encoder})
    assert queued.status_code == 202, queued.text

    of_volume = refused(api, "/embeddings", {"volume_id": world.image, "model": encoder})
    of_labels = refused(api, "/embeddings", {"volume_id": world.labels, "model": encoder})
    regions = {"volume_id": films[0], "model": encoder, "segmenter": world.segmenter}

    assert (of_volume["code"], of_labels["code"]) == ("wrong_model_kind", "wrong_volume_kind")
    assert refused(api, "/embeddings", regions)["code"] == "no_feature_map"


def test_a_batch_embeds_films_by_their_encoder_alone(api, films, classified, world, encoder):
    body = {"dataset_id": classified, "kind": "embed", "model": encoder}
    queued = api("POST", "/batches", json=body)
    assert queued.status_code == 202, queued.text
    assert queued.json()["num_scans"] == len(films)

    problem = refused(api, "/batches", {**body, "dataset_id": world.unlabelled})

    assert (problem["code"], problem["volume_id"]) == ("wrong_volume_kind", world.image)


def test_golden_cases_of_an_encoder_of_films_are_films(api, films, world, encoder):
    def put(case: str, volume_id: str):
        body = {"volume_id": volume_id, "vector": [1.0, 0.0], "min_cosine": 0.9}
        return api("PUT", f"/models/film-embedder/golden/{case}", json=body)

    of_film, of_volume = put("film", films[0]), put("volume", world.image)

    assert of_film.status_code == 201, of_film.text
    assert (of_volume.status_code, of_volume.json()["code"]) == (422, "wrong_volume_kind")
    assert api("DELETE", "/models/film-embedder/golden/film").status_code == 204


def test_films_that_are_not_embedded_cannot_be_searched_by(api, films, world, encoder):
    for volume_id, status, code in (
        (films[3], 409, "not_embedded"),
        (world.labels, 422, "wrong_volume_kind"),
    ):
        body = {"volume_id": volume_id, "model": encoder}
        answer = api("POST", "/embeddings:search", json=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize("kind", ["segment", "embed"])
def test_no_batch_of_a_model_of_volumes_is_made_of_films(api, classified, world, kind):
    model = {"segment": world.segmenter, "embed": world.encoder}[kind]
    body = {"dataset_id": classified, "kind": kind, "model": model}

    assert refused(api, "/batches", body)["code"] == "wrong_volume_kind"
    control = api("POST", "/batches", json={**body, "dataset_id": world.unlabelled})
    assert control.status_code == 202, control.text


def test_an_experiment_on_films_is_planned(api, classified, unknown):
    answer = api("POST", "/experiments", json=experiment(unknown, classified))

    assert answer.status_code == 202, answer.text
    where = f"/experiments/{answer.json()['id']}"
    trainings = api("GET", f"{where}/trainings").json()["items"]
    assert [(one["key"], one["state"]) for one in trainings] == [
        ("pretrain/pcrl/0", "queued"),
        ("finetune/pcrl/100%/0", "waiting"),
        ("finetune/scratch/100%/0", "queued"),
    ]
    recipes = [api("GET", f"/runs/{trainings[at]['run_id']}").json()["recipe"] for at in (0, 2)]
    assert [recipe["kind"] for recipe in recipes] == ["pretrain", "classify"]
    assert {recipe["network"]["kind"] for recipe in recipes} == {"resnet18_unet2d"}
    api("POST", f"{where}:cancel")


def test_an_experiment_is_refused_scans_that_its_recipes_do_not_read(api, classified, scanned):
    for source, target in ((scanned, classified), (classified, scanned)):
        problem = refused(api, "/experiments", experiment(source, target))
        assert problem["code"] == "wrong_volume_kind"


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"finetune": {**CLASSIFY, "labels": ["effusion"]}}, "dataset_without_labels"),
        ({"finetune": CLASSIFY_3D}, "invalid_request"),
        ({"finetune": {**CLASSIFY_3D, "crop": "centre"}, "methods": [{"name": "a"}]},
         "invalid_request"),
        ({"methods": [{"name": "a", "pretrain": {**PRETRAIN, "method": {"name": "imagenet"}}}]},
         "invalid_request"),
    ],
    ids=["untested label", "another network", "places", "imagenet"],
)  # fmt: skip
def test_an_experiment_that_could_only_fail_is_refused(api, classified, unknown, more, code):
    assert refused(api, "/experiments", experiment(unknown, classified, **more))["code"] == code
