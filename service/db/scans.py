"""Files, the volumes in them, and the datasets made of those."""

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
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, db_now
from service.db.projects import OfProject


class Blob(Base):
    """A content-addressed file in the store."""

    __tablename__ = "blob"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())


class Volume(OfProject, Base):
    """One scan (a series or a NIfTI file), one label volume, or one 2D image.

    A 2D image has a shape (rows, columns) and no geometry: its spacing and affines are empty.
    """

    __tablename__ = "volume"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))  # image | labels | image_2d
    subject: Mapped[str] = mapped_column(String(64), index=True)
    modality: Mapped[str] = mapped_column(String(16))
    format: Mapped[str] = mapped_column(String(16))
    original_sha256: Mapped[str] = mapped_column(ForeignKey("blob.sha256"))
    series_selector: Mapped[str] = mapped_column(String(64), default="")
    voxels_sha256: Mapped[str] = mapped_column(ForeignKey("blob.sha256"))
    shape: Mapped[list[Any]]
    spacing_mm: Mapped[list[Any]]
    affine: Mapped[list[Any]]
    source_shape: Mapped[list[Any]]
    source_affine: Mapped[list[Any]]
    intake: Mapped[dict[str, Any]]
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    original_removed_at: Mapped[datetime | None]
    __table_args__ = (
        UniqueConstraint(
            "project_id",
            "original_sha256",
            "kind",
            "subject",
            "series_selector",
            name="uq_volume_identity",
        ),
        CheckConstraint("kind IN ('image', 'labels', 'image_2d')", name="kind"),
        Index(None, "project_id", "created_at", "id"),
    )


class Upload(OfProject, Base):
    """A file that comes in pieces; complete when it became a volume, and swept when it is stale.

    `received_bytes` are checked and on the disk (fsync before commit); empty text is "not given".
    """

    __tablename__ = "upload"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    received_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    kind: Mapped[str] = mapped_column(String(10))
    subject: Mapped[str] = mapped_column(String(64), default="")
    series_selector: Mapped[str] = mapped_column(String(64), default="")
    volume_id: Mapped[str | None] = mapped_column(
        ForeignKey("volume.id", ondelete="CASCADE"), index=True
    )
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    updated_at: Mapped[datetime] = mapped_column(server_default=db_now(), index=True)
    __table_args__ = (
        UniqueConstraint(
            "project_id",
            "created_by",
            "sha256",
            "kind",
            "subject",
            "series_selector",
            name="uq_upload_identity",
        ),
        CheckConstraint("kind IN ('image', 'labels', 'image_2d')", name="kind"),
        CheckConstraint("received_bytes BETWEEN 0 AND size_bytes", name="received_bytes"),
    )


class Dataset(OfProject, Base):
    """An immutable list of volumes with labels and a split by subject."""

    __tablename__ = "dataset"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    digest: Mapped[str] = mapped_column(String(64))
    created_by: Mapped[str] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)


class DatasetItem(Base):
    """A scan of a dataset, perhaps with labels or classes, in one split."""

    __tablename__ = "dataset_item"
    dataset_id: Mapped[str] = mapped_column(
        ForeignKey("dataset.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    volume_id: Mapped[str] = mapped_column(ForeignKey("volume.id"), index=True)
    labels_id: Mapped[str | None] = mapped_column(ForeignKey("volume.id"), index=True)
    classes: Mapped[dict[str, Any] | None]
    """1 or 0 for each class that is known of the whole scan."""
    subject: Mapped[str] = mapped_column(String(64))
    split: Mapped[str] = mapped_column(String(8))
    __table_args__ = (CheckConstraint("split IN ('train', 'val', 'test')", name="split"),)
