"""What one project may take up: runs that wait, and bytes that are kept.

How many runs of a project are under way at once is the queue's matter (`service.queue`): such a run
waits, it is not refused. The limits are checked without a lock, by what a request announces and
again by what it sent: so requests that come at the same moment may pass one by a few.
"""

from __future__ import annotations

from sqlalchemy import func, or_, select, union
from sqlalchemy.orm import Session

from service import projects
from service.db import CLAIMABLE, Artifact, Blob, Run, RunKind, Upload, Volume
from service.errors import ServiceError
from service.settings import Settings

RETRY_AFTER_S = 60


def check_runs(session: Session, project_id: str, settings: Settings) -> None:
    """Whether one more run of the project may be queued.

    Raises:
        ServiceError: 429 `quota_exceeded`.
    """
    limit = projects.limits_of(session, project_id, settings).max_queued
    if not limit:
        return
    waiting = select(func.count()).where(Run.project_id == project_id, Run.state.in_(CLAIMABLE))
    found = session.scalar(waiting) or 0
    if found >= limit:
        raise _exceeded(
            f"{found} of the project's runs wait; {limit} may", found=found, limit=limit
        )


def check_bytes(
    session: Session,
    project_id: str,
    settings: Settings,
    *,
    more: int = 0,
    upload_id: str | None = None,
) -> None:
    """Whether the project may keep `more` bytes; what was kept counts with the voxels made of it.

    Args:
        session: Database session.
        project_id: Whose they are.
        settings: The site's limit, where the project has none of its own.
        more: How many.
        upload_id: The upload in pieces that they are of, which is not counted twice.

    Raises:
        ServiceError: 429 `quota_exceeded`.
    """
    limit = projects.limits_of(session, project_id, settings).max_stored_bytes
    if not limit:
        return
    found = stored_bytes(session, project_id) + begun_bytes(session, project_id, upload_id)
    if found + more > limit:
        raise _exceeded(
            f"the project's files and uploads take {found} bytes, {more} more would come; {limit} "
            "are allowed",
            found=found,
            limit=limit,
        )


def stored_bytes(session: Session, project_id: str) -> int:
    """Bytes of the files behind the project's volumes and of models that were sent, each once."""
    of_volumes = (
        select(Blob.sha256, Blob.size_bytes)
        .join(
            Volume, or_(Volume.original_sha256 == Blob.sha256, Volume.voxels_sha256 == Blob.sha256)
        )
        .where(Volume.project_id == project_id)
    )
    of_imports = (
        select(Blob.sha256, Blob.size_bytes)
        .join(Artifact, Artifact.sha256 == Blob.sha256)
        .join(Run, Run.id == Artifact.run_id)
        .where(Run.project_id == project_id, Run.kind == RunKind.IMPORT)
    )
    mine = union(of_volumes, of_imports).subquery()  # one row a file
    return int(session.scalar(select(func.coalesce(func.sum(mine.c.size_bytes), 0))) or 0)


def begun_bytes(session: Session, project_id: str, without: str | None = None) -> int:
    """What the project's uploads in pieces will take that are not volumes yet, sent or to come."""
    begun = select(func.coalesce(func.sum(Upload.size_bytes), 0)).where(
        Upload.project_id == project_id, Upload.volume_id.is_(None)
    )
    if without is not None:
        begun = begun.where(Upload.id != without)
    return int(session.scalar(begun) or 0)


def _exceeded(detail: str, *, found: int, limit: int) -> ServiceError:
    return ServiceError(
        429,
        "quota_exceeded",
        detail,
        extra={"found": found, "limit": limit},
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
