"""What is removed when its time is over: results' files, files as they were sent, failed work.

Nothing is, unless the operator says after how many days (`PCRL_RESULTS_DAYS`,
`PCRL_ORIGINALS_DAYS`); failed trainings' work folders go after `PCRL_FAILED_WORK_DAYS`. The record
stays: a run keeps its numbers and a volume its voxels, and both say when the file went. First the
row says so, then the file goes, so a process that is killed between leaves a file for the sweep.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from service import volumes
from service.db import Artifact, Run, RunKind, RunState, Volume, db_now
from service.errors import ServiceError
from service.settings import Settings
from service.storage import Store

DAY_S = 86400.0
BATCH = 100
REMOVED = "files_removed_at"


def sweep(session: Session, store: Store, settings: Settings) -> int:
    """Remove the files whose time is over; returns how many rows have lost theirs. Commits."""
    gone = 0
    if settings.results_days:
        gone += _results(session, store, settings.results_days * DAY_S)
    if settings.originals_days:
        gone += _originals(session, store, settings.originals_days * DAY_S)
    return gone


def failed_work(session: Session, settings: Settings) -> list[str]:
    """Runs that failed so long ago that their work folders go."""
    if not settings.failed_work_days:
        return []
    horizon = db_now(-settings.failed_work_days * DAY_S)
    where = (Run.state == RunState.FAILED, Run.finished_at < horizon)
    return list(session.scalars(select(Run.id).where(*where)))


def require_files(run: Run) -> None:
    """Refuse to look for files that were removed.

    Raises:
        ServiceError: 410 `no_longer_kept`.
    """
    removed_at = (run.result or {}).get(REMOVED)
    if removed_at is not None:
        raise _gone("result", str(removed_at))


def require_original(volume: Volume) -> None:
    """Refuse to look for the file as it was sent where it was removed.

    Raises:
        ServiceError: 410 `no_longer_kept`.
    """
    if volume.original_removed_at is not None:
        raise _gone("file as it was sent", volume.original_removed_at.isoformat())


def _results(session: Session, store: Store, older_than_s: float) -> int:
    over = session.scalars(
        select(Run)
        .where(
            Run.kind == RunKind.SEGMENT,
            Run.state == RunState.SUCCEEDED,
            Run.finished_at < db_now(-older_than_s),
            select(Artifact.name).where(Artifact.run_id == Run.id).exists(),
        )
        .limit(BATCH)
    ).all()
    session.commit()
    for run in over:
        digests = session.scalars(
            delete(Artifact).where(Artifact.run_id == run.id).returning(Artifact.sha256)
        ).all()
        run.result = {**(run.result or {}), REMOVED: datetime.now(UTC).isoformat()}
        session.commit()
        volumes.discard(session, store, *digests)
    return len(over)


def _originals(session: Session, store: Store, older_than_s: float) -> int:
    """A file that several volumes came from goes when the newest of them is old enough."""
    other = Volume.__table__.alias()
    is_young = other.c.created_at >= db_now(-older_than_s)
    over = session.scalars(
        select(Volume.original_sha256)
        .where(
            Volume.original_removed_at.is_(None),
            Volume.created_at < db_now(-older_than_s),
            ~select(other.c.id)
            .where(other.c.original_sha256 == Volume.original_sha256, is_young)
            .exists(),
            ~select(other.c.id).where(other.c.voxels_sha256 == Volume.original_sha256).exists(),
            ~select(Artifact.name).where(Artifact.sha256 == Volume.original_sha256).exists(),
        )
        .distinct()
        .limit(BATCH)
    ).all()
    session.commit()
    for sha256 in over:
        volumes.lock(session, sha256)
        session.execute(
            update(Volume)
            .where(Volume.original_sha256 == sha256)
            .values(original_removed_at=db_now())
            .execution_options(synchronize_session=False)
        )
        store.delete_blob(sha256)
        session.commit()
    return len(over)


def _gone(what: str, removed_at: str) -> ServiceError:
    return ServiceError(
        410,
        "no_longer_kept",
        f"the {what} was removed at {removed_at}, as the operator has set",
        extra={"removed_at": removed_at},
    )
