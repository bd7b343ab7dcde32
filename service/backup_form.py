"""The form of a backup: its manifest, how it is opened and checked, and what both ways share."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import URL

from models import bundle

MANIFEST = "manifest.json"
DATABASES = {"sqlite": "database.sqlite3", "postgresql": "database.dump"}


class BackupError(Exception):
    """A backup that cannot be made or used; the message says why, for an operator."""


class Manifest(BaseModel):
    """What a backup holds. Blobs are named by their digest; other files are listed with theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal[1] = 1
    product_version: str
    revision: str
    dialect: Literal["sqlite", "postgresql"]
    created_at: datetime
    rows: dict[str, int]
    num_blobs: int
    blob_bytes: int
    bundles: tuple[str, ...]
    files: dict[str, str]
    """SHA-256 of every other file by its path in the backup."""
    has_secrets: bool


@contextlib.contextmanager
def opened(source: Path, scratch: Path) -> Iterator[tuple[Path, Manifest]]:
    """A backup's folder and manifest; a file is unpacked into a folder below `scratch` meanwhile.

    Raises:
        BackupError: It is no backup, or not a whole one.
    """
    unpacked: Path | None = None
    try:
        folder = source
        if source.is_file():
            unpacked = scratch / f"restore-{uuid.uuid4().hex}"
            unpacked.mkdir(parents=True, mode=0o700)
            try:
                with tarfile.open(source) as archive:
                    archive.extractall(unpacked, filter="data")
            except tarfile.TarError:
                raise BackupError(f"{source} is not a whole tar archive") from None
            folder = unpacked / "backup"
        try:
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            raise BackupError(f"{source} has no {MANIFEST}: it is not a whole backup") from None
        except ValueError:
            raise BackupError(f"{source} has a {MANIFEST} that this version cannot read") from None
        yield folder, manifest
    finally:
        if unpacked is not None:
            shutil.rmtree(unpacked, ignore_errors=True)


def verify(folder: Path, manifest: Manifest) -> None:
    """Hash every file of a backup.

    Raises:
        BackupError: One is missing or has changed; it is named.
    """
    blobs = sorted((folder / "store" / "blobs").glob("*/*"))
    if len(blobs) != manifest.num_blobs:
        raise BackupError(f"{len(blobs)} stored files are there, {manifest.num_blobs} belong")
    for path in blobs:
        if bundle.sha256_of(path) != path.name:
            raise BackupError(f"{path.relative_to(folder)} has changed")
    for name, sha256 in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BackupError(f"the manifest names {name!r}, outside the backup")
        if not path.is_file():
            raise BackupError(f"{name} is missing")
        if bundle.sha256_of(path) != sha256:
            raise BackupError(f"{name} has changed")


def link_or_copy(source: Path, target: Path) -> bool:
    """A second name for a file that never changes, or a copy of it; False if it is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            shutil.copyfile(source, target)
    except FileNotFoundError:
        return False
    return True


def run_postgres(program: str, url: URL, *arguments: str) -> None:
    """Run one of PostgreSQL's programs on a database; the password never shows in `ps`.

    Raises:
        BackupError: It is not installed, or fails.
    """
    found = shutil.which(program)
    if found is None:
        raise BackupError(
            f"{program} is not installed: install PostgreSQL's client of the server's version "
            "(postgresql-client), or run it where the server is (docs/deployment.md)"
        )
    environment = {
        **os.environ,
        "PGHOST": url.host or "",
        "PGPORT": str(url.port or ""),
        "PGUSER": url.username or "",
        "PGDATABASE": url.database or "",
        "PGPASSWORD": url.password or "",
    }
    environment = {name: value for name, value in environment.items() if value}
    done = subprocess.run(  # noqa: S603 - a program of PostgreSQL's, and arguments of ours
        [found, "--no-password", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise BackupError(f"{program} failed: {said[0][:300]}")
