"""What OpenAPI says about problems and files: one place for statuses, schemas and examples."""

from __future__ import annotations

from typing import Any

from service.errors import PROBLEMS
from service.problems import MEDIA_TYPE

Responses = dict[int | str, dict[str, Any]]

PROBLEM_SCHEMA = {"$ref": "#/components/schemas/Problem"}
ALWAYS = ("not_authenticated", "not_found", "internal_error", "database_unavailable")
"""`not_found`: the header `PCRL-Project` may name a project that is none."""


def problems(*codes: str) -> Responses:
    """OpenAPI responses for these problem codes and for those that any route may give."""
    found: Responses = {}
    for code in (*ALWAYS, *codes):
        kind = PROBLEMS[code]
        response = found.setdefault(
            kind.status,
            {
                "description": kind.title,
                "content": {MEDIA_TYPE: {"schema": PROBLEM_SCHEMA, "examples": {}}},
            },
        )
        if kind.title not in response["description"].split("; "):
            response["description"] += f"; {kind.title}"
        response["content"][MEDIA_TYPE]["examples"][code] = {"value": _example(code)}
    return found


def file(description: str, *media_types: str) -> Responses:
    """OpenAPI responses of a download that also serves byte ranges."""
    content = {name: {"schema": {"type": "string", "format": "binary"}} for name in media_types}
    return {
        200: {"description": description, "content": content},
        206: {"description": "The asked-for range of the file", "content": content},
        416: {
            "description": "The file does not have the asked-for range",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
    }


def also(status: int, model: Any, description: str) -> Responses:
    """OpenAPI response of a further good status."""
    return {status: {"model": model, "description": description}}


def _example(code: str) -> dict[str, Any]:
    kind = PROBLEMS[code]
    example: dict[str, Any] = {
        "type": f"/problems/{code}",
        "title": kind.title,
        "status": kind.status,
        "detail": "what was found, and what was expected",
        "instance": "/api/v1/...",
        "code": code,
        "request_id": "0f8fad5bd9cb469fa16570867728950e",
    }
    if code == "invalid_request":
        example["errors"] = [{"pointer": "/body/recipe/num_steps", "message": "unknown field"}]
    return example
