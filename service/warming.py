"""Models are loaded before requests come for them: when a worker starts, when an alias moves.

The database is the truth (docs/adr/0012). `warm_request` holds the bundles that somebody wants
warm, `warm_model` what each inference worker has loaded and run once. A worker looks twice a
second, beside its work, and loads what an alias points at or a request names (`service.warmer`);
those never leave its memory. A move of an alias waits until every live worker has the new version.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session, sessionmaker

from service.db import (
    ModelAlias,
    ModelVersion,
    WarmModel,
    WarmRequest,
    WorkerHeartbeat,
    db_now,
)
from service.errors import ServiceError
from service.settings import Settings

POLL_S = 0.1
ALIVE_S = 60.0
"""A worker that was seen so recently is waited for."""
KEEP_S = 600.0
"""How long a wish lasts beyond the wait for it; from its move on the alias keeps the model."""


@dataclass(frozen=True, slots=True)
class Lacking:
    """Live workers that do not have a model warm."""

    still: Sequence[str]
    """They have not reported yet."""
    failed: Sequence[str]
    """Codes of those that cannot load it."""


def before_move(sessions: sessionmaker[Session], settings: Settings, digest: str) -> None:
    """Wait until every live inference worker has a bundle warm; at once if there is none.

    Blocking: call it from a thread, and without a transaction.

    Raises:
        ServiceError: 409 `model_not_loadable`, a worker cannot load it; 503 `model_not_warm`, it
            takes longer than `PCRL_WARM_WAIT_S`: it goes on, so ask again.
    """
    deadline = time.monotonic() + settings.warm_wait_s
    with sessions() as session:
        if _is_warm(lacking(session, digest)):
            return
        ask(session, digest, for_s=settings.warm_wait_s + KEEP_S)
        session.commit()
    while True:
        with sessions() as session:
            found = lacking(session, digest)
        if _is_warm(found):
            return
        if time.monotonic() > deadline:
            raise ServiceError(
                503,
                "model_not_warm",
                f"{len(found.still)} inference worker(s) are still loading the model; the alias "
                "was not moved",
                headers={"Retry-After": "5"},
            )
        time.sleep(POLL_S)


def lacking(session: Session, digest: str) -> Lacking:
    """Who of the live inference workers lacks a bundle."""
    alive = session.scalars(
        select(WorkerHeartbeat.worker).where(
            WorkerHeartbeat.queue == "inference", WorkerHeartbeat.seen_at > db_now(-ALIVE_S)
        )
    ).all()
    told = {
        row.worker: row.error
        for row in session.scalars(select(WarmModel).where(WarmModel.digest == digest))
    }
    return Lacking(
        still=[one for one in alive if one not in told],
        failed=[error for one in alive if (error := told.get(one))],
    )


def ask(session: Session, digest: str, *, for_s: float) -> None:
    """Wish for a bundle to be warm on every worker; the caller commits.

    A worker that failed to load it tries again.
    """
    session.execute(
        delete(WarmModel).where(WarmModel.digest == digest, WarmModel.error.is_not(None))
    )
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    insert = postgresql.insert if is_postgresql else sqlite.insert
    statement = insert(WarmRequest).values(digest=digest, until=db_now(for_s))
    session.execute(
        statement.on_conflict_do_update(index_elements=["digest"], set_={"until": db_now(for_s)})
    )


def wanted(session: Session) -> list[str]:
    """Digests that workers keep warm: what aliases point at, then what was asked for."""
    live = session.scalars(
        select(ModelVersion.digest)
        .join(
            ModelAlias,
            (ModelAlias.project_id == ModelVersion.project_id)
            & (ModelAlias.model_name == ModelVersion.model_name)
            & (ModelAlias.version == ModelVersion.version),
        )
        .order_by(ModelAlias.updated_at)
    ).all()
    asked = session.scalars(
        select(WarmRequest.digest).where(WarmRequest.until > db_now()).order_by(WarmRequest.until)
    ).all()
    return list(dict.fromkeys([*live, *asked]))


def _is_warm(found: Lacking) -> bool:
    if found.failed:
        raise ServiceError(
            409,
            "model_not_loadable",
            f"an inference worker cannot load the model ({found.failed[0]}); the alias was not "
            "moved",
            extra={"reason": found.failed[0]},
        )
    return not found.still
