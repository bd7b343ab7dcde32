"""What went wrong with a request, answered as an RFC 9457 problem with a stable code.

A problem says what was found and what was expected. It never repeats a value that the caller
sent, since it may be a patient's name, and never shows the text of an unexpected exception.
"""

from __future__ import annotations

import errno
import logging
import re
import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from imaging.errors import ScanError
from models.bundle import BundleError
from service.errors import PROBLEMS, ServiceError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_FIELD = re.compile(
    r"[a-z0-9_]{1,40}|idempotency-key|last-event-id|if-match|prefer|content-(range|digest)",
    re.ASCII,
)
_CODE_OF_STATUS = {
    401: "not_authenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    extra: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer for a problem (RFC 9457, section 3)."""
    kind = PROBLEMS.get(code)
    document = {
        **(extra or {}),
        "type": f"/problems/{code}",
        "title": kind.title if kind else HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": request.url.path,
        "code": code,
        "request_id": request_id_of(request),
    }
    return JSONResponse(document, status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def request_id_of(request: Request) -> str:
    """The id that the log and the `X-Request-Id` header share."""
    return str(getattr(request.state, "request_id", ""))


def install_handlers(app: FastAPI) -> None:
    """Turn every exception that a route may raise into a problem."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(ScanError, _scan_error)
    app.add_exception_handler(BundleError, _bundle_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(DataError, _refused_by_database)
    app.add_exception_handler(OperationalError, _database_unavailable)
    app.add_exception_handler(InterfaceError, _database_unavailable)
    app.add_exception_handler(OSError, _disk_full)


def unexpected(request: Request, error: Exception) -> JSONResponse:
    """500 for a defect of ours: logged by place and type, never by its text."""
    log_unexpected(error, request_id_of(request))
    return problem(
        request,
        500,
        "internal_error",
        "the service failed; its log has the cause under the request id",
    )


def log_unexpected(error: BaseException, request_id: str) -> None:
    """Log where and with what type something failed; an exception's text may hold row values."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-12:]))
    logger.error("request %s failed: %s at %s", request_id, type(error).__name__, places)


def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return problem(
        request, error.status, error.code, error.detail, extra=error.extra, headers=error.headers
    )


def _scan_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ScanError)
    status = 413 if error.code == "too_large" else 422
    return problem(request, status, error.code, error.detail, extra=error.extra)


def _bundle_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BundleError)
    logger.error("request %s: %s", request_id_of(request), error)
    return problem(request, 500, error.code, error.detail)


def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"pointer": _pointer(found["loc"], error.body), "message": _message(found)}
        for found in error.errors()
    ]
    detail = f"{len(errors)} field(s) of the request are not as expected"
    return problem(request, 422, "invalid_request", detail, extra={"errors": errors})


def _message(found: Mapping[str, Any]) -> str:
    """What was expected. Never the input; our own validators name no more than numbers."""
    kind, text = str(found["type"]), str(found["msg"])
    if kind == "json_invalid":
        return "not a JSON value that can be kept"
    if kind == "union_tag_invalid":  # pydantic's text repeats the tag that was sent
        return f"expected one of {found['ctx']['expected_tags']}"
    if kind == "extra_forbidden":
        return "unknown field"
    return text.removeprefix("Value error, ")


def _pointer(location: Sequence[object], body: object) -> str:
    """RFC 6901 pointer below `/body`, `/query`, `/path` or `/header`.

    Pydantic's location also names the chosen member of a union, which is no place in the body:
    such parts are left out. A name that no field of ours could have is shown as `?`.
    """
    source, *rest = location
    if source != "body":
        return "/" + "/".join(_name(part) for part in location)
    if rest and isinstance(rest[0], int):  # not JSON: an offset into the text
        rest = []
    kept, place = ["body"], body
    for number, part in enumerate(rest):
        if _holds(place, part):
            place = place[part]  # type: ignore[index]  # it holds the part
        elif number < len(rest) - 1 or part == "[key]":
            continue
        kept.append(_name(part))
    return "/" + "/".join(kept)


def _holds(place: object, part: object) -> bool:
    """Whether a JSON value has this member."""
    if isinstance(part, int):
        return isinstance(place, list) and part < len(place)
    return isinstance(place, Mapping) and part in place


def _name(part: object) -> str:
    return str(part) if _FIELD.fullmatch(str(part)) else "?"


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODE_OF_STATUS.get(error.status_code, "request_failed")
    detail = f"{request.method} {HTTPStatus(error.status_code).phrase}"
    if error.status_code == 404:
        detail = "no resource has this address"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "other methods")
        detail = f"{request.method} was sent, {allowed} is supported"
    return problem(request, error.status_code, code, detail, headers=error.headers)


def _disk_full(request: Request, error: Exception) -> JSONResponse:
    """A disk that filled up while it was written to; any other fault of the system is ours."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    logger.error("request %s: the disk is full", request_id_of(request))
    return problem(request, 507, "insufficient_storage", "the disk is full")


def _refused_by_database(request: Request, error: Exception) -> JSONResponse:
    """Values that a column cannot hold (PostgreSQL: NUL in text, integers out of range)."""
    logger.warning("request %s: the database refused a value", request_id_of(request))
    return problem(request, 422, "invalid_request", "a value is outside what can be stored")


def _database_unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.error("request %s: %s", request_id_of(request), type(error).__name__)
    return problem(
        request,
        503,
        "database_unavailable",
        "the database does not answer; try again",
        headers={"Retry-After": "5"},
    )
