"""What a service answered when it did not do what was asked; for the client's modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from service import schemas

TRANSIENT = frozenset({502, 503, 504})


class ApiError(Exception):
    """The service refused a request, or did not answer.

    Args:
        status: HTTP status; 0 if there was no answer.
        code: The problem's code; `unreachable` if there was no answer.
        detail: What was found and what was expected.
        problem: The whole problem document.
    """

    def __init__(
        self, status: int, code: str, detail: str, problem: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(f"{code} ({status}): {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.problem = dict(problem or {})

    @property
    def is_transient(self) -> bool:
        """Whether asking again may help."""
        return self.status in TRANSIENT or self.code == "unreachable"


def check(answer: httpx.Response) -> None:
    """Raise what a refusal says."""
    if not answer.is_error:
        return
    try:
        found = schemas.Problem.model_validate_json(answer.content)
    except ValueError:  # not from the service: a proxy's page
        raise ApiError(
            answer.status_code, "no_problem", f"HTTP {answer.status_code} without a problem"
        ) from None
    findings = "".join(f"; {one.pointer}: {one.message}" for one in found.errors or ())
    raise ApiError(found.status, found.code, found.detail + findings, found.model_dump(mode="json"))


def unreachable(error: httpx.TransportError) -> ApiError:
    """For a request that got no answer."""
    return ApiError(0, "unreachable", f"the service does not answer ({type(error).__name__})")
