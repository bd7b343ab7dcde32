"""Health for whoever watches the process (open), and capabilities for clients (with a token)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, aliased, sessionmaker

from service import db, migrate, schemas
from service.auth import authenticate
from service.celery_app import broker_errors, make_app
from service.errors import ServiceError
from service.queue import is_waiting
from service.routers import deps, docs
from service.settings import Settings
from service.storage import Store

BROKER_TIMEOUT_S = 2.0
WORKER_SEEN_S = 10.0
"""A queue is served if a worker of it was seen so recently; it says so every 2.5 s
(`service.pulse.PULSE_S`), so readiness turns within ten seconds of the death of the last one."""

open_router = APIRouter(tags=["health"])
router = deps.router("health")


def _metrics_reader(
    request: Request,
    settings: deps.SettingsOf,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(deps.bearer)],
) -> None:
    """Whoever may read the metrics: the holder of any token, or anybody where that is set.

    Raises:
        ServiceError: 401 `not_authenticated`.
    """
    if not settings.metrics_open:
        with request.app.state.sessions() as session:
            authenticate(session, credentials.credentials if credentials else None)


MetricsReader = Annotated[None, Depends(_metrics_reader)]


class NotReady(Exception):  # noqa: N818  # reads as what was found
    """A check that failed, and why."""


@open_router.get(
    "/healthz",
    operation_id="healthz",
    summary="Does the process answer?",
    openapi_extra={"security": []},
)
async def healthz() -> schemas.Health:
    """The process answers; nothing else is looked at."""
    return schemas.Health()


@open_router.get(
    "/readyz",
    operation_id="readyz",
    summary="Can the service do its work?",
    response_model=schemas.Readiness,
    responses=docs.also(503, schemas.Readiness, "Something that is needed is not there"),
    openapi_extra={"security": []},
)
def readyz(
    request: Request, sessions: deps.EverySession, store: deps.StoreOf, settings: deps.SettingsOf
) -> JSONResponse:
    """Database, storage, disk, broker, a live worker for each queue, and no queue stands still."""
    checks: dict[str, Callable[[], None]] = {
        "database": lambda: _database(sessions),
        "storage": lambda: _storage(store),
        "disk": lambda: _disk(store),
        "broker": lambda: _broker(settings),
        **{
            f"worker:{queue}": lambda queue=queue: _worker(sessions, queue)  # type: ignore[misc]
            for queue in sorted(set(db.QUEUE_OF.values()))
        },
        **{
            f"queue:{queue}": lambda queue=queue: _queue(  # type: ignore[misc]
                sessions, queue, settings.queued_limit_s
            )
            for queue in sorted(set(db.QUEUE_OF.values()))
        },
    }
    results = tuple(_result(name, check) for name, check in checks.items())
    is_ready = all(result.result == "ok" for result in results)
    found = schemas.Readiness(status="ok" if is_ready else "failed", checks=results)
    return JSONResponse(found.model_dump(mode="json"), 200 if is_ready else 503)


@open_router.get(
    "/metrics",
    operation_id="metrics",
    summary="Numbers for Prometheus",
    response_class=PlainTextResponse,
    responses={
        200: {
            "description": "The text format of Prometheus",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **docs.problems(),
    },
)
def get_metrics(request: Request, _caller: MetricsReader) -> PlainTextResponse:
    """Queues, runs, workers, disk and requests; with any token, or none under PCRL_METRICS_OPEN."""
    state = request.app.state
    text = generate_latest(state.metrics) + generate_latest(state.http_metrics.registry)
    return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


@router.get(
    "/capabilities",
    operation_id="get_capabilities",
    summary="What can this service do?",
    responses=docs.problems("invalid_request"),
)
def get_capabilities(caller: deps.Viewer, settings: deps.SettingsOf) -> schemas.Capabilities:
    """Version, limits, the caller's role, and the project that it acts in."""
    return schemas.Capabilities(
        version=product_version(),
        role=caller.role,
        project=caller.project_id,
        run_kinds=tuple(db.RunKind),
        max_upload_bytes=settings.max_upload_bytes,
        max_wait_s=settings.wait_max_s,
        intended_use="research use only; not a medical device",
    )


def product_version() -> str:
    """The installed version; `0` from a checkout that is not installed."""
    try:
        return version("pcrl")
    except PackageNotFoundError:
        return "0"


def _result(name: str, check: Callable[[], None]) -> schemas.Check:
    try:
        check()
    except NotReady as error:
        return schemas.Check(check=name, result="failed", detail=str(error))
    except (SQLAlchemyError, OSError) as error:
        return schemas.Check(check=name, result="failed", detail=type(error).__name__)
    return schemas.Check(check=name, result="ok")


def _database(sessions: sessionmaker[Session]) -> None:
    if not migrate.is_current(sessions.kw["bind"]):
        raise NotReady("the database is not migrated to this version")


def _storage(store: Store) -> None:
    path = store.tmp / f"ready-{uuid.uuid4().hex}"
    path.write_bytes(b"ready")
    path.unlink()


def _disk(store: Store) -> None:
    try:
        store.check_space()
    except ServiceError as error:
        raise NotReady(error.detail) from None


def _broker(settings: Settings) -> None:
    try:
        with make_app(settings).connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=BROKER_TIMEOUT_S)
    except broker_errors() as error:
        raise NotReady(type(error).__name__) from None


def _worker(sessions: sessionmaker[Session], queue: str) -> None:
    with sessions() as session:
        seen = session.scalars(
            select(db.WorkerHeartbeat.worker).where(
                db.WorkerHeartbeat.queue == queue,
                db.WorkerHeartbeat.seen_at > db.db_now(-WORKER_SEEN_S),
            )
        ).first()
    if seen is None:
        raise NotReady(f"no worker of this queue was seen in the last {WORKER_SEEN_S:.0f} s")


def _queue(sessions: sessionmaker[Session], queue: str, limit_s: float) -> None:
    """A queue stands still if a run has waited for too long and nothing is or was worked on.

    A run that no live worker can do is left out: it waits for hardware, and others pass it.
    """
    worker, held = aliased(db.WorkerHeartbeat), aliased(db.Run)
    fitting = (
        select(worker.worker)
        .where(
            worker.queue == queue,
            worker.seen_at > db.db_now(-WORKER_SEEN_S),
            db.Run.needs_device.in_(["", worker.device_kind]),
            db.Run.needs_memory_bytes <= worker.memory_bytes,
        )
        .exists()
    )
    at_work = select(held.id).where(held.queue == queue, held.state.in_(db.HELD)).exists()
    lately = (
        select(db.RunAttempt.run_id)
        .join(held, held.id == db.RunAttempt.run_id)
        .where(held.queue == queue, db.RunAttempt.started_at > db.db_now(-limit_s))
        .exists()
    )
    with sessions() as session:
        stuck = session.scalars(
            select(db.Run.id)
            .where(
                is_waiting(db.Run, queue),
                db.Run.created_at < db.db_now(-limit_s),
                fitting,
                ~at_work,
                ~lately,
            )
            .limit(1)
        ).first()
    if stuck is not None:
        raise NotReady(f"a run has waited for over {limit_s:.0f} s and no worker takes it")
