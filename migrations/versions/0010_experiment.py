"""Experiments: a plan, and its trainings.

New tables only: the version before works on beside them.

Revision: 0010, after 0009; 2026-11-29
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service import db

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

WAITING = sa.text("run_id IS NULL AND error IS NULL")


def upgrade() -> None:
    op.create_table(
        "experiment",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("source_dataset_id", sa.String(length=40), nullable=False),
        sa.Column("target_dataset_id", sa.String(length=40), nullable=False),
        sa.Column("plan", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_by", sa.String(length=40), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.Column("canceled_at", db.UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["source_dataset_id"], ["dataset.id"], name="fk_experiment_source_dataset_id"
        ),
        sa.ForeignKeyConstraint(
            ["target_dataset_id"], ["dataset.id"], name="fk_experiment_target_dataset_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_experiment"),
    )
    op.create_index("ix_experiment_created_at_id", "experiment", ["created_at", "id"])
    op.create_index("ix_experiment_source_dataset_id", "experiment", ["source_dataset_id"])
    op.create_index("ix_experiment_target_dataset_id", "experiment", ["target_dataset_id"])
    op.create_table(
        "experiment_cell",
        sa.Column("experiment_id", sa.String(length=40), nullable=False),
        sa.Column("key", sa.String(length=100), nullable=False),
        sa.Column("run_id", sa.String(length=40), nullable=True),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["experiment_id"],
            ["experiment.id"],
            name="fk_experiment_cell_experiment_id",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_experiment_cell_run_id"),
        sa.PrimaryKeyConstraint("experiment_id", "key", name="pk_experiment_cell"),
    )
    op.create_index("ix_experiment_cell_run_id", "experiment_cell", ["run_id"])
    op.create_index(
        "ix_experiment_cell_waiting",
        "experiment_cell",
        ["experiment_id"],
        sqlite_where=WAITING,
        postgresql_where=WAITING,
    )


def downgrade() -> None:
    op.drop_table("experiment_cell")
    op.drop_table("experiment")
