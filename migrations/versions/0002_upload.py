"""Uploads in pieces: one new table, so the version before works on beside it.

Revision: 0002, after 0001; 2026-11-25
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service import db

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "upload",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("received_bytes", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=10), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("series_selector", sa.String(length=64), nullable=False),
        sa.Column("volume_id", sa.String(length=40), nullable=True),
        sa.Column("created_by", sa.String(length=40), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.Column("updated_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.CheckConstraint("kind IN ('image', 'labels')", name="ck_upload_kind"),
        sa.CheckConstraint(
            "received_bytes BETWEEN 0 AND size_bytes", name="ck_upload_received_bytes"
        ),
        sa.ForeignKeyConstraint(
            ["volume_id"], ["volume.id"], name="fk_upload_volume_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_upload"),
        sa.UniqueConstraint(
            "created_by",
            "sha256",
            "kind",
            "subject",
            "series_selector",
            name="uq_upload_created_by_sha256_kind_subject_series_selector",
        ),
    )
    op.create_index("ix_upload_updated_at", "upload", ["updated_at"])
    op.create_index("ix_upload_volume_id", "upload", ["volume_id"])


def downgrade() -> None:
    op.drop_table("upload")
