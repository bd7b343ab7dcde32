"""How Alembic runs: one migrator at a time, everything in one transaction.

`service.migrate` gives the URL by `config.attributes`; the `alembic` command takes it from the
product's settings.
"""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import Connection, event, text

from service import db
from service.settings import get_settings

LOCK = 0x7063726C  # "pcrl"


def render_item(kind: str, item: Any, context: AutogenContext) -> str | Literal[False]:
    """Write our own column type and clock into new revisions by their module."""
    if kind == "type" and isinstance(item, db.UtcDateTime):
        context.imports.add("from service import db")
        return "db.UtcDateTime()"
    if kind == "server_default":
        context.imports.add("from service import db")
        return "db.db_now()"
    return False


def migrate(connection: Connection) -> None:
    """Run the asked revisions inside the connection's transaction."""
    if connection.dialect.name == "postgresql":
        # Wait for another migrator however long it takes, but for traffic 5 s at most: who waits
        # for a table's lock makes every later query of that table wait behind it.
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        connection.execute(text("SET LOCAL lock_timeout = '5s'"))
    context.configure(
        connection=connection,
        target_metadata=db.Base.metadata,
        render_as_batch=True,
        render_item=render_item,
        transactional_ddl=True,
    )
    context.run_migrations()
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if broken:
            raise RuntimeError(f"rows of {broken[0][0]} would refer to nothing")


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    engine = db.connect(context.config.attributes.get("url") or get_settings().database_url)
    if engine.dialect.name == "sqlite":
        # A table that is made anew is dropped on the way: nothing may go along with its rows. In a
        # transaction this could not be changed; what refers to nothing at its end undoes it.
        event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys=OFF"))
    try:
        with engine.begin() as connection:
            migrate(connection)
    finally:
        engine.dispose()
