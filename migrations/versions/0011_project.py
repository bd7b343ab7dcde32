"""Projects: each scan, dataset, run, batch and model has one; what is there goes to `default`.

New columns have a default and keys are only widened, so the version before works on beside it, in
the default project. SQLite cannot change a constraint: its tables are made anew from their own
definition. Going down is refused while another project owns anything: everybody would see it.

Revision: 0011, after 0010; 2026-11-29
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.sqlite import rebuild
from service import db

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

DEFAULT = "prj_default"
OWNED = ("volume", "upload", "dataset", "run", "batch", "experiment", "model")
OF_MODEL = ("model_version", "model_alias", "alias_event", "golden_case", "version_check")
_OPEN = "state IN ('interrupted', 'queued') AND cancel_requested_at IS NULL"
QUEUE: dict[str, tuple[list[str], str]] = {
    "ix_run_waiting": (["priority", "created_at", "id"], _OPEN),
    "ix_run_share": (["started_at"], "started_at IS NOT NULL"),
    "ix_run_held": ([], "state IN ('canceling', 'running', 'starting')"),
}
"""Indexes of the queue: behind `queue` and whom a run counts for, and of which runs."""

_IDENTITY = "sha256, kind, subject, series_selector)"
_MODEL = ("FOREIGN KEY(model_name) REFERENCES model (name)",
          "FOREIGN KEY(project_id, model_name) REFERENCES model (project_id, name)")  # fmt: skip
CONSTRAINTS: dict[str, list[tuple[str, str, str, str]]] = {
    "volume": [
        (
            "uq_volume_original_sha256_kind_subject_series_selector",
            f"UNIQUE (original_{_IDENTITY}",
            "uq_volume_identity",
            f"UNIQUE (project_id, original_{_IDENTITY}",
        )
    ],
    "upload": [
        (
            "uq_upload_created_by_sha256_kind_subject_series_selector",
            f"UNIQUE (created_by, {_IDENTITY}",
            "uq_upload_identity",
            f"UNIQUE (project_id, created_by, {_IDENTITY}",
        )
    ],
    "model": [("pk_model", "PRIMARY KEY (name)", "pk_model", "PRIMARY KEY (project_id, name)")],
    **{
        table: [
            (f"fk_{table}_model_name", _MODEL[0], f"fk_{table}_project_id_model_name", _MODEL[1])
        ]
        for table in ("model_version", "model_alias", "alias_event", "golden_case")
    },
    "version_check": [
        (
            "fk_version_check_model_name_version",
            "FOREIGN KEY(model_name, version) REFERENCES model_version (model_name, version)",
            "fk_version_check_project_id_model_name_version",
            "FOREIGN KEY(project_id, model_name, version) "
            "REFERENCES model_version (project_id, model_name, version)",
        )
    ],
}
"""By table: a constraint's name and definition before, and after."""
for _table, _last in (
    ("model_version", "version"),
    ("model_alias", "alias"),
    ("golden_case", "name"),
):
    _key = f"pk_{_table}"
    CONSTRAINTS[_table].append(
        (_key, f"PRIMARY KEY (model_name, {_last})",
         _key, f"PRIMARY KEY (project_id, model_name, {_last})")
    )  # fmt: skip
INDEXES = (
    ("volume", "ix_volume_created_at_id", ["created_at", "id"]),
    ("dataset", "ix_dataset_created_at_id", ["created_at", "id"]),
    ("run", "ix_run_created_at_id", ["created_at", "id"]),
    ("batch", "ix_batch_created_at_id", ["created_at", "id"]),
    ("experiment", "ix_experiment_created_at_id", ["created_at", "id"]),
    ("alias_event", "ix_alias_event_model_name_alias_seq", ["model_name", "alias", "seq"]),
    (
        "version_check",
        "ix_version_check_model_name_version_created_at",
        ["model_name", "version", "created_at"],
    ),
)
"""Of listings: the project goes before their columns."""


def upgrade() -> None:
    op.create_table(
        "project",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("max_queued", sa.Integer(), nullable=True),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_project"),
        sa.UniqueConstraint("name", name="uq_project_name"),
    )
    op.execute(f"INSERT INTO project (id, name) VALUES ('{DEFAULT}', 'default')")  # noqa: S608
    for table in OWNED:
        _add(table, f"DEFAULT '{DEFAULT}' NOT NULL {_key_of(table)}")
    for table in OF_MODEL:
        _add(table, f"DEFAULT '{DEFAULT}' NOT NULL")
    _add("token", _key_of("token"))
    op.execute(f"UPDATE token SET project_id = '{DEFAULT}' WHERE role <> 'admin'")  # noqa: S608
    for table, name, columns in INDEXES:
        op.drop_index(name, table_name=table)
        op.create_index(
            f"ix_{table}_project_id_{'_'.join(columns)}", table, ["project_id", *columns]
        )
    _index_queue("project_id")
    _constrain(up=True)


def downgrade() -> None:
    for table in (*OWNED, *OF_MODEL):
        _refuse_mixing(table)
    _constrain(up=False)
    _index_queue("created_by")
    for table, name, columns in INDEXES:
        op.drop_index(f"ix_{table}_project_id_{'_'.join(columns)}", table_name=table)
        op.create_index(name, table, columns)
    for table in ("token", *OF_MODEL, *OWNED):
        op.drop_column(table, "project_id")
    op.drop_table("project")


def _add(table: str, definition: str) -> None:
    op.execute(f"ALTER TABLE {table} ADD COLUMN project_id VARCHAR(40) {definition}")


def _key_of(table: str) -> str:
    return f"CONSTRAINT fk_{table}_project_id REFERENCES project (id)"


def _index_queue(unit: str) -> None:
    """The queue's indexes, by whom a run counts for."""
    for name, (columns, which) in QUEUE.items():
        where = sa.text(which)
        op.drop_index(name, table_name="run")
        op.create_index(
            name, "run", ["queue", unit, *columns], sqlite_where=where, postgresql_where=where
        )


def _refuse_mixing(table: str) -> None:
    other = op.get_bind().scalar(
        sa.text(f"SELECT project_id FROM {table} WHERE project_id <> '{DEFAULT}' LIMIT 1")  # noqa: S608
    )
    if other is not None:
        raise RuntimeError(
            f"project {other} owns rows of {table}: a version without projects would show them to "
            "everybody; go down with a backup from before the projects"
        )


def _constrain(*, up: bool) -> None:
    """Put each table's constraints in the place of those that they were."""
    if op.get_bind().dialect.name == "sqlite":
        for table, changes in CONSTRAINTS.items():
            rebuild(table, [change if up else (*change[2:], *change[:2]) for change in changes])
        return
    # Who refers to a key goes before it, and comes after it.
    tables = list(CONSTRAINTS)
    for table in reversed(tables):
        for before, _, after, _ in CONSTRAINTS[table]:
            op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {before if up else after}")
    for is_key in (True, False):
        for table in tables:
            for before, was, after, becomes in CONSTRAINTS[table]:
                name, definition = (after, becomes) if up else (before, was)
                if definition.startswith("FOREIGN") != is_key:
                    op.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}")
