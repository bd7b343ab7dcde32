"""What one caller may take up: runs that wait, and bytes that are kept.

How many runs of a caller are under way at once is the queue's matter (`service.queue`): such a run
waits, it is not refused. The limits are checked before the work and without a lock, so requests
that come at the same moment may pass one by a few.
"""

from __future__ import annotations

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from service.db import CLAIMABLE, Blob, Run, Volume
from service.errors import ServiceError
from service.settings import Settings

RETRY_AFTER_S = 60


def check_runs(session: Session, caller_id: str, settings: Settings) -> None:
    """Whether the caller may queue one more run.

    Raises:
        ServiceError: 429 `quota_exceeded`.
    """
    if not settings.max_queued:
        return
    waiting = select(func.count()).where(Run.created_by == caller_id, Run.state.in_(CLAIMABLE))
    found = session.scalar(waiting) or 0
    if found >= settings.max_queued:
        raise _exceeded(
            f"{found} of the caller's runs wait; {settings.max_queued} may",
            found=found,
            limit=settings.max_queued,
        )


def check_bytes(session: Session, caller_id: str, settings: Settings, *, more: int = 0) -> None:
    """Whether the caller may keep `more` bytes; what was kept counts with the voxels made of it.

    Raises:
        ServiceError: 429 `quota_exceeded`.
    """
    if not settings.max_stored_bytes:
        return
    found = stored_bytes(session, caller_id)
    if found + more > settings.max_stored_bytes:
        raise _exceeded(
            f"the caller's scans take {found} bytes, {more} more would come; "
            f"{settings.max_stored_bytes} are allowed",
            found=found,
            limit=settings.max_stored_bytes,
        )


def stored_bytes(session: Session, caller_id: str) -> int:
    """Bytes of the files behind the caller's volumes, each file once."""
    mine = (
        select(Blob.sha256, Blob.size_bytes)
        .join(
            Volume, or_(Volume.original_sha256 == Blob.sha256, Volume.voxels_sha256 == Blob.sha256)
        )
        .where(Volume.created_by == caller_id)
        .distinct()
        .subquery()
    )
    return int(session.scalar(select(func.coalesce(func.sum(mine.c.size_bytes), 0))) or 0)


def _exceeded(detail: str, *, found: int, limit: int) -> ServiceError:
    return ServiceError(
        429,
        "quota_exceeded",
        detail,
        extra={"found": found, "limit": limit},
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )
