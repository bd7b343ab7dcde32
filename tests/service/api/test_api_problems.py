"""Problems: their shape, what they never hold, and what unusual requests get (T-H7, S8, S11)."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from service.errors import PROBLEMS

ROOT = Path(__file__).resolve().parents[3]
HEX = "0" * 32
CANARY = "CANARY-7f3a"


def test_a_problem_has_every_member_of_the_convention(api):
    response = api("GET", f"/volumes/vol_{HEX}")

    body = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert body == {
        "type": "/problems/not_found",
        "title": PROBLEMS["not_found"].title,
        "status": 404,
        "detail": "no volume has this id",
        "instance": f"/api/v1/volumes/vol_{HEX}",
        "code": "not_found",
        "request_id": response.headers["x-request-id"],
    }


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing-here", 404, "not_found"),
        ("PATCH", "/volumes", 405, "method_not_allowed"),
        ("GET", "/volumes/", 404, "not_found"),
        ("GET", "/volumes/vol_1%00", 422, "invalid_request"),
        ("GET", "/volumes?subject=a%00b", 422, "invalid_request"),
        ("GET", "/volumes?page_size=0", 422, "invalid_request"),
        ("GET", "/volumes?page_size=99999999999999999999", 422, "invalid_request"),
        ("GET", "/volumes?page_token=rubbish", 422, "invalid_request"),
        ("GET", f"/runs/run_{HEX}/events?after=9223372036854775808", 422, "invalid_request"),
        ("GET", "/models/m/versions/99999999999", 422, "invalid_request"),
    ],
)
def test_an_unusual_request_is_a_problem(api, method, path, status, code):
    response = api(method, path)

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"


BODIES = {
    "NUL": rb'{"name": "a\u0000b", "items": []}',
    "lone surrogate": rb'{"name": "\ud800", "items": []}',
    "NaN": b'{"name": "a", "items": [], "split": {"train": NaN}}',
    "infinity": b'{"name": "a", "items": [], "split": {"train": 1e999}}',
    "integer out of range": b'{"name": "a", "items": [], "split": {"seed": 99999999999999999999}}',
    "deep nesting": b"[" * 100_000,
    "not JSON": b"{",
    "not UTF-8": b'{"name": "\xff"}',
    "another type": b'["name"]',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_json_body_that_cannot_be_kept_is_refused(api, name):
    headers = {"Content-Type": "application/json"}

    response = api("POST", "/datasets", content=BODIES[name], headers=headers)

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"]


def test_a_json_body_over_a_mebibyte_is_refused(api):
    headers = {"Content-Type": "application/json"}

    def chunks():
        for _ in range(20):
            yield b" " * 100_000

    announced = api("POST", "/datasets", content=b" " * 1_100_000, headers=headers)
    streamed = api("POST", "/datasets", content=chunks(), headers=headers)

    for response in (announced, streamed):
        assert (response.status_code, response.json()["code"]) == (413, "request_too_large")


def test_findings_point_into_the_body_and_repeat_no_value(api):
    recipe = {"num_steps": CANARY, "crops": {"input_size": [30, 30, 30]}, "methode": CANARY}
    body = {
        "kind": "pretrain",
        "dataset_id": CANARY,
        "model_name": CANARY,
        "recipe": recipe,
        CANARY: 1,
        f"{CANARY} ": 1,
    }

    response = api("POST", "/runs", json=body)

    found = {error["pointer"]: error["message"] for error in response.json()["errors"]}
    assert response.status_code == 422
    assert found["/body/recipe/methode"] == "unknown field"
    assert "multiples of 8" in found["/body/recipe/crops"]
    assert {"/body/dataset_id", "/body/model_name", "/body/recipe/num_steps"} <= set(found)
    assert CANARY not in response.text


def test_a_recipe_of_an_unknown_kind_does_not_come_back(api):
    body = {"kind": "pretrain", "dataset_id": f"ds_{HEX}", "model_name": "m"}

    response = api("POST", "/runs", json={**body, "recipe": {"kind": CANARY}})

    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/body/recipe"
    assert CANARY not in response.text


def test_an_unknown_query_parameter_is_tolerated(api):
    assert api("GET", "/volumes?unheard_of=1").status_code == 200


def test_a_defect_of_ours_is_500_and_its_text_stays_inside(api, monkeypatch, caplog):
    def fail(*_args, **_how):
        raise RuntimeError(CANARY)

    monkeypatch.setattr("service.volumes.listing", fail)
    with caplog.at_level(logging.INFO):
        response = api("GET", "/volumes")

    body = response.json()
    assert (response.status_code, body["code"]) == (500, "internal_error")
    assert CANARY not in response.text + caplog.text
    assert "RuntimeError" in caplog.text
    assert body["request_id"] in caplog.text


def test_a_database_that_is_down_is_503_with_retry_after(api, monkeypatch):
    def fail(*_args, **_how):
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    monkeypatch.setattr("service.volumes.listing", fail)

    response = api("GET", "/volumes")

    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert int(response.headers["retry-after"]) > 0


def test_a_database_that_cannot_be_opened_is_503_on_every_route(serve):
    down = serve()
    folder = down.settings.data_dir
    down.app.state.sessions.kw["bind"].dispose()
    (folder / "pcrl.sqlite3").rename(folder / "moved")
    (folder / "pcrl.sqlite3").mkdir()

    response = down("GET", "/volumes")
    ready = down("GET", "/readyz", role=None)

    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert ready.status_code == 503
    assert down("GET", "/healthz", role=None).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/volumes", f"/volumes/vol_{HEX}", "/nothing"])
def test_every_answer_carries_the_security_headers(api, path):
    headers = api("GET", path).headers

    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"])


def test_no_other_site_may_read_the_answers(api):
    response = api("GET", "/volumes", headers={"Origin": "https://elsewhere.example"})

    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_proxys_request_id_is_kept_and_anything_else_is_not(api):
    kept = api("GET", "/healthz", headers={"X-Request-Id": "ab" * 16})
    other = api("GET", "/healthz", headers={"X-Request-Id": CANARY})

    assert kept.headers["x-request-id"] == "ab" * 16
    assert other.headers["x-request-id"] != CANARY


def test_the_access_log_has_no_query_and_no_address_that_failed(api, caplog):
    with caplog.at_level(logging.INFO, logger="service.access"):
        api("GET", f"/volumes?subject={CANARY}")
        api("GET", f"/volumes/{CANARY}")
        api("GET", f"/{CANARY}")

    lines = [record.getMessage() for record in caplog.records if record.name == "service.access"]
    assert len(lines) == 3
    assert "/api/v1/volumes 200" in lines[0]
    assert CANARY not in "".join(lines)


def test_there_are_no_pages_that_load_scripts_from_elsewhere(api):
    for path in ("/docs", "/redoc"):
        assert api.http.get(path).status_code == 404
    assert api.http.get("/api/v1/openapi.json").status_code == 200


def test_the_api_process_loads_neither_torch_nor_onnxruntime():
    script = (
        "import sys, json, service.app, service.client; service.app.create_app();"
        "print(json.dumps([m for m in ('torch', 'onnxruntime', 'json') if m in sys.modules]))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert json.loads(done.stdout) == ["json"]


def test_every_problem_code_has_one_line_in_the_docs():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d{3}) \| .+ \|$", text, re.MULTILINE)

    assert [code for code, _ in rows] == list(PROBLEMS)
    assert {code: int(status) for code, status in rows} == {
        code: kind.status for code, kind in PROBLEMS.items()
    }


def test_every_code_that_the_source_raises_is_a_known_problem():
    sources = list((ROOT / "service").rglob("*.py")) + list((ROOT / "imaging").glob("*.py"))
    pattern = re.compile(r"(?:ServiceError\(\s*\d{3},\s*|ScanError\(\s*|BundleError\(\s*)\"(\w+)\"")
    raised = {code for path in sources for code in pattern.findall(path.read_text())}

    assert {"not_found", "truncated_file"} <= raised  # the pattern does find codes
    assert raised <= set(PROBLEMS)
