"""Who may do what: every operation, without a token and with each role (S1, S2)."""

import pytest

HEX = "0" * 32
OPEN = {("GET", "/healthz"), ("GET", "/readyz")}
ELSEWHERE = {("GET", "/metrics")}  # test_api_operation
RUN = {"kind": "pretrain", "dataset_id": f"ds_{HEX}", "model_name": "m", "recipe": {}}
ASK = {"volume_id": f"vol_{HEX}", "model": "m"}
DATASET = {"name": "d", "items": [{"volume_id": f"vol_{HEX}"}]}

CASCADE = {"fine": "absent", "organ": "liver"}
BATCH = {"dataset_id": f"ds_{HEX}", "model": "absent", "kind": "segment"}
MATRIX: dict[tuple[str, str], tuple[str, dict[str, object]]] = {
    ("GET", "/capabilities"): ("viewer", {}),
    ("GET", "/projects"): ("viewer", {}),
    ("POST", "/projects"): ("admin", {"json": {"name": "authz"}}),
    ("GET", "/projects/{project_id}"): ("viewer", {}),
    ("PATCH", "/projects/{project_id}"): ("admin", {"json": {}}),
    ("GET", "/volumes"): ("viewer", {}),
    ("POST", "/volumes"): ("annotator", {"content": b""}),
    ("GET", "/volumes/{volume_id}"): ("viewer", {}),
    ("GET", "/volumes/{volume_id}/file"): ("viewer", {}),
    ("DELETE", "/volumes/{volume_id}"): ("researcher", {}),
    ("POST", "/uploads"): ("annotator", {"json": {"size_bytes": 1, "sha256": "0" * 64}}),
    ("GET", "/uploads/{upload_id}"): ("viewer", {}),
    ("PUT", "/uploads/{upload_id}"): ("annotator", {"content": b""}),
    ("POST", "/uploads/{upload_id}:complete"): ("annotator", {}),
    ("DELETE", "/uploads/{upload_id}"): ("annotator", {}),
    ("GET", "/datasets"): ("viewer", {}),
    ("POST", "/datasets"): ("researcher", {"json": DATASET}),
    ("GET", "/datasets/{dataset_id}"): ("viewer", {}),
    ("DELETE", "/datasets/{dataset_id}"): ("researcher", {}),
    ("GET", "/runs"): ("viewer", {}),
    ("POST", "/runs"): ("researcher", {"json": RUN}),
    ("GET", "/runs/{run_id}"): ("viewer", {}),
    ("GET", "/runs/{run_id}/metrics"): ("viewer", {}),
    ("GET", "/runs/{run_id}/files"): ("viewer", {}),
    ("GET", "/runs/{run_id}/files/{file_name}"): ("viewer", {}),
    ("GET", "/runs/{run_id}/events"): ("viewer", {}),
    ("POST", "/runs/{run_id}:cancel"): ("researcher", {}),
    ("GET", "/models"): ("viewer", {}),
    ("GET", "/models/{name}"): ("viewer", {}),
    ("GET", "/models/{name}/versions/{version}"): ("viewer", {}),
    ("GET", "/models/{name}/versions/{version}/bundle"): ("viewer", {}),
    ("POST", "/models/{name}/versions:cascade"): ("researcher", {"json": CASCADE}),
    ("GET", "/models/{name}/aliases/{alias}"): ("viewer", {}),
    ("PUT", "/models/{name}/aliases/{alias}"): ("researcher", {"json": {"version": 1}}),
    ("DELETE", "/models/{name}/aliases/{alias}"): ("researcher", {}),
    ("GET", "/models/{name}/aliases/{alias}/history"): ("viewer", {}),
    ("POST", "/models/{name}/aliases/{alias}:rollback"): ("researcher", {}),
    ("GET", "/models/{name}/golden"): ("viewer", {}),
    ("PUT", "/models/{name}/golden/{case}"): ("researcher", {"json": {}}),
    ("DELETE", "/models/{name}/golden/{case}"): ("researcher", {}),
    ("POST", "/models/{name}/versions/{version}:check"): ("researcher", {}),
    ("GET", "/models/{name}/versions/{version}/checks"): ("viewer", {}),
    ("GET", "/models:resolve"): ("viewer", {}),
    ("POST", "/models:import"): ("researcher", {"content": b""}),
    ("POST", "/batches"): ("annotator", {"json": BATCH}),
    ("GET", "/batches"): ("viewer", {}),
    ("GET", "/batches/{batch_id}"): ("viewer", {}),
    ("GET", "/batches/{batch_id}/items"): ("viewer", {}),
    ("GET", "/batches/{batch_id}/table"): ("viewer", {}),
    ("POST", "/batches/{batch_id}:cancel"): ("annotator", {}),
    ("POST", "/batches/{batch_id}:retry"): ("annotator", {}),
    ("POST", "/experiments"): ("researcher", {"json": {}}),
    ("GET", "/experiments"): ("viewer", {}),
    ("GET", "/experiments/{experiment_id}"): ("viewer", {}),
    ("GET", "/experiments/{experiment_id}/trainings"): ("viewer", {}),
    ("GET", "/experiments/{experiment_id}/report"): ("viewer", {}),
    ("GET", "/experiments/{experiment_id}/events"): ("viewer", {}),
    ("POST", "/experiments/{experiment_id}:extend"): ("researcher", {"json": {}}),
    ("POST", "/experiments/{experiment_id}:cancel"): ("researcher", {}),
    ("GET", "/segmentations"): ("viewer", {}),
    ("POST", "/segmentations"): ("annotator", {"json": ASK}),
    ("GET", "/segmentations/{segmentation_id}"): ("viewer", {}),
    ("GET", "/segmentations/{segmentation_id}/mask"): ("viewer", {}),
    ("GET", "/segmentations/{segmentation_id}/preview"): ("viewer", {}),
    ("GET", "/segmentations/{segmentation_id}/uncertainty"): ("viewer", {}),
    ("POST", "/segmentations/{segmentation_id}:cancel"): ("annotator", {}),
    ("GET", "/embeddings"): ("viewer", {}),
    ("POST", "/embeddings"): ("annotator", {"json": ASK}),
    ("GET", "/embeddings/{embedding_id}"): ("viewer", {}),
    ("POST", "/embeddings/{embedding_id}:cancel"): ("annotator", {}),
    ("POST", "/embeddings:search"): ("viewer", {"json": ASK}),
}
ROLES = ("viewer", "annotator", "researcher", "admin")
IDS = {
    "project_id": "prj_default",
    "volume_id": f"vol_{HEX}",
    "upload_id": f"upl_{HEX}",
    "dataset_id": f"ds_{HEX}",
    "run_id": f"run_{HEX}",
    "segmentation_id": f"seg_{HEX}",
    "embedding_id": f"emb_{HEX}",
    "batch_id": f"bat_{HEX}",
    "experiment_id": f"exp_{HEX}",
    "case": "case-1",
    "file_name": "cases.json",
    "name": "absent",
    "version": 1,
    "alias": "champion",
}


def test_every_operation_is_in_the_table(api):
    paths = api.app.openapi()["paths"]
    served = {
        (method.upper(), path.removeprefix("/api/v1"))
        for path, operations in paths.items()
        for method in operations
    }

    assert served == set(MATRIX) | OPEN | ELSEWHERE


@pytest.mark.parametrize(("method", "path"), MATRIX)
def test_without_a_token_the_answer_is_401(api, method, path):
    _, how = MATRIX[method, path]

    response = api(method, path.format(**IDS), role=None, **how)

    assert (response.status_code, response.json()["code"]) == (401, "not_authenticated")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), MATRIX)
def test_a_role_gets_403_below_what_is_needed_and_no_403_from_there_on(api, method, path):
    needed, how = MATRIX[method, path]

    got = {role: api(method, path.format(**IDS), role=role, **how).status_code for role in ROLES}

    refused = {role for role, status in got.items() if status == 403}
    assert refused == set(ROLES[: ROLES.index(needed)])
    assert 401 not in got.values()


@pytest.mark.parametrize("token", ["", "pcrl_000000000000_" + "x" * 43, "\x00", "a b"])
def test_a_wrong_token_is_401(api, token):
    response = api("GET", "/volumes", role=None, headers={"Authorization": f"Bearer {token}"})

    assert response.status_code == 401


def test_health_needs_no_token(api):
    assert api("GET", "/healthz", role=None).json() == {"status": "ok"}
    assert api("GET", "/readyz", role=None).status_code in {200, 503}


def test_readiness_names_what_is_missing(api):
    response = api("GET", "/readyz", role=None)

    checks = {check["check"]: check["result"] for check in response.json()["checks"]}
    assert response.status_code == 503  # no worker runs in these tests
    assert checks == {
        "database": "ok",
        "storage": "ok",
        "disk": "ok",
        "broker": "ok",
        "worker:inference": "failed",
        "worker:train": "failed",
        "queue:inference": "ok",
        "queue:train": "ok",
    }


def test_capabilities_tell_the_role_and_the_limits(api):
    body = api("GET", "/capabilities", role="viewer").json()

    assert body["role"] == "viewer"
    assert body["max_upload_bytes"] == api.settings.max_upload_bytes
