"""From a backup to a service: everything is checked first, then put in place.

Order: every file of the backup is hashed; then the store, the secrets and the work folders; the
database last, so that at no time a row lacks its file. A backup of an older version is migrated.
Runs that were held by a worker wait again (`interrupted`) and go on from their last checkpoint; it
does not count as an attempt.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sqlalchemy import MetaData, case, delete, func, inspect, make_url, select, text, update

from service import migrate
from service.backup_form import (
    DATABASES,
    BackupError,
    Manifest,
    link_or_copy,
    opened,
    run_postgres,
    verify,
)
from service.db import (
    CLAIMABLE,
    HELD,
    Idempotency,
    Run,
    RunAttempt,
    RunEvent,
    RunState,
    WorkerHeartbeat,
    connect,
    db_now,
    sessions,
)
from service.settings import Settings
from service.storage import Store, fsync

ALIVE_S = 60.0
_OWN_FUNCTIONS = """
    SELECT p.oid::regprocedure::text FROM pg_proc p
    WHERE p.pronamespace = current_schema()::regnamespace AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
"""
"""Of triggers (migration 0004): they stay when their tables go, and the backup brings its own."""


def restore(settings: Settings, source: Path, *, replace: bool = False) -> Manifest:
    """Put a backup in place of what `settings` name.

    Args:
        settings: Where the data folder and the database are.
        source: A folder or a `.tar` that `backup` made.
        replace: Whether an installation that is there may be replaced. Stored files stay and are
            swept later if no row needs them; its database, secrets and work folders go.

    Raises:
        BackupError: The backup is not whole, of a newer version, or for another kind of database;
            the target is not empty, or workers are at work on it. Nothing was changed.
    """
    dialect = "sqlite" if settings.database_url.startswith("sqlite") else "postgresql"
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with opened(source, settings.data_dir) as (folder, manifest):
        if not migrate.is_known(manifest.revision):
            raise BackupError(
                f"the backup is at revision {manifest.revision}, which this version does not know "
                f"(its newest is {migrate.head()}): install version {manifest.product_version}"
            )
        if manifest.dialect != dialect:
            raise BackupError(f"the backup is of {manifest.dialect}, the target is {dialect}")
        _check_target(settings, replace=replace)
        verify(folder, manifest)
        _put_files(settings, folder, manifest)
        if dialect == "sqlite":
            _put_sqlite(settings, folder / DATABASES[dialect])
        else:
            _put_postgres(settings, folder / DATABASES[dialect])
    migrate.upgrade(settings.database_url)
    _wake(settings)
    return manifest


def _check_target(settings: Settings, *, replace: bool) -> None:
    url = make_url(settings.database_url)
    tables: list[str] = []
    is_there = not settings.database_url.startswith("sqlite") or Path(str(url.database)).exists()
    if is_there:
        engine = connect(settings.database_url)
        try:
            tables = inspect(engine).get_table_names()
            if "worker_heartbeat" in tables:
                with sessions(engine)() as session:
                    alive = session.scalar(
                        select(func.count())
                        .select_from(WorkerHeartbeat)
                        .where(WorkerHeartbeat.seen_at > db_now(-ALIVE_S))
                    )
                if alive:
                    raise BackupError(
                        f"{alive} workers were seen in the last {ALIVE_S:.0f} s: stop the service"
                    )
        finally:
            engine.dispose()
    store = settings.data_dir / "store"
    has_files = any(path.is_file() for path in store.rglob("*")) if store.is_dir() else False
    if (tables or has_files) and not replace:
        raise BackupError(
            "the target is not empty: restore into a new data folder and database, or say "
            "--replace to lose what is there"
        )


def _put_files(settings: Settings, folder: Path, manifest: Manifest) -> None:
    store = Store(settings.data_dir)
    for path in (folder / "store" / "blobs").glob("*/*"):
        _put(path, store.path_of(path.name))
    for path in (folder / "store" / "bundles").glob("*/*"):
        _put(path, store.bundles / path.parent.name / path.name)
    for name, target in (("uploads", store.uploads), ("work", store.work)):
        origin = folder / "store" / name if name == "uploads" else folder / name
        shutil.rmtree(target)
        if origin.is_dir():
            shutil.copytree(origin, target)
        else:
            target.mkdir()
    if manifest.has_secrets:
        secrets = settings.data_dir / "secrets"
        shutil.rmtree(secrets, ignore_errors=True)
        shutil.copytree(folder / "secrets", secrets)
        secrets.chmod(0o700)
    for place in (store.blobs, store.bundles, store.uploads, store.work, settings.data_dir):
        fsync(place)


def _put(source: Path, target: Path) -> None:
    """The right bytes replace what is there; never a link into a backup that is itself a link."""
    draft = target.with_name(f".{target.name}.restoring")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.unlink(missing_ok=True)
    link_or_copy(source, draft)
    fsync(draft)
    draft.rename(target)
    fsync(target.parent)


def _put_sqlite(settings: Settings, source: Path) -> None:
    target = Path(str(make_url(settings.database_url).database))
    draft = target.with_name(f".{target.name}.restoring")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, draft)
    fsync(draft)
    for suffix in ("-wal", "-shm"):  # of the database that is replaced: they must not be replayed
        target.with_name(target.name + suffix).unlink(missing_ok=True)
    draft.rename(target)
    fsync(target.parent)


def _put_postgres(settings: Settings, source: Path) -> None:
    """In one transaction of pg_restore's; what is there goes first, in another."""
    engine = connect(settings.database_url)
    try:
        there = MetaData()
        there.reflect(engine)
        with engine.begin() as connection:
            there.drop_all(connection)
            for function in connection.scalars(text(_OWN_FUNCTIONS)).all():
                connection.execute(text(f"DROP FUNCTION {function}"))
    finally:
        engine.dispose()
    url = make_url(settings.database_url)
    run_postgres(
        "pg_restore",
        url,
        "--single-transaction",
        "--exit-on-error",
        "--no-owner",
        "--no-privileges",
        f"--dbname={url.database}",
        os.fspath(source),
    )


def _wake(settings: Settings) -> None:
    """No worker of the old service holds anything, and every run that waits is rung for."""
    engine = connect(settings.database_url)
    try:
        with sessions(engine)() as session:
            held = session.execute(
                select(Run.id, Run.fence, Run.attempt).where(Run.state.in_(HELD))
            ).all()
            is_canceled = Run.cancel_requested_at.is_not(None)
            session.execute(
                update(Run)
                .where(Run.state.in_(HELD))
                .values(
                    state=case((is_canceled, RunState.CANCELED), else_=RunState.INTERRUPTED),
                    finished_at=case((is_canceled, db_now()), else_=None),
                    attempt=Run.attempt - 1,
                    lease_owner=None,
                    lease_until=None,
                    suspect_at=None,
                ),
                execution_options={"synchronize_session": False},
            )
            for run_id, fence, attempt in held:
                session.execute(
                    update(RunAttempt)
                    .where(RunAttempt.run_id == run_id, RunAttempt.fence == fence)
                    .values(ended_at=db_now(), outcome="preempted", detail="restored"),
                    execution_options={"synchronize_session": False},
                )
                state = session.scalars(select(Run.state).where(Run.id == run_id)).one()
                data = {"state": state, "attempt": attempt - 1}
                session.add(RunEvent(run_id=run_id, type="state", data=data))
            session.execute(
                update(Run).where(Run.state.in_(CLAIMABLE)).values(publish_after=db_now()),
                execution_options={"synchronize_session": False},
            )
            session.execute(delete(WorkerHeartbeat))
            session.execute(delete(Idempotency).where(Idempotency.status.is_(None)))
            session.commit()
    finally:
        engine.dispose()
