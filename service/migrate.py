"""Bringing a database to the tables that this version knows; works from an installed wheel."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, make_url

import migrations


def upgrade(url: str, revision: str = "head") -> None:
    """Migrate up to a revision; safe to run again, and from several processes at once.

    Args:
        url: SQLAlchemy URL of the database.
        revision: `head` or a revision's id.
    """
    path = make_url(url).database
    if url.startswith("sqlite") and path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    command.upgrade(_config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Migrate down to a revision (`base` removes everything)."""
    command.downgrade(_config(url), revision)


def is_current(engine: Engine) -> bool:
    """Whether the database is at this version's newest revision."""
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_heads()
    return set(found) == set(ScriptDirectory.from_config(_config("")).get_heads())


def _config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = url
    return config
