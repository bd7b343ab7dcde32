"""What was live when, golden cases, checks of versions, batches: four tables, three columns.

The version before works on beside it: it writes no new column and reads no new table. Going down
forgets golden cases, checks and batches; their runs stay, except those of kinds that the version
before does not know (`check`, `import`).

Revision: 0005, after 0004; 2026-11-25
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service import db

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MOVES = "ix_alias_event_model_name_alias_seq"


def upgrade() -> None:
    op.add_column(
        "alias_event",
        sa.Column("cause", sa.String(length=10), server_default="set", nullable=False),
    )
    op.add_column("alias_event", sa.Column("override_reason", sa.String(length=500)))
    op.add_column("alias_event", sa.Column("unmet", sa.JSON(none_as_null=True)))
    op.execute("UPDATE alias_event SET cause = 'remove' WHERE version IS NULL")
    op.create_index(MOVES, "alias_event", ["model_name", "alias", "seq"])
    op.create_table(
        "golden_case",
        sa.Column("model_name", sa.String(length=100), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.Column("labels_id", sa.String(length=40), nullable=True),
        sa.Column("expected", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("set_by", sa.String(length=40), nullable=False),
        sa.Column("updated_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        _key("golden_case", "model_name", "model.name"),
        _key("golden_case", "volume_id", "volume.id"),
        _key("golden_case", "labels_id", "volume.id"),
        sa.PrimaryKeyConstraint("model_name", "name", name="pk_golden_case"),
    )
    op.create_index("ix_golden_case_volume_id", "golden_case", ["volume_id"])
    op.create_index("ix_golden_case_labels_id", "golden_case", ["labels_id"])
    op.create_table(
        "version_check",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("model_name", sa.String(length=100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("golden_digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        _key("version_check", "run_id", "run.id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["model_name", "version"],
            ["model_version.model_name", "model_version.version"],
            name="fk_version_check_model_name_version",
        ),
        sa.PrimaryKeyConstraint("run_id", name="pk_version_check"),
    )
    op.create_index(
        "ix_version_check_model_name_version_created_at",
        "version_check",
        ["model_name", "version", "created_at"],
    )
    op.create_table(
        "batch",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("dataset_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("model", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("options", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_by", sa.String(length=40), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.CheckConstraint("kind IN ('segment', 'embed')", name=op.f("ck_batch_kind")),
        _key("batch", "dataset_id", "dataset.id"),
        sa.PrimaryKeyConstraint("id", name="pk_batch"),
    )
    op.create_index("ix_batch_dataset_id", "batch", ["dataset_id"])
    op.create_index("ix_batch_created_at_id", "batch", ["created_at", "id"])
    op.create_table(
        "batch_item",
        sa.Column("batch_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        _key("batch_item", "batch_id", "batch.id", ondelete="CASCADE"),
        _key("batch_item", "volume_id", "volume.id"),
        _key("batch_item", "run_id", "run.id"),
        sa.PrimaryKeyConstraint("batch_id", "position", name="pk_batch_item"),
    )
    op.create_index("ix_batch_item_volume_id", "batch_item", ["volume_id"])
    op.create_index("ix_batch_item_run_id", "batch_item", ["run_id"])


def downgrade() -> None:
    for table in ("batch_item", "batch", "version_check", "golden_case"):
        op.drop_table(table)
    op.execute(
        "UPDATE model_version SET run_id = NULL "
        "WHERE run_id IN (SELECT id FROM run WHERE kind IN ('check', 'import'))"
    )
    for table in ("run_event", "run_attempt", "artifact"):  # SQLite's cascade is off in migrations
        op.execute(
            f"DELETE FROM {table} WHERE run_id IN "  # noqa: S608  # names of ours
            "(SELECT id FROM run WHERE kind IN ('check', 'import'))"
        )
    op.execute("DELETE FROM run WHERE kind IN ('check', 'import')")
    op.drop_index(MOVES, "alias_event")
    for column in ("unmet", "override_reason", "cause"):
        op.drop_column("alias_event", column)


def _key(
    table: str, column: str, target: str, *, ondelete: str | None = None
) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        [column], [target], name=f"fk_{table}_{column}", ondelete=ondelete
    )
