"""The first tables.

Revision: 0001, after None; 2026-11-24
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from service import db

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "blob",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_blob"),
    )
    op.create_table(
        "dataset",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_by", sa.String(length=40), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_dataset"),
    )
    op.create_index("ix_dataset_created_at_id", "dataset", ["created_at", "id"])
    op.create_table(
        "idempotency",
        sa.Column("principal", sa.String(length=40), nullable=False),
        sa.Column("route", sa.String(length=120), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("headers", sa.JSON(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=True),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.PrimaryKeyConstraint("principal", "route", "key", name="pk_idempotency"),
    )
    op.create_table(
        "model",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_model"),
    )
    op.create_table(
        "token",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.Column("expires_at", db.UtcDateTime(), nullable=True),
        sa.Column("revoked_at", db.UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_token"),
        sa.UniqueConstraint("digest", name="uq_token_digest"),
    )
    op.create_table(
        "worker_heartbeat",
        sa.Column("worker", sa.String(length=120), nullable=False),
        sa.Column("queue", sa.String(length=12), nullable=False),
        sa.Column("device", sa.String(length=120), nullable=False),
        sa.Column("seen_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.PrimaryKeyConstraint("worker", name="pk_worker_heartbeat"),
    )
    op.create_table(
        "alias_event",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("model_name", sa.String(length=100), nullable=False),
        sa.Column("alias", sa.String(length=100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.Column("set_by", sa.String(length=40), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.ForeignKeyConstraint(["model_name"], ["model.name"], name="fk_alias_event_model_name"),
        sa.PrimaryKeyConstraint("seq", name="pk_alias_event"),
    )
    op.create_table(
        "model_alias",
        sa.Column("model_name", sa.String(length=100), nullable=False),
        sa.Column("alias", sa.String(length=100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("updated_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.ForeignKeyConstraint(["model_name"], ["model.name"], name="fk_model_alias_model_name"),
        sa.PrimaryKeyConstraint("model_name", "alias", name="pk_model_alias"),
    )
    op.create_table(
        "volume",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=10), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("modality", sa.String(length=16), nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("original_sha256", sa.String(length=64), nullable=False),
        sa.Column("series_selector", sa.String(length=64), nullable=False),
        sa.Column("voxels_sha256", sa.String(length=64), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.Column("spacing_mm", sa.JSON(), nullable=False),
        sa.Column("affine", sa.JSON(), nullable=False),
        sa.Column("source_shape", sa.JSON(), nullable=False),
        sa.Column("source_affine", sa.JSON(), nullable=False),
        sa.Column("intake", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(length=40), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.CheckConstraint("kind IN ('image', 'labels')", name=op.f("ck_volume_kind")),
        sa.ForeignKeyConstraint(
            ["original_sha256"], ["blob.sha256"], name="fk_volume_original_sha256"
        ),
        sa.ForeignKeyConstraint(["voxels_sha256"], ["blob.sha256"], name="fk_volume_voxels_sha256"),
        sa.PrimaryKeyConstraint("id", name="pk_volume"),
        sa.UniqueConstraint(
            "original_sha256",
            "kind",
            "subject",
            "series_selector",
            name="uq_volume_original_sha256_kind_subject_series_selector",
        ),
    )
    op.create_index("ix_volume_created_at_id", "volume", ["created_at", "id"])
    op.create_index("ix_volume_subject", "volume", ["subject"])
    op.create_table(
        "dataset_item",
        sa.Column("dataset_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.Column("labels_id", sa.String(length=40), nullable=True),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("split", sa.String(length=8), nullable=False),
        sa.CheckConstraint("split IN ('train', 'val', 'test')", name=op.f("ck_dataset_item_split")),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["dataset.id"], name="fk_dataset_item_dataset_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["labels_id"], ["volume.id"], name="fk_dataset_item_labels_id"),
        sa.ForeignKeyConstraint(["volume_id"], ["volume.id"], name="fk_dataset_item_volume_id"),
        sa.PrimaryKeyConstraint("dataset_id", "position", name="pk_dataset_item"),
    )
    op.create_index("ix_dataset_item_labels_id", "dataset_item", ["labels_id"])
    op.create_index("ix_dataset_item_volume_id", "dataset_item", ["volume_id"])
    op.create_table(
        "run",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("queue", sa.String(length=12), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("dataset_id", sa.String(length=40), nullable=True),
        sa.Column("volume_id", sa.String(length=40), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("lease_owner", sa.String(length=120), nullable=True),
        sa.Column("lease_until", db.UtcDateTime(), nullable=True),
        sa.Column("suspect_at", db.UtcDateTime(), nullable=True),
        sa.Column("publish_after", db.UtcDateTime(), nullable=True),
        sa.Column("cancel_requested_at", db.UtcDateTime(), nullable=True),
        sa.Column("created_by", sa.String(length=40), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.Column("started_at", db.UtcDateTime(), nullable=True),
        sa.Column("finished_at", db.UtcDateTime(), nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'starting', 'running', 'canceling', 'interrupted', "
            "'succeeded', 'failed', 'canceled')",
            name=op.f("ck_run_state"),
        ),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name="fk_run_dataset_id"),
        sa.ForeignKeyConstraint(["volume_id"], ["volume.id"], name="fk_run_volume_id"),
        sa.PrimaryKeyConstraint("id", name="pk_run"),
    )
    op.create_index("ix_run_created_at_id", "run", ["created_at", "id"])
    op.create_index("ix_run_dataset_id", "run", ["dataset_id"])
    op.create_index(
        "ix_run_queue_state_priority_created_at",
        "run",
        ["queue", "state", "priority", "created_at"],
    )
    op.create_index("ix_run_volume_id", "run", ["volume_id"])
    op.create_table(
        "artifact",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=60), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("media_type", sa.String(length=60), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["run.id"], name="fk_artifact_run_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["sha256"], ["blob.sha256"], name="fk_artifact_sha256"),
        sa.PrimaryKeyConstraint("run_id", "name", name="pk_artifact"),
    )
    op.create_table(
        "model_version",
        sa.Column("model_name", sa.String(length=100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("run_id", sa.String(length=40), nullable=True),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.ForeignKeyConstraint(["model_name"], ["model.name"], name="fk_model_version_model_name"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_model_version_run_id"),
        sa.PrimaryKeyConstraint("model_name", "version", name="pk_model_version"),
        sa.UniqueConstraint("run_id", name="uq_model_version_run_id"),
    )
    op.create_index("ix_model_version_digest", "model_version", ["digest"])
    op.create_table(
        "run_attempt",
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.String(length=120), nullable=False),
        sa.Column("started_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.Column("ended_at", db.UtcDateTime(), nullable=True),
        sa.Column("outcome", sa.String(length=20), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["run_id"], ["run.id"], name="fk_run_attempt_run_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "fence", name="pk_run_attempt"),
    )
    op.create_table(
        "run_event",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("run_id", sa.String(length=40), nullable=False),
        sa.Column("type", sa.String(length=10), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created_at", db.UtcDateTime(), server_default=db.db_now(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["run.id"], name="fk_run_event_run_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name="pk_run_event"),
    )
    op.create_index("ix_run_event_run_id_seq", "run_event", ["run_id", "seq"])


def downgrade() -> None:
    op.drop_table("run_event")
    op.drop_table("run_attempt")
    op.drop_table("model_version")
    op.drop_table("artifact")
    op.drop_table("run")
    op.drop_table("dataset_item")
    op.drop_table("volume")
    op.drop_table("model_alias")
    op.drop_table("alias_event")
    op.drop_table("worker_heartbeat")
    op.drop_table("token")
    op.drop_table("model")
    op.drop_table("idempotency")
    op.drop_table("dataset")
    op.drop_table("blob")
