"""Room for the path of a request that names a model: names have up to 100 characters.

Going down is refused while there is a longer path; upkeep deletes them after a day.

Revision: 0013, after 0012; 2026-11-30
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

BEFORE, AFTER = 120, 250


def upgrade() -> None:
    _widen(BEFORE, AFTER)


def downgrade() -> None:
    longer = sa.text("SELECT count(*) FROM idempotency WHERE length(route) > :most")
    if number := op.get_bind().scalar(longer, {"most": BEFORE}):
        raise RuntimeError(
            f"{number} rows of idempotency hold paths of more than {BEFORE} characters; "
            "they are deleted a day after their request"
        )
    _widen(AFTER, BEFORE)


def _widen(was: int, becomes: int) -> None:
    with op.batch_alter_table("idempotency") as table:
        table.alter_column("route", existing_type=sa.String(was), type_=sa.String(becomes))
