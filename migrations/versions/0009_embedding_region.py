"""Embeddings of regions: the region is a part of the key, and each has a space of its own.

The table is made anew, since SQLite changes no key; what the triggers wrote of changes begins anew
too, and a copy in memory reads everything once. Going down keeps the vectors of whole volumes.

Revision: 0009, after 0008; 2026-11-29
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service import db

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

KEPT = 10_000
"""Changes of a space that are kept; a copy that is further behind reads everything again."""

_LENGTHS = {"bundle_digest": 64, "region": 200}
_ROWS = {"INSERT": "NEW", "UPDATE": "NEW", "DELETE": "OLD"}
_FACTS = "model_name, model_version, run_id, dims, vector, created_at"


def upgrade() -> None:
    _drop_triggers()
    op.rename_table("embedding", "embedding_before")
    _drop_names("embedding_before")
    _create_embedding(("bundle_digest", "region", "volume_id"))
    op.execute(
        f"INSERT INTO embedding (bundle_digest, region, volume_id, {_FACTS}) "  # noqa: S608
        f"SELECT bundle_digest, '', volume_id, {_FACTS} FROM embedding_before"
    )
    op.drop_table("embedding_before")
    _create_indexes()
    _record_changes(("bundle_digest", "region"))


def downgrade() -> None:
    _drop_triggers()
    op.rename_table("embedding", "embedding_before")
    _drop_names("embedding_before")
    _create_embedding(("bundle_digest", "volume_id"))
    op.execute(
        f"INSERT INTO embedding (bundle_digest, volume_id, {_FACTS}) "  # noqa: S608
        f"SELECT bundle_digest, volume_id, {_FACTS} FROM embedding_before WHERE region = ''"
    )
    op.drop_table("embedding_before")
    _create_indexes()
    _record_changes(("bundle_digest",))


def _is_postgresql() -> bool:
    return op.get_bind().dialect.name == "postgresql"


def _drop_names(table: str) -> None:
    """What the new table will be called by: constraints on PostgreSQL, indexes on both."""
    op.drop_index("ix_embedding_run_id", table_name=table)
    op.drop_index("ix_embedding_volume_id", table_name=table)
    if _is_postgresql():
        op.drop_constraint("pk_embedding", table)
        op.drop_constraint("fk_embedding_run_id", table)
        op.drop_constraint("fk_embedding_volume_id", table)
        op.drop_constraint(op.f("ck_embedding_dims"), table)


def _create_embedding(key: tuple[str, ...]) -> None:
    region = (
        [sa.Column("region", sa.String(length=_LENGTHS["region"]), nullable=False)]
        if "region" in key
        else []
    )
    op.create_table(
        "embedding",
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        *region,
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=100), nullable=False),
        sa.Column("model_version", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("dims", sa.Integer(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.CheckConstraint(
            "dims > 0 AND length(vector) = 4 * dims", name=op.f("ck_embedding_dims")
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["run.id"], name="fk_embedding_run_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["volume_id"], ["volume.id"], name="fk_embedding_volume_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint(*key, name="pk_embedding"),
    )


def _create_indexes() -> None:
    op.create_index("ix_embedding_run_id", "embedding", ["run_id"])
    op.create_index("ix_embedding_volume_id", "embedding", ["volume_id"])


def _drop_triggers() -> None:
    for action in _ROWS:
        name = f"embedding_{action.lower()}"
        if _is_postgresql():
            op.execute(f"DROP TRIGGER {name} ON embedding")
            op.execute(f"DROP FUNCTION {name}()")
        else:
            op.execute(f"DROP TRIGGER {name}")


def _record_changes(space: tuple[str, ...]) -> None:
    """The tables of changes, the triggers that write them, and the spaces that are there."""
    op.drop_table("embedding_change")
    op.drop_table("embedding_space")
    columns = [sa.Column(name, sa.String(length=_LENGTHS[name]), nullable=False) for name in space]
    op.create_table(
        "embedding_space",
        *columns,
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint(*space, name="pk_embedding_space"),
    )
    op.create_table(
        "embedding_change",
        *[sa.Column(one.name, one.type, nullable=False) for one in columns],
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint(*space, "revision", name="pk_embedding_change"),
    )
    key = ", ".join(space)
    op.execute(
        f"INSERT INTO embedding_space ({key}, revision) "  # noqa: S608
        f"SELECT DISTINCT {key}, 1 FROM embedding"
    )
    op.execute(
        f"INSERT INTO embedding_change ({key}, revision, volume_id) "  # noqa: S608
        f"SELECT {key}, 1, min(volume_id) FROM embedding GROUP BY {key}"
    )
    for action, row in _ROWS.items():
        name = f"embedding_{action.lower()}"
        body = _body(space, row)
        if _is_postgresql():
            op.execute(
                f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN {body} RETURN NULL; END $$"
            )
            op.execute(
                f"CREATE TRIGGER {name} AFTER {action} ON embedding "
                f"FOR EACH ROW EXECUTE FUNCTION {name}()"
            )
        else:
            op.execute(f"CREATE TRIGGER {name} AFTER {action} ON embedding BEGIN {body} END")


def _body(space: tuple[str, ...], row: str) -> str:
    """Of a trigger. The upsert locks the space's row until the commit, so revisions become visible
    in their order."""
    key, values = ", ".join(space), ", ".join(f"{row}.{name}" for name in space)
    same = " AND ".join(f"{name} = {row}.{name}" for name in space)
    return f"""
    INSERT INTO embedding_space ({key}, revision) VALUES ({values}, 1)
        ON CONFLICT ({key}) DO UPDATE SET revision = embedding_space.revision + 1;
    INSERT INTO embedding_change ({key}, revision, volume_id)
        SELECT {key}, revision, {row}.volume_id FROM embedding_space WHERE {same};
    DELETE FROM embedding_change WHERE {same} AND revision <=
        (SELECT revision FROM embedding_space WHERE {same}) - {KEPT};
"""  # noqa: S608 - constants alone
