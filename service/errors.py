"""What can go wrong with a request, as RFC 9457 problems with a stable code.

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
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from starlette.exceptions import HTTPException

from imaging.errors import ScanError
from models.bundle import BundleError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_FIELD = re.compile(
    r"[a-z0-9_]{1,40}|idempotency-key|last-event-id|if-match|prefer|content-(range|digest)",
    re.ASCII,
)


class Kind(NamedTuple):
    """The usual status of a problem, and its title."""

    status: int
    title: str


_REQUEST = {
    "invalid_request": Kind(422, "The request does not have the expected form"),
    "not_authenticated": Kind(401, "A valid bearer token is needed"),
    "forbidden": Kind(403, "The token's role may not do this"),
    "not_found": Kind(404, "There is no such resource"),
    "method_not_allowed": Kind(405, "The resource does not support this method"),
    "unsupported_media_type": Kind(415, "The body's media type is not supported"),
    "request_too_large": Kind(413, "The request body is larger than allowed"),
    "precondition_failed": Kind(412, "The resource has changed since it was read"),
    "precondition_required": Kind(428, "The request must say which state it was made for"),
    "upload_offset_mismatch": Kind(409, "The piece does not begin where the upload has got to"),
    "upload_incomplete": Kind(409, "Bytes of the upload are still missing"),
    "upload_busy": Kind(409, "Another request is working on the upload"),
    "digest_mismatch": Kind(422, "The bytes do not have the digest that was announced"),
    "idempotency_mismatch": Kind(422, "The idempotency key was used for another request"),
    "idempotency_in_flight": Kind(409, "The first request with this key is still being answered"),
    "quota_exceeded": Kind(429, "The project has as much as it may have"),
    "name_taken": Kind(409, "Another project has this name"),
    "request_failed": Kind(400, "The request could not be served"),
}
_SCANS = {
    "not_a_scan": Kind(422, "The file is not a scan"),
    "truncated_file": Kind(422, "The file ends too early"),
    "empty_archive": Kind(422, "The archive has no scan in it"),
    "several_series": Kind(422, "The archive has several series; one must be chosen"),
    "no_such_series": Kind(422, "The archive does not have the series that was asked for"),
    "mixed_patients": Kind(422, "One series holds images of several patients"),
    "unsupported_transfer_syntax": Kind(422, "The DICOM transfer syntax is not supported"),
    "unsupported_format": Kind(422, "The file format is not supported"),
    "not_three_dimensional": Kind(422, "The scan is not a three-dimensional volume"),
    "not_two_dimensional": Kind(422, "The file is not a single two-dimensional image"),
    "constant_image": Kind(422, "Every pixel of the image has the same value"),
    "missing_slices": Kind(422, "The series lacks slices"),
    "duplicate_slices": Kind(422, "The series has several slices at one position"),
    "uneven_spacing": Kind(422, "The slices are not evenly spaced"),
    "gantry_tilt": Kind(422, "The slices are sheared (gantry tilt)"),
    "bad_geometry": Kind(422, "The scan's geometry is not usable"),
    "non_finite_voxels": Kind(422, "The scan has voxels that are not finite numbers"),
    "labels_not_integers": Kind(422, "A label volume must hold whole numbers from 0 to 255"),
    "archive_unsafe": Kind(422, "The archive is not safe to open"),
    "burned_in_annotation": Kind(422, "The pixels may show who the patient is"),
    "too_large": Kind(413, "The scan is larger than allowed"),
}
_RESOURCES = {
    "volume_in_use": Kind(409, "A dataset, a run or a golden case refers to the volume"),
    "wrong_volume_kind": Kind(422, "The volume is of the wrong kind"),
    "dataset_in_use": Kind(409, "Runs, batches or experiments refer to the dataset"),
    "dataset_without_labels": Kind(422, "The dataset has no labels to learn from"),
    "label_shape_mismatch": Kind(422, "Labels and image have different shapes"),
    "label_geometry_mismatch": Kind(422, "Labels and image lie on different grids"),
    "split_leaks_subject": Kind(422, "A subject would be in more than one split"),
    "run_already_ended": Kind(409, "The run has already ended"),
    "not_ready": Kind(409, "The result is not there yet"),
    "format_not_made": Kind(409, "The result was not made in this format"),
    "no_longer_kept": Kind(410, "The file was removed when its time was over"),
    "not_embedded": Kind(409, "The volume has no embedding of this model"),
    "model_not_loadable": Kind(409, "The model cannot be loaded where it would run"),
    "no_feature_map": Kind(422, "The encoder was exported without its feature map"),
    "wrong_model_kind": Kind(422, "The model is of the wrong kind"),
    "gate_failed": Kind(409, "The version has not shown what a live one must"),
    "no_version_before": Kind(409, "The alias has no version to go back to"),
    "no_golden_cases": Kind(409, "The model has no golden cases"),
    "too_many_golden_cases": Kind(409, "The model has as many golden cases as it may have"),
    "not_an_archive": Kind(422, "The file is neither a zip nor a tar"),
    "experiment_canceled": Kind(409, "The experiment was canceled"),
    "experiment_canceling": Kind(409, "Canceled trainings have not ended yet"),
    "nothing_to_retry": Kind(409, "No scan of the batch failed or was canceled"),
    "incompatible_parent": Kind(422, "The parent's network does not fit the recipe's"),
}
_OPERATION = {
    "insufficient_storage": Kind(507, "There is too little free disk space"),
    "blob_corrupt": Kind(500, "A stored file is not what was stored"),
    "bundle_corrupt": Kind(500, "A stored model is not what was stored"),
    "plan_unreadable": Kind(500, "A stored plan is of another version"),
    "bundle_invalid": Kind(500, "A stored model has no valid manifest"),
    "database_unavailable": Kind(503, "The database does not answer"),
    "model_not_warm": Kind(503, "The model is still being loaded"),
    "not_live": Kind(503, "The service cannot do this just now"),
    "internal_error": Kind(500, "The service failed"),
}
PROBLEMS: dict[str, Kind] = {**_REQUEST, **_SCANS, **_RESOURCES, **_OPERATION}
"""Every problem code, with its usual status and its title; `docs/errors.md` explains each."""

_CODE_OF_STATUS = {
    401: "not_authenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


class ServiceError(Exception):
    """A request that cannot be served as it is: the caller's error.

    Args:
        status: HTTP status of the answer.
        code: Stable slug from `PROBLEMS`.
        detail: What was found and what was expected; never a patient's name or id.
        extra: Facts a program may act on, JSON-able; members of the problem.
        headers: HTTP headers of the answer, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        extra: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.extra = dict(extra or {})
        self.headers = dict(headers or {})


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
