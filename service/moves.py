"""What was live when: an alias' moves, its past, and the way back to the version before.

`alias_event` is append-only and in order. A rollback undoes the newest move that was not undone
yet, so that asked twice it goes two versions back and never forth again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import literal, select
from sqlalchemy.orm import Session

from models import refs
from service import registry
from service.db import AliasEvent, ModelAlias, ModelVersion, UtcDateTime
from service.errors import ServiceError


def listing(
    session: Session, name: str, alias: str, *, size: int, before: int | None = None
) -> tuple[Sequence[AliasEvent], int | None]:
    """Moves of an alias, newest first, those before the move `before`; and where to go on."""
    statement = select(AliasEvent).where(AliasEvent.model_name == name, AliasEvent.alias == alias)
    if before is not None:
        statement = statement.where(AliasEvent.seq < before)
    rows = session.scalars(statement.order_by(AliasEvent.seq.desc()).limit(size + 1)).all()
    return rows[:size], rows[size - 1].seq if len(rows) > size else None


def at(session: Session, name: str, alias: str, time: datetime) -> AliasEvent:
    """The move that was the newest at a time: what was live then.

    Raises:
        ServiceError: 404 `not_found` if the alias was not there then.
    """
    found = session.scalars(
        select(AliasEvent)
        .where(
            AliasEvent.model_name == name,
            AliasEvent.alias == alias,
            AliasEvent.created_at <= literal(time, UtcDateTime()),
        )
        .order_by(AliasEvent.seq.desc())
        .limit(1)
    ).one_or_none()
    if found is None or found.version is None:
        raise ServiceError(404, "not_found", "the model had no such alias at that time")
    return found


def resolve_at(session: Session, ref: str, time: datetime) -> ModelVersion:
    """The version that a reference meant at a time.

    Raises:
        ServiceError: 404 `not_found`; 422 `invalid_request` if it is no reference.
    """
    try:
        parsed = refs.parse(ref)
    except ValueError:
        raise ServiceError(
            422, "invalid_request", "a model reference is NAME, NAME/VERSION or NAME@ALIAS"
        ) from None
    if parsed.alias is not None:
        version = at(session, parsed.name, parsed.alias, time).version
        assert version is not None  # `at` refuses a removed alias
        return registry.get_version(session, parsed.name, version)
    statement = select(ModelVersion).where(
        ModelVersion.model_name == parsed.name,
        ModelVersion.created_at <= literal(time, UtcDateTime()),
    )
    if parsed.version is not None:
        statement = statement.where(ModelVersion.version == parsed.version)
    found = session.scalars(statement.order_by(ModelVersion.version.desc()).limit(1)).one_or_none()
    if found is None:
        raise ServiceError(404, "not_found", "no such version was there at that time")
    return found


def rollback(
    session: Session, name: str, alias: str, *, if_match: int, principal: str
) -> ModelAlias:
    """Point an alias at the version before; the caller commits.

    It passes no gate: the version was live, and the way back must be open when it is needed.

    Args:
        session: Database session.
        name: The model.
        alias: One that is there.
        if_match: The revision that the caller saw: of two who roll back at once one does.
        principal: Id of who does it.

    Raises:
        ServiceError: 404 `not_found`; 409 `no_version_before`; 412 `precondition_failed`.
    """
    if registry.get_alias(session, name, alias).revision != if_match:
        raise registry.changed(session, name, alias, if_match)
    version = version_before(session, name, alias)
    row = registry.set_alias(session, name, alias, version, principal=principal, if_match=if_match)
    newest(session, name, alias).cause = "rollback"
    session.flush()
    return row


def version_before(session: Session, name: str, alias: str) -> int:
    """The version that a rollback of an alias goes to.

    Raises:
        ServiceError: 404 `not_found`; 409 `no_version_before`.
    """
    registry.get_alias(session, name, alias)
    stack = undo_stack(registry.alias_history(session, name, alias))
    if len(stack) < 2:
        raise ServiceError(
            409, "no_version_before", "the alias has named no other version that it can go back to"
        )
    return stack[-2]


def newest(session: Session, name: str, alias: str) -> AliasEvent:
    """The newest move, which the transaction at hand has made."""
    return session.scalars(
        select(AliasEvent)
        .where(AliasEvent.model_name == name, AliasEvent.alias == alias)
        .order_by(AliasEvent.seq.desc())
        .limit(1)
    ).one()


def undo_stack(moves: Iterable[AliasEvent]) -> list[int]:
    """The versions that rollbacks go through, the present one last, from all moves in order."""
    stack: list[int] = []
    for move in moves:
        if move.version is None:
            continue  # a removed alias that is made again may go back beyond it
        if move.cause == "rollback":
            while stack and stack[-1] != move.version:
                stack.pop()
        elif not stack or stack[-1] != move.version:
            stack.append(move.version)
    return stack
