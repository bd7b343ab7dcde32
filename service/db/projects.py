"""Projects, and the column of every table whose rows belong to one."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, db_now

DEFAULT_PROJECT = "prj_default"
"""Owns what was there before there were projects, and what is made without naming one."""


class Project(Base):
    """What keeps the scans, runs and models of one group apart from another's. Never deleted.

    A limit that is None is the site's (`PCRL_MAX_...`), 0 is none.
    """

    __tablename__ = "project"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    max_queued: Mapped[int | None]
    max_running: Mapped[int | None]
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=db_now())
    __table_args__ = (UniqueConstraint("name"),)


class OfProject:
    """A row of one project; `service.db.scope` writes the column and asks for it.

    The default is for the version before, which works beside this one while it is installed.
    """

    project_id: Mapped[str] = mapped_column(
        ForeignKey("project.id"), server_default=DEFAULT_PROJECT
    )
