"""The model registry: versions, what was live when, what a version must prove, what is warm."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, db_now
from service.db.projects import DEFAULT_PROJECT

_OF_MODEL = (["project_id", "model_name"], ["model.project_id", "model.name"])


def _project_id(*, is_key: bool = False) -> Mapped[str]:
    """Of the model that a row belongs to."""
    return mapped_column(String(40), primary_key=is_key, server_default=DEFAULT_PROJECT)


class Model(Base):
    """A registered model: a name in a project, with versions."""

    __tablename__ = "model"
    project_id: Mapped[str] = mapped_column(
        ForeignKey("project.id"), primary_key=True, server_default=DEFAULT_PROJECT
    )
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    kind: Mapped[str] = mapped_column(String(12))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())


class ModelVersion(Base):
    """One bundle under a model's name."""

    __tablename__ = "model_version"
    project_id: Mapped[str] = _project_id(is_key=True)
    model_name: Mapped[str] = mapped_column(String(100), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    manifest: Mapped[dict[str, Any]]
    run_id: Mapped[str | None] = mapped_column(ForeignKey("run.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (ForeignKeyConstraint(*_OF_MODEL), UniqueConstraint("run_id"))


class ModelAlias(Base):
    """A movable name for a version (`champion`); `revision` is its ETag."""

    __tablename__ = "model_alias"
    project_id: Mapped[str] = _project_id(is_key=True)
    model_name: Mapped[str] = mapped_column(String(100), primary_key=True)
    alias: Mapped[str] = mapped_column(String(100), primary_key=True)
    version: Mapped[int]
    revision: Mapped[int] = mapped_column(default=1)
    updated_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (ForeignKeyConstraint(*_OF_MODEL),)


class AliasEvent(Base):
    """Append-only: which version an alias pointed at, from when, set by whom."""

    __tablename__ = "alias_event"
    seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    project_id: Mapped[str] = _project_id()
    model_name: Mapped[str] = mapped_column(String(100))
    alias: Mapped[str] = mapped_column(String(100))
    version: Mapped[int | None]
    set_by: Mapped[str] = mapped_column(String(40))
    cause: Mapped[str] = mapped_column(String(10), default="set", server_default="set")
    """`set`, `rollback` or `remove`."""
    override_reason: Mapped[str | None] = mapped_column(String(500))
    unmet: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """Names of the gate's checks that the move was made against."""
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (
        ForeignKeyConstraint(*_OF_MODEL),
        Index(None, "project_id", "model_name", "alias", "seq"),
    )


class GoldenCase(Base):
    """A scan whose answer is known: what every new version of a model must reproduce."""

    __tablename__ = "golden_case"
    project_id: Mapped[str] = _project_id(is_key=True)
    model_name: Mapped[str] = mapped_column(String(100), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    volume_id: Mapped[str] = mapped_column(ForeignKey("volume.id"), index=True)
    labels_id: Mapped[str | None] = mapped_column(ForeignKey("volume.id"), index=True)
    expected: Mapped[dict[str, Any]]
    """Segmenter: {labels: [{name, value, min_dice}]}; encoder: {vector: [...], min_cosine}."""
    set_by: Mapped[str] = mapped_column(String(40))
    updated_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (ForeignKeyConstraint(*_OF_MODEL),)


class VersionCheck(Base):
    """A check run of a version against the golden cases as they were (`golden_digest`)."""

    __tablename__ = "version_check"
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), primary_key=True)
    project_id: Mapped[str] = _project_id()
    model_name: Mapped[str] = mapped_column(String(100))
    version: Mapped[int]
    golden_digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (
        ForeignKeyConstraint(
            ["project_id", "model_name", "version"],
            ["model_version.project_id", "model_version.model_name", "model_version.version"],
        ),
        Index(None, "project_id", "model_name", "version", "created_at"),
    )


class WarmRequest(Base):
    """A bundle that inference workers shall keep loaded until then (`service.warming`)."""

    __tablename__ = "warm_request"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    until: Mapped[datetime]


class WarmModel(Base):
    """A bundle that a worker has loaded and run once, or why it could not."""

    __tablename__ = "warm_model"
    worker: Mapped[str] = mapped_column(String(120), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    error: Mapped[str | None] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
