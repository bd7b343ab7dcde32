"""A backup of everything, while the service works: database, store, checkpoints, secrets.

    manifest.json               schema revision, counts, what every file's digest is; written last
    database.sqlite3 | .dump    SQLite's online copy, or pg_dump's custom format
    store/blobs/ab/<sha256>     files, named by their digest
    store/bundles/<digest>/     models
    store/uploads/<id>/bytes    uploads in pieces, as far as they had got
    work/<run id>/              recipe and checkpoints of trainings that had not ended
    secrets/                    the key of the patients' pseudonyms (unless left out)

Order: files first, then the database, then the files that came in between. So a file that was
there when the backup began is kept even if its row is deleted meanwhile, and every row of the copy
has its file; where one went in between the copy is taken again. Stored files never change: on one
file system they are hard links, else copies. Checkpoints are taken before the database, so that a
training never goes on from a step that its record has not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tarfile
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from sqlalchemy import URL, Connection, create_engine, func, make_url, select, text

from models import bundle
from service import migrate
from service.backup_form import (
    DATABASES,
    MANIFEST,
    BackupError,
    Manifest,
    link_or_copy,
    run_postgres,
)
from service.db import TERMINAL, Base, Blob, ModelVersion, Run, Volume, connect
from service.settings import Settings
from service.storage import Store, fsync

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Made:
    """A finished backup."""

    path: Path
    manifest: Manifest


def backup(settings: Settings, target: Path, *, version: str, with_secrets: bool = True) -> Made:
    """Back up into a new folder, or into one file where `target` ends in `.tar`.

    What breaks off leaves nothing under the target's name: it is published by rename.

    Raises:
        BackupError: The target exists, pg_dump is missing or fails, or a row's file is missing.
    """
    target = target.absolute()
    if target.exists():
        raise BackupError(f"{target} exists already; a backup never overwrites")
    if target.is_relative_to(settings.data_dir):
        raise BackupError("the backup would lie inside the data folder that it is of")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    draft.mkdir(mode=0o700)
    try:
        manifest = _fill(settings, draft, version, with_secrets=with_secrets)
        if target.suffix == ".tar":
            _pack(draft, target)
        else:
            draft.rename(target)
            fsync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Made(target, manifest)


def _fill(settings: Settings, draft: Path, version: str, *, with_secrets: bool) -> Manifest:
    store = Store(settings.data_dir)
    engine = connect(settings.database_url)
    dialect: Literal["sqlite", "postgresql"] = (
        "sqlite" if engine.dialect.name == "sqlite" else "postgresql"
    )
    try:
        migrate.require_current(engine)
        with engine.connect() as connection:
            unended = set(connection.scalars(select(Run.id).where(Run.state.not_in(TERMINAL))))
        _keep_files(store, draft)
        _copy_tree(store.uploads, draft / "store" / "uploads")
        for run_id in sorted(unended):
            _copy_tree(store.work / run_id, draft / "work" / run_id)
    finally:
        engine.dispose()
    if with_secrets:
        _copy_tree(settings.data_dir / "secrets", draft / "secrets")
    database = draft / DATABASES[dialect]
    for _round in range(ROUNDS):
        url = make_url(settings.database_url)
        snapshot = _sqlite_copy if dialect == "sqlite" else _pg_dump
        facts = snapshot(url, database)
        _copy_tree(store.uploads, draft / "store" / "uploads")
        missing = _complete(store, draft, facts)
        if not missing:
            break
    else:
        raise BackupError(
            f"rows refer to {len(missing)} stored files that are missing: {missing[0]}"
        )
    _drop_unreferenced(draft, facts)
    files = {
        str(path.relative_to(draft)): bundle.sha256_of(path)
        for path in sorted(draft.rglob("*"))
        if path.is_file() and "blobs" not in path.relative_to(draft).parts[:2]
    }
    manifest = Manifest(
        product_version=version,
        revision=facts.revision,
        dialect=dialect,
        created_at=datetime.now(UTC),
        rows=facts.rows,
        num_blobs=len(facts.blobs),
        blob_bytes=sum(facts.blobs.values()),
        bundles=tuple(sorted(facts.bundles)),
        files=files,
        has_secrets=(draft / "secrets").is_dir(),
    )
    (draft / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    for path in (draft / MANIFEST, database, draft):
        fsync(path)
    return manifest


@dataclass(frozen=True, slots=True)
class Facts:
    """What a copy of the database says."""

    revision: str
    rows: dict[str, int]
    blobs: dict[str, int]
    bundles: frozenset[str]


def facts_of(connection: Connection) -> Facts:
    """Rows of every table, and the files that they need."""
    tables = Base.metadata.sorted_tables
    rows = {
        table.name: int(connection.scalar(select(func.count()).select_from(table)) or 0)
        for table in tables
    }
    # Sent again for another subject, a file that was removed is there: only that row needs it.
    needed = select(Volume.original_sha256).where(Volume.original_removed_at.is_(None))
    removed = select(Volume.original_sha256).where(
        Volume.original_removed_at.is_not(None), Volume.original_sha256.not_in(needed)
    )
    found = connection.execute(
        select(Blob.sha256, Blob.size_bytes).where(Blob.sha256.not_in(removed))
    ).all()
    blobs = {row.sha256: row.size_bytes for row in found}
    return Facts(
        revision=str(connection.scalar(text("SELECT version_num FROM alembic_version"))),
        rows=rows,
        blobs=blobs,
        bundles=frozenset(connection.scalars(select(ModelVersion.digest).distinct())),
    )


def _sqlite_copy(url: URL, target: Path) -> Facts:
    """SQLite's online copy in one step: a consistent state, and no writer waits for it."""
    target.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(str(url.database), timeout=30)) as source,
        contextlib.closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
    engine = create_engine(f"sqlite:///{target}", hide_parameters=True)
    try:
        with engine.connect() as connection:
            return facts_of(connection)
    finally:
        engine.dispose()


def _pg_dump(url: URL, target: Path) -> Facts:
    """pg_dump of an exported snapshot; what the dump holds is counted in that same snapshot."""
    engine = create_engine(url, hide_parameters=True, isolation_level="REPEATABLE READ")
    try:
        with engine.connect() as connection:
            snapshot = connection.scalar(text("SELECT pg_export_snapshot()"))
            run_postgres(
                "pg_dump",
                url,
                "--format=custom",
                "--no-owner",
                "--no-privileges",
                f"--snapshot={snapshot}",
                f"--file={target}",
            )
            return facts_of(connection)
    finally:
        engine.dispose()


def _keep_files(store: Store, draft: Path) -> None:
    """Every stored file that there is now, whatever becomes of its row."""
    (draft / "store" / "blobs").mkdir(parents=True)
    (draft / "store" / "bundles").mkdir()
    for path in store.blobs.glob("*/*"):
        link_or_copy(path, draft / "store" / "blobs" / path.parent.name / path.name)
    for path in store.bundles.glob("*/*"):
        link_or_copy(path, draft / "store" / "bundles" / path.parent.name / path.name)


def _complete(store: Store, draft: Path, facts: Facts) -> list[str]:
    """Fetch the files that came since; returns those that the copy's rows need and nobody has."""
    missing = []
    for sha256 in facts.blobs:
        kept = draft / "store" / "blobs" / sha256[:2] / sha256
        if not kept.exists() and not link_or_copy(store.path_of(sha256), kept):
            missing.append(sha256)
    for digest in facts.bundles:
        folder = store.bundle_dir(digest)
        kept = draft / "store" / "bundles" / digest
        for path in folder.iterdir() if folder.is_dir() else ():
            if not (kept / path.name).exists():
                link_or_copy(path, kept / path.name)
        if not (kept / bundle.MANIFEST).exists():
            missing.append(digest)
    return missing


def _drop_unreferenced(draft: Path, facts: Facts) -> None:
    for path in (draft / "store" / "blobs").glob("*/*"):
        if path.name not in facts.blobs:
            path.unlink()
    for path in (draft / "store" / "bundles").iterdir():
        if path.name not in facts.bundles:
            shutil.rmtree(path)


def _copy_tree(source: Path, target: Path) -> None:
    """Copy files that may change, grow or go while they are copied."""
    for folder, _, names in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(Path(folder) / name, here / name, follow_symlinks=False)


def _pack(folder: Path, target: Path) -> None:
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with draft.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                archive.add(folder, arcname="backup")
            file.flush()
            os.fsync(file.fileno())
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
    fsync(target.parent)
