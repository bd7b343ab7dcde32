"""Runs, their claims, events and files; the workers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, db_now
from service.db.projects import OfProject

# As `service.queue` spells them: else a partial index serves nothing.
_WAITING = text("state IN ('interrupted', 'queued') AND cancel_requested_at IS NULL")
_BEGUN = text("started_at IS NOT NULL")
_HELD = text("state IN ('canceling', 'running', 'starting')")


class Run(OfProject, Base):
    """One execution of a recipe or of an inference."""

    __tablename__ = "run"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(12))
    state: Mapped[str] = mapped_column(String(12))
    queue: Mapped[str] = mapped_column(String(12))
    priority: Mapped[int] = mapped_column(default=0)
    needs_device: Mapped[str] = mapped_column(String(8), default="", server_default="")
    needs_memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    spec: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]  # {code, detail}
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("dataset.id"), index=True)
    volume_id: Mapped[str | None] = mapped_column(ForeignKey("volume.id"), index=True)
    attempt: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(120))
    lease_until: Mapped[datetime | None]
    suspect_at: Mapped[datetime | None]
    publish_after: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        CheckConstraint(
            "state IN ('queued', 'starting', 'running', 'canceling', 'interrupted', "
            "'succeeded', 'failed', 'canceled')",
            name="state",
        ),
        Index(None, "queue", "state", "priority", "created_at"),
        Index(None, "project_id", "created_at", "id"),
        Index(
            "ix_run_share",
            "queue",
            "project_id",
            "started_at",
            sqlite_where=_BEGUN,
            postgresql_where=_BEGUN,
        ),
        Index(
            "ix_run_waiting",
            "queue",
            "project_id",
            "priority",
            "created_at",
            "id",
            sqlite_where=_WAITING,
            postgresql_where=_WAITING,
        ),
        Index("ix_run_due", "publish_after", sqlite_where=_WAITING, postgresql_where=_WAITING),
        Index("ix_run_held", "queue", "project_id", sqlite_where=_HELD, postgresql_where=_HELD),
    )


class RunAttempt(Base):
    """One claim of a run by a worker, and how it ended."""

    __tablename__ = "run_attempt"
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), primary_key=True)
    fence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    worker: Mapped[str] = mapped_column(String(120))
    started_at: Mapped[datetime] = mapped_column(server_default=db_now())
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(20))
    exit_code: Mapped[int | None]
    detail: Mapped[str | None] = mapped_column(Text)


class RunEvent(Base):
    """What happened in a run, in order; `seq` is the event id of the SSE stream."""

    __tablename__ = "run_event"
    seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"))
    type: Mapped[str] = mapped_column(String(10))  # state | progress | metric | log
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (Index(None, "run_id", "seq"),)


class Artifact(Base):
    """A file that a run produced (mask, preview)."""

    __tablename__ = "artifact"
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(60), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("blob.sha256"))
    media_type: Mapped[str] = mapped_column(String(60))
    fence: Mapped[int] = mapped_column(BigInteger)


class Batch(OfProject, Base):
    """One request over a dataset; its state is that of its runs and stands nowhere else."""

    __tablename__ = "batch"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    kind: Mapped[str] = mapped_column(String(12))
    model: Mapped[dict[str, Any]]
    options: Mapped[dict[str, Any]]
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (
        CheckConstraint("kind IN ('segment', 'embed')", name="kind"),
        Index(None, "project_id", "created_at", "id"),
    )


class BatchItem(Base):
    """A scan of a batch and the newest run on it."""

    __tablename__ = "batch_item"
    batch_id: Mapped[str] = mapped_column(
        ForeignKey("batch.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    volume_id: Mapped[str] = mapped_column(ForeignKey("volume.id"), index=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), index=True)
    tries: Mapped[int] = mapped_column(default=1)


class WorkerHeartbeat(Base):
    """A live worker process and what it serves; readiness asks for one a queue."""

    __tablename__ = "worker_heartbeat"
    worker: Mapped[str] = mapped_column(String(120), primary_key=True)
    queue: Mapped[str] = mapped_column(String(12))
    device: Mapped[str] = mapped_column(String(120))
    device_kind: Mapped[str] = mapped_column(String(8), default="cpu", server_default="cpu")
    memory_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    used_bytes: Mapped[int | None] = mapped_column(BigInteger)
    seen_at: Mapped[datetime] = mapped_column(server_default=db_now())
