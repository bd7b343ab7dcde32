"""Models that are wanted warm, and what each inference worker has loaded: two new tables.

Workers fill them anew when they start, so going down loses nothing.

Revision: 0007, after 0006; 2026-11-25
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service import db

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "warm_request",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("until", db.UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_warm_request"),
    )
    op.create_table(
        "warm_model",
        sa.Column("worker", sa.String(length=120), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("error", sa.String(length=40), nullable=True),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.PrimaryKeyConstraint("worker", "digest", name="pk_warm_model"),
    )


def downgrade() -> None:
    op.drop_table("warm_model")
    op.drop_table("warm_request")
