"""Where an embedding's regions come from: a segmentation that is there, or a segmenter run for it.

A request names one of the two; what the worker needs of it (`service.regions`) goes into the run's
spec, so that an alias that moves later changes nothing.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from models.bundle import FEATURE_MAP
from service import db, retention, runs
from service.errors import ServiceError

MAX_NAME = 200
"""Characters of a region's name, as the database keeps it."""


def require_feature_map(version: db.ModelVersion) -> None:
    """Refuse an encoder that was exported without its feature map.

    Raises:
        ServiceError: 422 `no_feature_map`.
    """
    if all(output["name"] != FEATURE_MAP for output in version.manifest.get("outputs", ())):
        raise ServiceError(
            422,
            "no_feature_map",
            f"{version.model_name}/{version.version} was exported without its feature map",
        )


def of_segmentation(session: Session, segmentation_id: str, volume_id: str) -> dict[str, Any]:
    """For an embedding's spec: the regions of a segmentation of the same volume.

    Raises:
        ServiceError: 404 `not_found`, 409 `not_ready`, 410 `no_longer_kept`, 422 `invalid_request`
            where it is of another volume or has a label with too long a name.
    """
    run = runs.get(session, segmentation_id, kinds=[db.RunKind.SEGMENT])
    if run.volume_id != volume_id:
        raise _invalid("segmentation_id", "it is of another volume")
    if run.state != db.RunState.SUCCEEDED or run.result is None:
        raise ServiceError(
            409,
            "not_ready",
            f"there are regions once the segmentation has succeeded; it is {run.state}",
            extra={"state": run.state},
        )
    retention.require_files(run)
    values = {str(one["name"]): int(one["value"]) for one in run.result["labels"]}
    _require_short(values, "segmentation_id")
    return {"segmentation_id": run.id, "values": values}


def of_segmenter(version: db.ModelVersion) -> dict[str, Any]:
    """For an embedding's spec: the regions that a segmenter will find.

    Raises:
        ServiceError: 422 `invalid_request` where it has a label with too long a name.
    """
    names = [str(name) for name in version.manifest["labels"]]
    _require_short(names, "segmenter")
    model = {"name": version.model_name, "version": version.version, "digest": version.digest}
    return {"model": model, "values": {name: value for value, name in enumerate(names, start=1)}}


def _require_short(names: list[str] | dict[str, int], field: str) -> None:
    if any(len(name) > MAX_NAME for name in names):
        raise _invalid(field, f"a label's name is longer than {MAX_NAME} characters")


def _invalid(field: str, message: str) -> ServiceError:
    return ServiceError(
        422,
        "invalid_request",
        f"{field}: {message}",
        extra={"errors": [{"pointer": f"/body/{field}", "message": message}]},
    )
