"""Operation: what a run needs, what a worker has, and when a sent file was removed.

Only columns with defaults and two indexes: the version before works on beside it.

Revision: 0006, after 0005; 2026-11-25
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service import db

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

WAITING = sa.text("state IN ('interrupted', 'queued')")


def upgrade() -> None:
    op.add_column(
        "run", sa.Column("needs_device", sa.String(length=8), server_default="", nullable=False)
    )
    op.add_column(
        "run", sa.Column("needs_memory_bytes", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column(
        "worker_heartbeat",
        sa.Column("device_kind", sa.String(length=8), server_default="cpu", nullable=False),
    )
    op.add_column(
        "worker_heartbeat",
        sa.Column("memory_bytes", sa.BigInteger(), server_default="0", nullable=False),
    )
    op.add_column("worker_heartbeat", sa.Column("used_bytes", sa.BigInteger(), nullable=True))
    op.add_column("volume", sa.Column("original_removed_at", db.UtcDateTime(), nullable=True))
    op.create_index(
        "ix_run_waiting",
        "run",
        ["queue", "created_by", "priority", "created_at", "id"],
        sqlite_where=WAITING,
        postgresql_where=WAITING,
    )
    op.create_index("ix_run_share", "run", ["queue", "created_by", "started_at"])


def downgrade() -> None:
    op.drop_index("ix_run_share", table_name="run")
    op.drop_index("ix_run_waiting", table_name="run")
    op.drop_column("volume", "original_removed_at")
    for column in ("used_bytes", "memory_bytes", "device_kind"):
        op.drop_column("worker_heartbeat", column)
    for column in ("needs_memory_bytes", "needs_device"):
        op.drop_column("run", column)
