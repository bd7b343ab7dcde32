"""What changed among the stored embeddings, so that a copy in memory can be kept true.

Triggers write it: a row that goes with its volume or run is noted as well as one that is replaced.

Revision: 0004, after 0003; 2026-11-25
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

KEPT = 10_000
"""Changes of a bundle that are kept; a copy that is further behind reads everything again."""

# The upsert locks the bundle's row until the commit, so revisions become visible in their order.
_BODY = f"""
    INSERT INTO embedding_space (bundle_digest, revision) VALUES ({{row}}.bundle_digest, 1)
        ON CONFLICT (bundle_digest) DO UPDATE SET revision = embedding_space.revision + 1;
    INSERT INTO embedding_change (bundle_digest, revision, volume_id)
        SELECT bundle_digest, revision, {{row}}.volume_id FROM embedding_space
        WHERE bundle_digest = {{row}}.bundle_digest;
    DELETE FROM embedding_change WHERE bundle_digest = {{row}}.bundle_digest AND revision <=
        (SELECT revision FROM embedding_space WHERE bundle_digest = {{row}}.bundle_digest) - {KEPT};
"""  # noqa: S608 - constants alone
_ROWS = {"INSERT": "NEW", "UPDATE": "NEW", "DELETE": "OLD"}


def upgrade() -> None:
    op.create_table(
        "embedding_space",
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("bundle_digest", name="pk_embedding_space"),
    )
    op.create_table(
        "embedding_change",
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint("bundle_digest", "revision", name="pk_embedding_change"),
    )
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    for action, row in _ROWS.items():
        name = f"embedding_{action.lower()}"
        body = _BODY.format(row=row)
        if is_postgresql:
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


def downgrade() -> None:
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    for action in _ROWS:
        name = f"embedding_{action.lower()}"
        if is_postgresql:
            op.execute(f"DROP TRIGGER {name} ON embedding")
            op.execute(f"DROP FUNCTION {name}()")
        else:
            op.execute(f"DROP TRIGGER {name}")
    op.drop_table("embedding_change")
    op.drop_table("embedding_space")
