"""Projects: make, look, rename, limit. None is deleted: what it owns would be nobody's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db import Project, new_id
from service.errors import ServiceError
from service.settings import Settings

NAME = re.compile(r"(?!prj_)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Goes into a header, and is never taken for an id."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a project may take up; 0 is no limit."""

    max_queued: int
    max_running: int
    max_stored_bytes: int


def limits_of(session: Session, project_id: str, settings: Settings) -> Limits:
    """A project's own limits, and the site's where it has none."""
    row = get(session, project_id)

    def either(own: int | None, site: int) -> int:
        return site if own is None else own

    return Limits(
        max_queued=either(row.max_queued, settings.max_queued),
        max_running=either(row.max_running, settings.max_running),
        max_stored_bytes=either(row.max_stored_bytes, settings.max_stored_bytes),
    )


def get(session: Session, project_id: str) -> Project:
    """A project by id.

    Raises:
        ServiceError: 404 `not_found`.
    """
    return find(session, project_id)


def find(session: Session, named: str) -> Project:
    """A project by id or by name.

    Raises:
        ServiceError: 404 `not_found`.
    """
    found = None
    if (named.startswith("prj_") and named.isascii() and named.isprintable()) or NAME.fullmatch(
        named
    ):
        found = session.scalars(
            select(Project).where(or_(Project.id == named, Project.name == named))
        ).one_or_none()
    if found is None:
        raise unknown()
    return found


def unknown() -> ServiceError:
    """The refusal (404), the same for a project that is not there and one that is not shown."""
    return ServiceError(404, "not_found", "no project has this id or name")


def listing(session: Session, *, size: int = 50, after: str | None = None) -> Sequence[Project]:
    """Up to `size` projects by name, those after the name `after`."""
    statement = select(Project).order_by(Project.name).limit(size)
    if after is not None:
        statement = statement.where(Project.name > after)
    return session.scalars(statement).all()


def create(session: Session, name: str, limits: Mapping[str, int | None]) -> Project:
    """Make a project; the caller commits.

    Args:
        session: Database session.
        name: What `NAME` lets through, and no other project has.
        limits: `max_queued`, `max_running`, `max_stored_bytes`; None or absent is the site's.

    Raises:
        ServiceError: 409 `name_taken`; 422 `invalid_request` for a name that is none.
    """
    row = Project(id=new_id("prj"), name=_checked(name), **limits)
    session.add(row)
    _flush(session)
    session.refresh(row)
    return row


def change(
    session: Session, project_id: str, name: str | None, limits: Mapping[str, int | None]
) -> Project:
    """Rename a project (None: not), change the limits that are named; the caller commits.

    Raises:
        ServiceError: 404 `not_found`; 409 `name_taken`; 422 `invalid_request`.
    """
    row = get(session, project_id)
    if name is not None:
        row.name = _checked(name)
    for limit, value in limits.items():
        setattr(row, limit, value)
    _flush(session)
    return row


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ServiceError(
            422,
            "invalid_request",
            "a project's name has 1 to 100 letters, digits, dots, hyphens or underscores, begins "
            "with a letter or digit, and not with prj_",
        )
    return name


def _flush(session: Session) -> None:
    try:
        session.flush()
    except IntegrityError:
        session.rollback()
        raise ServiceError(409, "name_taken", "another project has this name") from None
