"""What SQLite cannot do to a table that is there: change its constraints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op


def rebuild(table: str, changes: list[tuple[str, str, str, str]]) -> None:
    """A SQLite table with other constraints: its own definition, rewritten, with its rows.

    Foreign keys are off in migrations (migrations/env.py), so that dropping it takes nothing along.
    """
    connection = op.get_bind()
    parts = sa.text(
        "SELECT type, sql FROM sqlite_master WHERE tbl_name = :table AND sql IS NOT NULL"
    )
    found = connection.execute(parts, {"table": table}).all()
    definition = next(row.sql for row in found if row.type == "table")
    for before, was, after, becomes in changes:
        old, new = f"CONSTRAINT {before} {was}", f"CONSTRAINT {after} {becomes}"
        if definition.count(old) != 1:
            raise RuntimeError(f"table {table} has no {old}")
        definition = definition.replace(old, new)
    names = ", ".join(column["name"] for column in sa.inspect(connection).get_columns(table))
    head, columns = definition.split("(", 1)  # SQLite quotes the name of a table that was renamed
    if head.replace('"', "").split() != ["CREATE", "TABLE", table]:
        raise RuntimeError(f"table {table} is not as it was made")
    op.execute(f"CREATE TABLE {table}_new ({columns}")
    op.execute(f"INSERT INTO {table}_new ({names}) SELECT {names} FROM {table}")  # noqa: S608
    op.execute(f"DROP TABLE {table}")
    op.execute(f"ALTER TABLE {table}_new RENAME TO {table}")
    for row in found:
        if row.type in {"index", "trigger"}:
            op.execute(row.sql)
