"""What can go wrong with a request: every stable code, and the exception that carries one.

Workers and upkeep raise and catch it too, so nothing of the web is in here (`service.problems`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


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
