"""The OpenAPI document: complete, with examples, and without a way out (S9)."""

import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from service.errors import PROBLEMS

ROOT = Path(__file__).resolve().parents[3]
JSON = "application/json"
PROBLEM = "application/problem+json"
OPEN = {"/healthz", "/readyz"}


@pytest.fixture(scope="module")
def document(api):
    return api.app.openapi()


@pytest.fixture(scope="module")
def operations(document):
    return [
        (f"{method.upper()} {path}", path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def _schema(document, schema):
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_every_operation_has_a_unique_id_a_tag_and_a_summary(operations):
    ids = [operation["operationId"] for _, _, operation in operations]

    assert len(ids) == len(set(ids)) > 30
    for name, _, operation in operations:
        assert operation["tags"], name
        assert operation["summary"], name


def test_every_operation_but_health_asks_for_a_bearer_token(document, operations):
    schemes = document["components"]["securitySchemes"]

    assert schemes["HTTPBearer"]["scheme"] == "bearer"
    for name, path, operation in operations:
        expected = [] if path in OPEN else [{"HTTPBearer": []}]
        assert operation["security"] == expected, name


def test_every_refusal_is_declared_as_a_problem_with_examples(document, operations):
    for name, path, operation in operations:
        for status, response in operation["responses"].items():
            if int(status) < 400 or status == "416" or path in OPEN:
                continue
            content = response["content"]
            assert set(content) == {PROBLEM}, (name, status)
            assert content[PROBLEM]["schema"] == {"$ref": "#/components/schemas/Problem"}
            for code, example in content[PROBLEM]["examples"].items():
                assert PROBLEMS[code].status == int(status)
                assert example["value"]["code"] == code


def test_what_a_header_may_bring_about_is_declared(operations):
    """`Prefer` stands where a run is queued, a key where an answer may be given once more."""
    needed = {
        "prefer": {"quota_exceeded"},
        "idempotency-key": {"idempotency_mismatch", "idempotency_in_flight"},
    }
    seen = set()
    for name, _, operation in operations:
        takes = {one["name"].lower() for one in operation.get("parameters", ())} & needed.keys()
        answers = [one.get("content", {}).get(PROBLEM) for one in operation["responses"].values()]
        declared = {code for one in answers if one for code in one["examples"]}
        for header in takes:
            assert needed[header] <= declared, f"{name}: {header}"
        seen |= takes
    assert seen == needed.keys()


def test_every_route_with_a_role_above_viewer_declares_403(operations):
    for name, _, operation in operations:
        changes = not name.startswith("GET") and not name.endswith(":search")
        assert ("403" in operation["responses"]) is changes, name


def test_every_json_request_and_answer_has_an_example_that_fits(document, operations):
    checked = 0
    for name, _, operation in operations:
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for body in bodies:
            if JSON not in body.get("content", {}):
                continue
            schema = _schema(document, body["content"][JSON]["schema"])
            assert schema.get("examples"), name
            validator = Draft202012Validator({**schema, "components": document["components"]})
            for example in schema["examples"]:
                validator.validate(example)
            checked += 1

    assert checked > 25


def test_no_request_takes_an_address_of_anything(document, operations):
    text = str([operation.get("parameters", []) for _, _, operation in operations])
    text += str([operation.get("requestBody", {}) for _, _, operation in operations])
    text += str(document["components"]["schemas"])

    assert "'pattern'" in text  # the text does hold the schemas
    assert not re.search(r"'format': '(uri|url|path|file-path|hostname)", text)
    assert not re.search(r"callback|webhook", text, re.IGNORECASE)


def test_the_walk_through_names_every_route(operations):
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `((?:GET|POST|PUT|PATCH|DELETE) /\S+)` \|", text, re.MULTILINE))

    assert listed == {name for name, _, _ in operations}
