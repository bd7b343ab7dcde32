"""The queue at length: indexes by which a claim, a sweep and a place in it read no table row.

Only indexes: the version before works on beside it.

Revision: 0008, after 0007; 2026-11-29
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

WAITING = ["queue", "created_by", "priority", "created_at", "id"]
SHARE = ["queue", "created_by", "started_at"]


def upgrade() -> None:
    is_open = "state IN ('interrupted', 'queued') AND cancel_requested_at IS NULL"
    _again("ix_run_waiting", WAITING, is_open)
    _make("ix_run_due", ["publish_after"], is_open)
    _again("ix_run_share", SHARE, "started_at IS NOT NULL")
    _make("ix_run_held", ["queue", "created_by"], "state IN ('canceling', 'running', 'starting')")


def downgrade() -> None:
    op.drop_index("ix_run_held", table_name="run")
    op.drop_index("ix_run_due", table_name="run")
    _again("ix_run_share", SHARE, None)
    _again("ix_run_waiting", WAITING, "state IN ('interrupted', 'queued')")


def _again(name: str, columns: list[str], where: str | None) -> None:
    op.drop_index(name, table_name="run")
    _make(name, columns, where)


def _make(name: str, columns: list[str], where: str | None) -> None:
    condition = sa.text(where) if where is not None else None
    op.create_index(name, "run", columns, sqlite_where=condition, postgresql_where=condition)
