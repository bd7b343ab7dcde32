"""Embeddings to search: one new table, filled from the runs that made them.

The runs keep their vectors, so the version before works on beside it and going down loses nothing.

Revision: 0003, after 0002; 2026-11-25
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import sqlalchemy as sa
from alembic import op

from service import db

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BLOCK = 200

_run = sa.table(
    "run",
    sa.column("id", sa.String),
    sa.column("kind", sa.String),
    sa.column("state", sa.String),
    sa.column("spec", sa.JSON),
    sa.column("result", sa.JSON),
    sa.column("volume_id", sa.String),
    sa.column("created_at", db.UtcDateTime),
    sa.column("finished_at", db.UtcDateTime),
)


def upgrade() -> None:
    table = op.create_table(
        "embedding",
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
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
        sa.PrimaryKeyConstraint("bundle_digest", "volume_id", name="pk_embedding"),
    )
    op.create_index("ix_embedding_run_id", "embedding", ["run_id"])
    op.create_index("ix_embedding_volume_id", "embedding", ["volume_id"])
    connection = op.get_bind()
    for row in _made(connection):
        key = sa.and_(
            table.c.bundle_digest == row["bundle_digest"], table.c.volume_id == row["volume_id"]
        )
        connection.execute(sa.delete(table).where(key))  # of an older run
        connection.execute(sa.insert(table).values(**row))


def downgrade() -> None:
    op.drop_table("embedding")


def _made(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """A row for each succeeded embedding, the oldest run first; a few runs in memory at a time."""
    key = sa.tuple_(_run.c.created_at, _run.c.id)
    wanted = (
        sa.select(_run)
        .where(_run.c.kind == "embed", _run.c.state == "succeeded", _run.c.volume_id.is_not(None))
        .order_by(_run.c.created_at, _run.c.id)
        .limit(BLOCK)
    )
    statement = wanted
    while runs := connection.execute(statement).all():
        for run in runs:
            if (row := _row(run)) is not None:
                yield row
        last = sa.tuple_(sa.literal(runs[-1].created_at, db.UtcDateTime()), runs[-1].id)
        statement = wanted.where(key > last)


def _row(run: Any) -> dict[str, Any] | None:
    """None where the run's record holds no whole vector: the scan can be embedded again."""
    try:
        vector = np.asarray(run.result["vector"], dtype="<f4")
        model = run.spec["model"]
        facts = {
            "bundle_digest": str(run.result.get("bundle_digest") or model["digest"]),
            "model_name": str(model["name"]),
            "model_version": int(model["version"]),
        }
    except (KeyError, TypeError, ValueError):
        return None
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
        return None
    return {
        **facts,
        "volume_id": run.volume_id,
        "run_id": run.id,
        "dims": vector.size,
        "vector": vector.tobytes(),
        "created_at": run.finished_at or run.created_at,
    }
