"""Experiments, and the trainings that each takes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, db_now
from service.db.projects import OfProject

WAITING = "run_id IS NULL AND error IS NULL"


class Experiment(OfProject, Base):
    """A plan (`models.experiment.plan`); how far it is, is that of its cells' runs."""

    __tablename__ = "experiment"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    source_dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    target_dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"), index=True)
    plan: Mapped[dict[str, Any]]
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    canceled_at: Mapped[datetime | None]
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


class ExperimentCell(Base):
    """One training of an experiment: waiting, with a run, or with the reason why it has none."""

    __tablename__ = "experiment_cell"
    experiment_id: Mapped[str] = mapped_column(
        ForeignKey("experiment.id", ondelete="CASCADE"), primary_key=True
    )
    key: Mapped[str] = mapped_column(String(100), primary_key=True)
    run_id: Mapped[str | None] = mapped_column(ForeignKey("run.id"), index=True)
    tries: Mapped[int] = mapped_column(default=0)
    error: Mapped[dict[str, Any] | None]  # {code, detail}
    __table_args__ = (
        Index(
            "ix_experiment_cell_waiting",
            "experiment_id",
            sqlite_where=text(WAITING),
            postgresql_where=text(WAITING),
        ),
    )
