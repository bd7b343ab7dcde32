"""A creating request that is sent twice creates once.

The caller names its request by `Idempotency-Key`. The first request takes a row (state: answer
still missing); what it creates and its recorded answer are one transaction, so neither exists
without the other. A repeat gets the recorded answer; while the first is under way it gets 409. A
first request that fails gives its row back; one whose process was killed loses it after a while.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service import db
from service.errors import ServiceError

ABANDONED_S = 10.0
"""After so long without an answer, the first request's process is taken for dead. Short, because a
caller whose request met a killed process waits for so long; safe, because one that was merely slow
finds its claim replaced and commits nothing (`record`)."""


class Answer(NamedTuple):
    """What a creating request was answered."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to answer a request; `taken_at` is the fence against a later claim."""

    principal: str
    route: str
    key: str
    taken_at: datetime


def begin(
    session: Session, *, principal: str, route: str, key: str, request_sha256: str
) -> Claim | Answer:
    """Claim a request, or find what it was answered. Commits.

    Args:
        session: A session without anything pending.
        principal: Id of the caller's token; keys of different callers never meet.
        route: Method and path of the request.
        key: The caller's `Idempotency-Key`.
        request_sha256: Digest of the request's body.

    Raises:
        ServiceError: 422 `idempotency_mismatch`, 409 `idempotency_in_flight`.
    """
    row = db.Idempotency(principal=principal, route=route, key=key, request_sha256=request_sha256)
    session.add(row)
    try:
        session.commit()
    except IntegrityError:
        session.rollback()
        return _repeat(session, principal, route, key, request_sha256)
    session.refresh(row)
    return Claim(principal, route, key, row.created_at)


def record(session: Session, claim: Claim, answer: Answer) -> None:
    """Keep the answer, in the transaction that creates what it tells of (not committed here).

    Raises:
        ServiceError: 409 `idempotency_in_flight`; this request was taken for dead and repeated.
    """
    kept = session.execute(
        update(db.Idempotency)
        .where(*_held_by(claim))
        .values(status=answer.status, headers=answer.headers, body=answer.body)
        .execution_options(synchronize_session=False)
    )
    if kept.rowcount != 1:  # type: ignore[attr-defined]  # an UPDATE gives a CursorResult
        raise _in_flight()


def abandon(session: Session, claim: Claim) -> None:
    """Give the claim back, so that the request may be sent again. Commits."""
    session.execute(
        delete(db.Idempotency).where(*_held_by(claim)).execution_options(synchronize_session=False)
    )
    session.commit()


def _repeat(
    session: Session, principal: str, route: str, key: str, request_sha256: str
) -> Claim | Answer:
    row = session.get(db.Idempotency, (principal, route, key), populate_existing=True)
    if row is None:  # the first request failed just now
        raise _in_flight()
    if row.request_sha256 != request_sha256:
        raise ServiceError(
            422,
            "idempotency_mismatch",
            "this Idempotency-Key came before with a different body; use a new key",
        )
    if row.status is not None:
        session.rollback()
        return Answer(row.status, dict(row.headers or {}), dict(row.body or {}))
    return _take_over(session, Claim(principal, route, key, row.created_at))


def _take_over(session: Session, dead: Claim) -> Claim:
    """Replace a claim whose process was killed."""
    taken_at = session.scalars(
        update(db.Idempotency)
        .where(*_held_by(dead), db.Idempotency.created_at < db.db_now(-ABANDONED_S))
        .values(created_at=db.db_now())
        .returning(db.Idempotency.created_at)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    session.commit()
    if taken_at is None:
        raise _in_flight()
    return Claim(dead.principal, dead.route, dead.key, taken_at)


def _held_by(claim: Claim) -> tuple[Any, ...]:
    return (
        db.Idempotency.principal == claim.principal,
        db.Idempotency.route == claim.route,
        db.Idempotency.key == claim.key,
        db.Idempotency.status.is_(None),
        db.Idempotency.created_at == claim.taken_at,
    )


def _in_flight() -> ServiceError:
    return ServiceError(
        409,
        "idempotency_in_flight",
        "the first request with this Idempotency-Key is still being answered",
        headers={"Retry-After": "1"},
    )
