"""S2: whatever is another project's is not there, on every route of the OpenAPI document.

Each route that names something is asked with the token of another project's admin (404), then with
the owner's own (anything else): the second is the control, without which a wrong id would pass.
"""

import uuid
from pathlib import Path

import pytest

from service import auth, db, routers, schemas
from service.auth import Role
from service.db import scope

ROUTERS = Path(routers.__file__).parent
MODEL = "authz-encoder"
SHA = "3" * 64
RECIPE = {"network": {"base_width": 8}}
PLAN = {
    "name": "Liver",
    "methods": [{"name": "scratch"}],
    "finetune": {"kind": "finetune", "network": {"base_width": 2}, "labels": {"liver": 1}},
    "ratios": [1.0],
    "seeds": [0],
}

# What each operation is asked; {names} stand for the owner's things, in paths and in bodies.
HIDDEN = {
    ("GET", "/volumes/{volume_id}"): {},
    ("GET", "/volumes/{volume_id}/file"): {},
    ("DELETE", "/volumes/{volume_id}"): {},
    ("POST", "/datasets"): {"json": {"name": "d", "items": [{"volume_id": "{volume_id}"}]}},
    ("GET", "/datasets/{dataset_id}"): {},
    ("DELETE", "/datasets/{dataset_id}"): {},
    ("POST", "/runs"): {
        "json": {
            "kind": "pretrain",
            "dataset_id": "{dataset_id}",
            "model_name": "authz-made",
            "recipe": RECIPE,
        }
    },
    ("GET", "/runs/{run_id}"): {},
    ("GET", "/runs/{run_id}/metrics"): {},
    ("GET", "/runs/{run_id}/files"): {},
    ("GET", "/runs/{run_id}/files/{file_name}"): {},
    ("GET", "/runs/{run_id}/events"): {"params": {"after": 0}},
    ("POST", "/runs/{run_id}:cancel"): {},
    ("POST", "/segmentations"): {"json": {"volume_id": "{volume_id}", "model": "segmenter"}},
    ("GET", "/segmentations/{segmentation_id}"): {},
    ("GET", "/segmentations/{segmentation_id}/mask"): {},
    ("GET", "/segmentations/{segmentation_id}/preview"): {},
    ("GET", "/segmentations/{segmentation_id}/uncertainty"): {},
    ("POST", "/segmentations/{segmentation_id}:cancel"): {},
    ("POST", "/embeddings"): {"json": {"volume_id": "{volume_id}", "model": "{name}"}},
    ("GET", "/embeddings/{embedding_id}"): {},
    ("POST", "/embeddings/{embedding_id}:cancel"): {},
    ("POST", "/embeddings:search"): {"json": {"volume_id": "{volume_id}", "model": "{name}"}},
    ("POST", "/batches"): {
        "json": {"dataset_id": "{dataset_id}", "model": "segmenter", "kind": "segment"}
    },
    ("GET", "/batches/{batch_id}"): {},
    ("GET", "/batches/{batch_id}/items"): {},
    ("GET", "/batches/{batch_id}/table"): {},
    ("POST", "/batches/{batch_id}:cancel"): {},
    ("POST", "/batches/{batch_id}:retry"): {},
    ("POST", "/experiments"): {
        "json": {
            "source_dataset_id": "{dataset_id}",
            "target_dataset_id": "{dataset_id}",
            **PLAN,
        }
    },
    ("GET", "/experiments/{experiment_id}"): {},
    ("GET", "/experiments/{experiment_id}/trainings"): {},
    ("GET", "/experiments/{experiment_id}/report"): {},
    ("GET", "/experiments/{experiment_id}/events"): {"params": {"after": 0}},
    ("POST", "/experiments/{experiment_id}:extend"): {"json": {"seeds": [1]}},
    ("POST", "/experiments/{experiment_id}:cancel"): {},
    ("GET", "/models/{name}"): {},
    ("GET", "/models/{name}/versions/{version}"): {},
    ("GET", "/models/{name}/versions/{version}/bundle"): {},
    ("GET", "/models:resolve"): {"params": {"ref": "{name}@{alias}"}},
    ("POST", "/models/{name}/versions:cascade"): {"json": {"fine": "segmenter", "organ": "spleen"}},
    ("GET", "/models/{name}/golden"): {},
    ("PUT", "/models/{name}/golden/{case}"): {
        "json": {"volume_id": "{volume_id}", "vector": [1.0]}
    },
    ("POST", "/models/{name}/versions/{version}:check"): {},
    ("GET", "/models/{name}/versions/{version}/checks"): {},
    ("PUT", "/models/{name}/aliases/{alias}"): {"json": {"version": 1}},
    ("GET", "/models/{name}/aliases/{alias}"): {},
    ("GET", "/models/{name}/aliases/{alias}/history"): {},
    ("POST", "/models/{name}/aliases/{alias}:rollback"): {"headers": {"If-Match": '"9"'}},
    ("GET", "/projects/{project_id}"): {},
    ("GET", "/uploads/{upload_id}"): {},
    ("PUT", "/uploads/{upload_id}"): {
        "content": b"1",
        "headers": {
            "Content-Type": "application/octet-stream",
            "Content-Range": "bytes 0-0/2",
            "Content-Digest": "sha-256=:a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s=:",
        },
    },
    ("POST", "/uploads/{upload_id}:complete"): {},
    # Last: what they remove was looked at before.
    ("DELETE", "/uploads/{upload_id}"): {},
    ("DELETE", "/models/{name}/golden/{case}"): {},
    ("DELETE", "/models/{name}/aliases/{alias}"): {},
}
LISTS = (
    "volumes",
    "datasets",
    "runs",
    "models",
    "segmentations",
    "embeddings",
    "batches",
    "experiments",
)
# They name nothing that is there: what they make is the caller's own project's.
MAKES = {
    ("POST", "/volumes"),
    ("POST", "/uploads"),
    ("POST", "/models:import"),
}
ELSEWHERE = {  # tests below
    ("GET", "/capabilities"),
    ("GET", "/projects"),
    ("POST", "/projects"),
    ("PATCH", "/projects/{project_id}"),
}
OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics")}  # sums over all projects


@pytest.fixture(scope="module")
def foreign(api):
    """The token of another project's admin, by the name of a role of `api`."""
    name = f"authz-{uuid.uuid4().hex[:8]}"
    made = api("POST", "/projects", json={"name": name})
    assert made.status_code == 201, made.text
    with api.sessions() as session:
        row, token = auth.create_token(session, "foreign", Role.ADMIN, project_id=made.json()["id"])
        session.commit()
    api.tokens["foreign"] = token
    yield made.json() | {"token_id": row.id}
    del api.tokens["foreign"]


@pytest.fixture(scope="module")
def owned(api, world, new_model):
    """One of each, in the default project."""
    new_model(api, MODEL, "encoder")

    def made(path, **body):
        response = api("POST", path, json=body)
        assert response.status_code in {201, 202}, response.text
        return response.json()["id"]

    def put(path, **body):
        response = api("PUT", path, json=body)
        assert response.status_code in {200, 201}, response.text

    put(f"/models/{MODEL}/aliases/champion", version=1)
    put(f"/models/{MODEL}/golden/case-1", volume_id=world.image, vector=[1.0])
    asked = {"source_dataset_id": world.labelled, "target_dataset_id": world.labelled, **PLAN}
    experiment = db.Experiment(
        id=db.new_id("exp"),
        plan=schemas.ExperimentCreate.model_validate(asked).plan().model_dump(mode="json"),
        created_by="t",
        **{key: asked[key] for key in ("name", "source_dataset_id", "target_dataset_id")},
    )
    experiment_id = experiment.id
    with api.sessions() as session:
        session.add(experiment)
        session.commit()
    training = {"kind": "pretrain", "dataset_id": world.labelled, "model_name": "authz-made"}
    run_id = made("/runs", **training, recipe=RECIPE)
    with api.store.receive() as writer:
        writer.write(b"{}")
        sha256, size = api.store.commit_blob(writer)
    with api.sessions() as session:
        db.insert_if_absent(session, db.Blob, sha256=sha256, size_bytes=size)
        file = {"name": "cases.json", "sha256": sha256, "media_type": "application/json"}
        session.add(db.Artifact(run_id=run_id, fence=0, **file))
        session.commit()
    return {
        "volume_id": world.image,
        "dataset_id": world.labelled,
        "run_id": run_id,
        "segmentation_id": made("/segmentations", volume_id=world.image, model="segmenter"),
        "embedding_id": made("/embeddings", volume_id=world.image, model=MODEL),
        "batch_id": made("/batches", dataset_id=world.labelled, model="segmenter", kind="segment"),
        "experiment_id": experiment_id,
        "upload_id": made("/uploads", size_bytes=2, sha256=SHA),
        "name": MODEL,
        "version": 1,
        "alias": "champion",
        "case": "case-1",
        "file_name": "cases.json",
        "project_id": "prj_default",
    }


def filled(how, owned):
    if isinstance(how, dict):
        return {key: filled(value, owned) for key, value in how.items()}
    if isinstance(how, list):
        return [filled(one, owned) for one in how]
    return how.format(**owned) if isinstance(how, str) else how


def test_every_route_is_in_one_of_the_tables(api):
    paths = api.app.openapi()["paths"]
    served = {
        (method.upper(), path.removeprefix("/api/v1"))
        for path, operations in paths.items()
        for method in operations
    }
    lists = {("GET", f"/{name}") for name in LISTS}

    assert served == {*HIDDEN, *lists, *MAKES, *ELSEWHERE, *OPEN}


@pytest.mark.parametrize(("method", "path"), HIDDEN)
def test_what_is_another_projects_is_not_there(api, owned, foreign, method, path):
    how = filled(HIDDEN[method, path], owned)
    url = path.format(**owned)

    hidden = api(method, url, role="foreign", **how)
    own = api(method, url, **how)

    assert (hidden.status_code, hidden.json()["code"]) == (404, "not_found")
    assert own.status_code not in {403, 404}, own.text


@pytest.mark.parametrize("name", LISTS)
def test_a_list_holds_the_projects_own(api, owned, foreign, name):
    assert api("GET", f"/{name}", role="foreign").json()["items"] == []
    assert api("GET", f"/{name}").json()["items"] != []


def test_the_matrix_would_see_a_router_that_forgets_the_project(api, owned, foreign, monkeypatch):
    """The negative control: without what `service.db.scope` adds and refuses, all is shown."""
    monkeypatch.setattr(scope, "_criteria", lambda project_id: ())
    asked = [("GET", f"/volumes/{owned['volume_id']}"), ("GET", f"/models/{MODEL}")]

    refused = [api(*one, role="foreign").status_code for one in asked]
    monkeypatch.setattr(scope, "_unscoped", lambda statement: ())
    shown = [api(*one, role="foreign").status_code for one in asked]

    assert refused == [500, 500]
    assert shown == [200, 200]


def test_no_router_has_sessions_of_all_projects_but_where_nothing_is_shown():
    """What goes around `service.db.scope`, by the files that may say it."""
    around = {
        "EverySession": {"deps.py", "health.py"},
        "app.state.sessions": {"deps.py", "health.py"},
        "everywhere": set(),
        ".connection(": set(),
        "of_project(": {"deps.py"},
    }
    texts = {path.name: path.read_text() for path in ROUTERS.glob("*.py")}

    for words, may in around.items():
        assert {name for name, text in texts.items() if words in text} <= may, words
    assert "EverySession" in texts["health.py"]  # the control


def test_the_same_file_is_a_volume_of_its_own_in_each_project(api, world, scans, foreign):
    """That another project holds it does not show, and removing one leaves the other whole."""
    headers = {"Content-Type": "application/octet-stream"}
    asked = {"params": {"kind": "image", "subject": "subject-1"}, "headers": headers}

    sent = api("POST", "/volumes", role="foreign", content=scans.nifti, **asked)
    again = api("POST", "/volumes", role="foreign", content=scans.nifti, **asked)
    begun = api("POST", "/uploads", role="foreign", json={"size_bytes": 2, "sha256": SHA})

    assert (sent.status_code, again.status_code) == (201, 200)
    assert sent.json()["id"] == again.json()["id"] != world.image
    assert begun.status_code == 201  # the owner's upload of the same bytes is not found again
    gone = api("DELETE", f"/volumes/{sent.json()['id']}", role="foreign")
    assert gone.status_code == 204
    assert api("GET", f"/volumes/{world.image}/file").status_code == 200


def test_an_admin_of_all_acts_in_the_project_that_the_header_names(api, world, foreign):
    there = {"PCRL-Project": foreign["name"]}

    assert api("GET", f"/volumes/{world.image}").status_code == 200
    assert api("GET", f"/volumes/{world.image}", headers=there).status_code == 404
    assert api("GET", "/capabilities", headers=there).json()["project"] == foreign["id"]
    assert api("GET", "/capabilities", role="foreign").json()["project"] == foreign["id"]
    elsewhere = {"PCRL-Project": "default"}
    assert api("GET", "/volumes", role="foreign", headers=elsewhere).status_code == 404
    assert api("GET", "/volumes", headers={"PCRL-Project": "absent"}).status_code == 404


def test_an_idempotency_key_is_one_projects(api, world, foreign):
    key = {"Idempotency-Key": uuid.uuid4().hex}
    asked = {"size_bytes": 5, "sha256": "4" * 64}
    there = key | {"PCRL-Project": foreign["id"]}

    assert api("POST", "/uploads", json=asked, headers=key).status_code == 201
    assert api("POST", "/uploads", json=asked, headers=there).json()["code"] == (
        "idempotency_mismatch"
    )


def test_projects_are_made_and_limited_by_an_admin_of_all_alone(api, foreign):
    name = f"made-{uuid.uuid4().hex[:8]}"
    made = api("POST", "/projects", json={"name": name, "max_running": 2}).json()
    path = f"/projects/{made['id']}"

    taken = api("POST", "/projects", json={"name": name})
    changed = api("PATCH", path, json={"max_running": None, "max_queued": 7}).json()
    bad = api("POST", "/projects", json={"name": "prj_x"})

    assert (taken.status_code, taken.json()["code"]) == (409, "name_taken")
    assert api("PATCH", path, json={"name": "default"}).json()["code"] == "name_taken"
    assert (changed["name"], changed["max_running"], changed["max_queued"]) == (name, None, 7)
    assert (bad.status_code, bad.json()["code"]) == (422, "invalid_request")
    assert api("GET", path).json() == changed
    for role in ("foreign", "researcher"):
        assert api("POST", "/projects", role=role, json={"name": "mine"}).status_code == 403
        assert api("PATCH", path, role=role, json={"max_queued": 0}).status_code == 403
        assert api("GET", path, role=role).status_code == 404


def test_a_token_lists_its_own_project_and_an_admins_of_all_every_one(api, foreign):
    def names(**how):
        return [one["name"] for one in api("GET", "/projects", **how).json()["items"]]

    assert names(role="foreign") == [foreign["name"]]
    assert names(role="viewer") == ["default"]
    assert {"default", foreign["name"]} <= set(names())
    first = api("GET", "/projects", params={"page_size": 1}).json()
    assert len(first["items"]) == 1
    assert first["next_page_token"]
