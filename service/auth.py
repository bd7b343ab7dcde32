"""Who calls: opaque bearer tokens, roles, and pseudonyms for patients.

A token is `pcrl_<id>_<secret>`, of one project or, for admins, of all; each request acts in one.
Only the SHA-256 of the whole token is stored, so a stolen database gives nobody access, and a token
can be revoked (reliability.md, S3). Roles are ordered: viewer < annotator < researcher < admin;
each may do what the lower ones may.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from imaging.identity import Pseudonyms
from service import projects
from service.db import DEFAULT_PROJECT, Token, db_now
from service.errors import ServiceError
from service.settings import Settings
from service.storage import fsync

logger = logging.getLogger(__name__)


class Role(StrEnum):
    """What a token may do, in rising order."""

    VIEWER = "viewer"
    ANNOTATOR = "annotator"
    RESEARCHER = "researcher"
    ADMIN = "admin"

    def covers(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request: the token's id (what `created_by` columns hold) and its role."""

    id: str
    name: str
    role: Role
    project_id: str
    """The one project that the request acts in."""
    all_projects: bool = False
    """Whether the token is of all projects: such an admin also manages them."""


TOKEN_FORM = re.compile(r"pcrl_([0-9a-f]{12})_([A-Za-z0-9-]{32,})")


def authenticate(session: Session, token: str | None, project: str | None = None) -> Principal:
    """The owner of a token that is neither expired nor revoked.

    Args:
        session: A session of all projects.
        token: As it was sent.
        project: Id or name of the project to act in; None is the token's, or the default one.

    Raises:
        ServiceError: 401 `not_authenticated`, the same whatever is wrong with the token; 404
            `not_found`, the same for a project that is not there and one that is not the token's.
    """
    if token is not None and TOKEN_FORM.fullmatch(token):
        found = session.scalars(
            select(Token).where(
                Token.digest == _digest(token),
                Token.revoked_at.is_(None),
                or_(Token.expires_at.is_(None), Token.expires_at > db_now()),
            )
        ).one_or_none()
        if found is not None:
            role = Role(found.role)
            of_all = found.project_id is None and role is Role.ADMIN
            own = found.project_id or DEFAULT_PROJECT
            acts_in = own if project is None else projects.find(session, project).id
            if acts_in != own and not of_all:
                raise projects.unknown()
            return Principal(found.id, found.name, role, acts_in, of_all)
    raise ServiceError(
        401,
        "not_authenticated",
        "the Authorization header must hold a valid bearer token",
        headers={"WWW-Authenticate": "Bearer"},
    )


def create_token(
    session: Session,
    name: str,
    role: Role,
    expires_at: datetime | None = None,
    *,
    project_id: str | None = None,
) -> tuple[Token, str]:
    """Make a token; the caller commits.

    Args:
        session: Database session.
        name: Whom or what it is for.
        role: What it may do.
        expires_at: When it ends, if it does.
        project_id: Its project; None is all of them for an admin, else the default one.

    Returns:
        Its row, and the token itself, which cannot be read again.
    """
    token_id = secrets.token_hex(6)
    secret = secrets.token_urlsafe(32).replace("_", "-")
    if project_id is None and role is not Role.ADMIN:
        project_id = DEFAULT_PROJECT
    return _store(
        session,
        f"pcrl_{token_id}_{secret}",
        name,
        role,
        expires_at=expires_at,
        project_id=project_id,
    )


def revoke_token(session: Session, token_id: str) -> None:
    """End a token's life; the caller commits.

    Raises:
        ServiceError: 404 `not_found` for an unknown or an already revoked token.
    """
    revoked = session.scalars(
        update(Token)
        .where(Token.id == token_id, Token.revoked_at.is_(None))
        .values(revoked_at=db_now())
        .returning(Token.id)
    ).one_or_none()
    if revoked is None:
        raise ServiceError(404, "not_found", "no live token has this id")


def ensure_admin_token(session: Session, settings: Settings) -> str | None:
    """The first admin token: taken from `admin_token_file`, or made, when there is no token yet.

    Commits.

    Returns:
        A token that was made now, to be printed once; None if there is one already or the
        operator gave it.

    Raises:
        ValueError: `admin_token_file` holds something that is not a token.
    """
    if session.scalars(select(Token.id).limit(1)).first() is not None:
        session.rollback()
        return None
    if settings.admin_token_file is not None:
        token = settings.admin_token_file.read_text(encoding="utf-8").strip()
        if not TOKEN_FORM.fullmatch(token):
            raise ValueError(
                f"{settings.admin_token_file} must hold pcrl_<12 hex digits>_<32 or more "
                "letters, digits or hyphens>"
            )
        _store(session, token, "first admin", Role.ADMIN)
        session.commit()
        return None
    _, token = create_token(session, "first admin", Role.ADMIN)
    session.commit()
    return token


def subject_pseudonym(data_dir: Path, patient_key: str) -> str:
    """A stable name for a patient that cannot be turned back without this site's key.

    `sub_` and the first 16 hexadecimal digits of HMAC-SHA256(site key, patient key).
    """
    return site_pseudonyms(data_dir).patient(patient_key)


def site_pseudonyms(data_dir: Path) -> Pseudonyms:
    """Names under this site's secret key, which is made once, by whichever process comes first.

    Whoever has `data_dir/secrets/pseudonym.key` (mode 0600) can test whether a pseudonym is a given
    patient's; whoever loses it can tell no new scan of a known patient.
    """
    folder = data_dir / "secrets"
    path = folder / "pseudonym.key"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = folder / f".{secrets.token_hex(8)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike rename, fails if another process was first
        except FileExistsError:
            logger.debug("another process made the pseudonym key first")
        finally:
            draft.unlink()
        fsync(folder)
    return Pseudonyms(path.read_bytes())


def _store(
    session: Session,
    token: str,
    name: str,
    role: Role,
    *,
    expires_at: datetime | None = None,
    project_id: str | None = None,
) -> tuple[Token, str]:
    token_id = f"tok_{token.split('_')[1]}"
    row = Token(
        id=token_id,
        name=name,
        role=role,
        project_id=project_id,
        digest=_digest(token),
        expires_at=expires_at,
    )
    session.add(row)
    session.flush()
    return row, token


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
