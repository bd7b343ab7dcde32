"""What segmentations and embeddings share: queueing a model on a volume, and its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Response
from sqlalchemy.orm import Session

from service import db, registry, retention, runs, schemas, volumes
from service.auth import Principal
from service.errors import ServiceError
from service.formats import ARTIFACTS
from service.idempotency import Answer
from service.routers import answers, deps, files
from service.routers.runs import require_kind
from service.storage import Store

_FORMAT_OF = {name.partition(".")[0]: form for form, name in ARTIFACTS.items()}

CREATE_PROBLEMS = (
    "forbidden",
    "not_found",
    "request_too_large",
    "invalid_request",
    "wrong_model_kind",
    "wrong_volume_kind",
    "idempotency_mismatch",
    "idempotency_in_flight",
    "quota_exceeded",
)


def work_of(
    ask: schemas.InferenceCreate,
    caller: Principal,
    *,
    kind: db.RunKind,
    model_kind: str,
    collection: str,
    view: answers.View,
    options: Mapping[str, Any] | None = None,
    more: Callable[[Session, db.ModelVersion], Mapping[str, Any]] | None = None,
) -> deps.Work:
    """Queue `kind` of the asked-for model on the asked-for volume or 2D image.

    The reference is resolved now, so an alias that moves later changes nothing. `options` go into
    the run's spec, and so does what `more` finds.
    """

    def work(session: Session) -> Answer:
        volume = volumes.get(session, ask.volume_id)
        version = registry.resolve(session, ask.model)
        require_kind(version, model_kind)
        require_reads(version, volume)
        require_one_label_a_voxel(version)
        model = {
            "name": version.model_name,
            "version": version.version,
            "digest": version.digest,
        }
        found = more(session, version) if more is not None else {}
        run = runs.create(
            session,
            kind=kind,
            spec={"model": model, **(options or {}), **found},
            volume_id=volume.id,
            principal=caller.id,
        )
        return answers.accepted(run, collection, view)

    return work


def require_reads(version: db.ModelVersion, volume: db.Volume) -> None:
    """Refuse a scan that a model does not read: volumes, or 2D images."""
    if volume.kind == "image_2d" and registry.reads_2d(version):
        return
    if volume.kind != "image":
        raise volumes.wrong_kind(volume, "image")
    require_volumes(version)


def require_volumes(version: db.ModelVersion) -> None:
    """Refuse a model of 2D images: a scan here is a volume."""
    if registry.reads_2d(version):
        raise ServiceError(
            422,
            "wrong_model_kind",
            f"{version.model_name}/{version.version} reads 2D images, and a scan is a volume",
        )


def require_one_label_a_voxel(version: db.ModelVersion) -> None:
    """Refuse a segmenter of regions that may overlap: a mask cannot hold them."""
    manifest = version.manifest
    if manifest["kind"] == "segmenter" and manifest.get("activation") == "sigmoid":
        raise ServiceError(
            422,
            "wrong_model_kind",
            f"{version.model_name}/{version.version} segments regions that may overlap; "
            "a mask holds one label a voxel",
        )


def cancel(session: Session, run_id: str, kind: db.RunKind) -> db.Run:
    """Ask a run of this kind to end. Commits."""
    runs.get(session, run_id, kinds=[kind])
    row = runs.request_cancel(session, run_id)
    session.commit()
    return row


def artifact(
    session: Session, store: Store, run_id: str, name: str, *, filename: str, media_type: str
) -> Response:
    """A file that a segmentation made, checked against its digest.

    Args:
        session: Database session.
        store: Where the file lies.
        run_id: The segmentation.
        name: The artifact's name without suffixes, such as `mask`, `seg` or `preview`.
        filename: What the download is called.
        media_type: Of the download.

    Raises:
        ServiceError: 404 `not_found`; 409 `not_ready`, `format_not_made`.
        BlobCorrupt: The file is missing or has changed.
    """
    run = runs.get(session, run_id, kinds=[db.RunKind.SEGMENT])
    if run.state != db.RunState.SUCCEEDED:
        raise ServiceError(
            409,
            "not_ready",
            f"there is a result once the state is succeeded; it is {run.state}",
            extra={"state": run.state},
            headers={} if run.state in db.TERMINAL else {"Retry-After": "1"},
        )
    for found in runs.artifacts(session, run_id):
        if found.name.partition(".")[0] == name:
            session.rollback()  # nothing is locked while the file is hashed
            return files.attachment(store, found.sha256, filename, media_type)
    retention.require_files(run)
    if name in _FORMAT_OF:
        raise _not_made(run, _FORMAT_OF[name])
    raise ServiceError(404, "not_found", f"the segmentation has no {name}")


def _not_made(run: db.Run, form: str) -> ServiceError:
    """Why a result has no file of this format, as the run recorded it."""
    for one in (run.result or {}).get("not_made", ()):
        if one["format"] == form:
            reason, detail = str(one["code"]), str(one["detail"])
            break
    else:
        reason, detail = "not_asked", "it was not asked for: see `formats` of the request"
    return ServiceError(
        409, "format_not_made", f"there is no {form}: {detail}", extra={"reason": reason}
    )
