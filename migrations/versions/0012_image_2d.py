"""2D images among the scans, and classes of a dataset's items.

A kind of scan more and a column that may be NULL: the version before works on beside it, as long as
no 2D image was sent. Going down is refused while there is one, or a dataset with classes: nothing
below reads the one, and the other's digest covers what would be lost.

Revision: 0012, after 0011; 2026-11-30
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.sqlite import rebuild

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

BEFORE = "CHECK (kind IN ('image', 'labels'))"
AFTER = "CHECK (kind IN ('image', 'labels', 'image_2d'))"
NAMES = {
    "volume": ("ck_volume_kind", "ck_volume_kind"),
    "upload": ("ck_upload_ck_upload_kind", "ck_upload_kind"),
}
"""By table: the constraint's name before, and after. 0002 let the convention name it twice."""


def upgrade() -> None:
    for table, (before, after) in NAMES.items():
        _check(table, (before, BEFORE), (after, AFTER))
    op.add_column("dataset_item", sa.Column("classes", sa.JSON(), nullable=True))


def downgrade() -> None:
    for table in NAMES:
        _refuse_images(table)
    _refuse_classes()
    op.drop_column("dataset_item", "classes")
    for table, (before, after) in NAMES.items():
        _check(table, (after, AFTER), (before, BEFORE))


def _check(table: str, old: tuple[str, str], new: tuple[str, str]) -> None:
    """Put a constraint, by name and definition, in the place of another."""
    if op.get_bind().dialect.name == "sqlite":
        rebuild(table, [(*old, *new)])
        return
    op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {old[0]}")
    op.execute(f"ALTER TABLE {table} ADD CONSTRAINT {new[0]} {new[1]}")


def _refuse_images(table: str) -> None:
    found = sa.text(f"SELECT count(*) FROM {table} WHERE kind = 'image_2d'")  # noqa: S608
    if number := op.get_bind().scalar(found):
        raise RuntimeError(
            f"{number} rows of {table} are 2D images, which a version before reads as nothing; "
            "delete them, or go down with a backup from before"
        )


def _refuse_classes() -> None:
    found = sa.text(
        "SELECT count(*) FROM dataset_item "
        "WHERE classes IS NOT NULL AND CAST(classes AS TEXT) NOT IN ('null', '{}')"
    )
    if number := op.get_bind().scalar(found):
        raise RuntimeError(
            f"{number} items of datasets have classes, which their datasets' digests cover and the "
            "version before drops; delete those datasets, or go down with a backup from before"
        )
