"""Bringing a database to the tables that this version knows; works from an installed wheel.

One migrator at a time: on PostgreSQL an advisory lock (migrations/env.py), on SQLite a lock on a
file beside the database; the kernel and the server drop both with a killed process. A migration is
one transaction, so one that breaks off leaves the tables as they were.

Every process asks at its start whether the tables are its own, and the API at each look at its
health. That reads one row and the names of the revisions; who migrates alone loads Alembic.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Engine, column, inspect, make_url, select, table

import migrations
from service.db import connect

if TYPE_CHECKING:
    from alembic.config import Config

_VERSIONS = table("alembic_version", column("version_num"))
_REVISION = re.compile(
    r"""^revision = ["'](?P<id>\w+)["']\ndown_revision = (?:None|["'](?P<below>\w+)["'])$""",
    re.MULTILINE,
)


class SchemaError(Exception):
    """The database is not at this version's tables; the message says what to do."""


def upgrade(url: str, revision: str = "head") -> None:
    """Migrate up to a revision; safe to run again, and from several processes at once.

    Args:
        url: SQLAlchemy URL of the database.
        revision: `head` or a revision's id.

    Raises:
        SchemaError: The database is of a newer version.
    """
    from alembic import command

    path = make_url(url).database
    if url.startswith("sqlite") and path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _alone(url):
        _refuse_newer(url)
        command.upgrade(_config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Migrate down to a revision (`base` removes everything)."""
    from alembic import command

    with _alone(url):
        _refuse_newer(url)
        command.downgrade(_config(url), revision)


def is_current(engine: Engine) -> bool:
    """Whether the database is at this version's newest revision."""
    return found(engine) == head()


def require_current(engine: Engine) -> None:
    """Refuse to work on tables of another version.

    Raises:
        SchemaError: They are older (`pcrl migrate` helps) or newer.
    """
    at = found(engine)
    if at == head():
        return
    if at is not None and not is_known(at):
        raise SchemaError(_newer(at))
    raise SchemaError(
        f"the database is at revision {at or 'none'}, this version needs {head()}: back up, then "
        "run `pcrl migrate`"
    )


def found(engine: Engine) -> str | None:
    """The database's revision; None where no migration has run."""
    with engine.connect() as connection:
        if not inspect(connection).has_table(_VERSIONS.name):
            return None
        heads = connection.scalars(select(_VERSIONS.c.version_num)).all()
    return "+".join(sorted(heads)) or None


def head() -> str:
    """The newest revision that this version knows."""
    below = _revisions()
    return "+".join(sorted(set(below) - set(below.values())))


def is_known(revision: str) -> bool:
    """Whether this version has the revision; a newer version's it has not."""
    return revision in _revisions()


def _refuse_newer(url: str) -> None:
    engine = connect(url)
    try:
        at = found(engine)
    finally:
        engine.dispose()
    if at is not None and not is_known(at):
        raise SchemaError(_newer(at))


def _newer(at: str) -> str:
    return (
        f"the database is at revision {at}, which this version does not know (its newest is "
        f"{head()}): install the version that made it, or restore a backup"
    )


@contextlib.contextmanager
def _alone(url: str) -> Iterator[None]:
    """Hold the lock of a SQLite database's migrator; of PostgreSQL see migrations/env.py."""
    path = make_url(url).database
    if not url.startswith("sqlite") or not path:
        yield
        return
    descriptor = os.open(f"{path}.migrate", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@lru_cache(maxsize=1)
def _revisions() -> dict[str, str | None]:
    """Each revision that this version knows, with the one below it."""
    below = {}
    for file in (_folder() / "versions").glob("[0-9]*.py"):
        found = _REVISION.search(file.read_text(encoding="utf-8"))
        assert found is not None, file
        below[found["id"]] = found["below"]
    return below


def _folder() -> Path:
    return Path(migrations.__file__).parent


def _config(url: str) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_folder()))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    return config
