"""Stored embeddings, and what changed in them."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    LargeBinary,
    String,
)
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, db_now


class Embedding(Base):
    """A volume's or region's vector by one bundle, of its newest run, for a search.

    `region` is the name of a label, empty for the whole volume. `vector` holds little-endian
    float32; the key is in the order in which a search reads.
    """

    __tablename__ = "embedding"
    bundle_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    region: Mapped[str] = mapped_column(String(200), primary_key=True, default="")
    volume_id: Mapped[str] = mapped_column(
        ForeignKey("volume.id", ondelete="CASCADE"), primary_key=True, index=True
    )
    model_name: Mapped[str] = mapped_column(String(100))
    model_version: Mapped[int]
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), index=True)
    dims: Mapped[int]
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (CheckConstraint("dims > 0 AND length(vector) = 4 * dims", name="dims"),)


class EmbeddingSpace(Base):
    """How often a bundle's stored embeddings of a region have changed; triggers count."""

    __tablename__ = "embedding_space"
    bundle_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    region: Mapped[str] = mapped_column(String(200), primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger)


class EmbeddingChange(Base):
    """A volume whose embedding was written, replaced or removed; the last 10,000 of a space."""

    __tablename__ = "embedding_change"
    bundle_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    region: Mapped[str] = mapped_column(String(200), primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    volume_id: Mapped[str] = mapped_column(String(40))
