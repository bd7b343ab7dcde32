"""The gate before an alias, golden cases, rollback, and what was live when."""

import io
import zipfile
from datetime import UTC, datetime

import pytest

from service import db

FAILED = {"code": "gate_failed", "status": 409}


def alias(api, name, version, **how):
    path = f"/models/{name}/aliases/champion"
    return api("PUT", path, json={"version": version, **how.pop("body", {})}, **how)


def test_a_version_without_parity_is_not_live_until_an_admin_says_why(api, new_model):
    new_model(api, "gated", "segmenter", parity=())

    refused = alias(api, "gated", 1)
    why = {"body": {"override_reason": "an emergency, by hand"}}
    forbidden = alias(api, "gated", 1, role="researcher", **why)
    moved = alias(api, "gated", 1, **why)

    assert refused.json().items() >= FAILED.items()
    checks = {one["name"]: one["passed"] for one in refused.json()["checks"]}
    assert checks == {"parity": False, "card": True, "golden": True}
    assert (forbidden.status_code, moved.status_code) == (403, 200)
    (move,) = api("GET", "/models/gated/aliases/champion/history").json()["items"]
    assert (move["unmet"], move["override_reason"]) == (["parity"], "an emergency, by hand")


def test_golden_cases_hold_a_version_back_until_it_reproduces_them(api, world, new_model):
    new_model(api, "golden", "segmenter")
    case = {"volume_id": world.image, "labels_id": world.labels,
            "labels": [{"name": "liver", "value": 1, "min_dice": 0.9}]}  # fmt: skip
    put = "/models/golden/golden/case-1"
    assert api("POST", "/models/golden/versions/1:check").json()["code"] == "no_golden_cases"
    assert api("PUT", put, json=case).status_code == 201
    unchecked = alias(api, "golden", 1)

    run = api("POST", "/models/golden/versions/1:check").json()
    api.work(run["id"], result={"passed": True, "cases": []})
    checked = alias(api, "golden", 1)
    again = api("PUT", put, json={**case, "labels": [{**case["labels"][0], "min_dice": 0.99}]})
    changed = alias(api, "golden", 1)
    second = api("POST", "/models/golden/versions/1:check").json()
    api.work(second["id"], result={"passed": False, "cases": []})
    missed = alias(api, "golden", 1)

    assert (unchecked.json()["code"], checked.status_code) == ("gate_failed", 200)
    assert (again.status_code, changed.json()["code"]) == (200, "gate_failed")
    assert missed.json()["code"] == "gate_failed"
    found = api("GET", "/models/golden/versions/1/checks").json()["items"]
    assert [(one["passed"], one["is_current"]) for one in found] == [(False, True), (False, False)]
    in_use = api("DELETE", f"/volumes/{world.labels}").json()
    assert in_use["code"] == "volume_in_use" and "1 golden cases" in in_use["detail"]
    assert api("DELETE", put).status_code == 204
    assert alias(api, "golden", 1).status_code == 200


def test_a_case_fits_the_kind_of_its_model(api, world):
    vector = {"volume_id": world.image, "vector": [1.0, 0.0]}

    fine = api("PUT", "/models/encoder/golden/case-1", json=vector)
    wrong = api("PUT", "/models/segmenter/golden/case-1", json=vector)
    both = {**vector, "labels_id": world.labels}

    assert (fine.status_code, wrong.json()["code"]) == (201, "wrong_model_kind")
    assert api("PUT", "/models/encoder/golden/case-2", json=both).status_code == 422
    api("DELETE", "/models/encoder/golden/case-1")


def test_one_call_rolls_back_for_who_saw_the_present_state(api, new_model):
    new_model(api, "rolled", "encoder", base_width=8)
    new_model(api, "rolled", "encoder", base_width=16)
    path = "/models/rolled/aliases/champion"
    assert api("POST", f"{path}:rollback", headers={"If-Match": '"1"'}).status_code in {404, 412}
    alias(api, "rolled", 1)
    before = datetime.now(UTC).isoformat()
    etag = alias(api, "rolled", 2).headers["etag"]

    careless = api("POST", f"{path}:rollback")
    done = api("POST", f"{path}:rollback", headers={"If-Match": etag})
    late = api("POST", f"{path}:rollback", headers={"If-Match": etag})

    assert (careless.status_code, careless.json()["code"]) == (428, "precondition_required")
    assert (done.status_code, done.json()["version"], late.status_code) == (200, 1, 412)
    past = api("GET", path, params={"at": before})
    assert (past.json()["version"], "etag" in past.headers) == (1, False)
    assert api("GET", path, params={"at": "2020-01-01T00:00:00Z"}).status_code == 404
    assert api("GET", path, params={"at": "2020-01-01T00:00:00"}).status_code == 422
    ref = {"ref": "rolled@champion", "at": before}
    assert api("GET", "/models:resolve", params=ref).json()["version"] == 1
    page = api("GET", f"{path}/history?page_size=2").json()
    rest = api("GET", f"{path}/history?page_token={page['next_page_token']}").json()
    assert [one["version"] for one in page["items"] + rest["items"]] == [1, 2, 1]


def test_an_import_is_kept_and_queued_and_no_other_bytes_are(api):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.onnx", b"x")

    made = api("POST", "/models:import?name=elsewhere", content=packed.getvalue())
    refused = api("POST", "/models:import?name=elsewhere", content=b"\x80\x04pickle")

    assert (made.status_code, made.json()["kind"]) == (202, "import")
    assert made.headers["location"].endswith(made.json()["id"])
    assert (refused.status_code, refused.json()["code"]) == (422, "not_an_archive")
    with api.sessions() as session:
        sent = session.get(db.Artifact, (made.json()["id"], "sent"))
        assert api.store.verify(sent.sha256).read_bytes() == packed.getvalue()


def test_an_import_with_a_key_is_one_run_however_often_it_is_sent(api):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.onnx", b"once")
    how = {"content": packed.getvalue(), "headers": {"Idempotency-Key": "import-1"}}

    first = api("POST", "/models:import?name=once", **how)
    again = api("POST", "/models:import?name=once", **how)
    renamed = api("POST", "/models:import?name=twice", **how)
    changed = api("POST", "/models:import?name=once", **{**how, "content": b"PK\x03\x04 other"})
    # The control: without a key the same bytes are another run.
    anew = api("POST", "/models:import?name=once", content=packed.getvalue())

    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["id"] == first.json()["id"] != anew.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    for other in (renamed, changed):
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


@pytest.mark.parametrize("name", ["Big", "", "a/b"])
def test_an_import_needs_a_name_that_a_model_may_have(api, name):
    assert api("POST", "/models:import", params={"name": name}, content=b"").status_code == 422
