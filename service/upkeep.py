"""Upkeep: rings for waiting runs, takes back lost ones, and sweeps what was left over.

Safe to run several times at once; nothing in the service recovers without it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator

from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service import celery_app, db, experiments, logs, retention, runs, uploads, volumes
from service.db import Idempotency, Run, RunState, WorkerHeartbeat, db_now
from service.errors import ServiceError
from service.settings import Settings
from service.storage import Store
from service.worker import log_place

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 600.0
DAY_S = 86400.0


def run(settings: Settings, *, stop: threading.Event | None = None) -> None:
    """Loop until `stop` is set, or SIGTERM or SIGINT comes."""
    logs.configure(settings)
    stop = stop or threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: stop.set())
    engine = db.connect(settings.database_url)
    sessions, store = db.sessions(engine), Store(settings.data_dir)
    swept_at = -SWEEP_EVERY_S
    while not stop.is_set():
        with _survived("dispatch"):
            dispatch(sessions, settings)
        with _survived("plan"):
            plan(sessions)
        if time.monotonic() - swept_at > SWEEP_EVERY_S:
            swept_at = time.monotonic()
            with _survived("sweep"):
                sweep(sessions, store, settings)
        stop.wait(settings.dispatch_interval_s)
    engine.dispose()


def dispatch(sessions: sessionmaker[Session], settings: Settings) -> int:
    """Take back lost runs, then ring for every run that waits; returns how many were rung for."""
    with sessions() as session:
        for run_id in runs.reap(
            session,
            suspect_s=settings.suspect_s,
            max_attempts=settings.max_attempts,
            lease_s=settings.lease_s,
        ):
            logger.warning("took run %s back: its worker is gone", run_id)
        waiting = runs.due(session)
    for number, (run_id, queue) in enumerate(waiting):
        if not celery_app.ring(run_id, queue, settings=settings):
            with sessions() as session:  # the rest would wait for the broker's time-out too
                runs.not_rung(session, [run_id for run_id, _ in waiting[number:]])
            break
    return len(waiting)


def plan(sessions: sessionmaker[Session]) -> None:
    """Queue the trainings of experiments that have become possible; `dispatch` rings for them.

    An experiment that cannot be planned costs itself a round, and no other.
    """
    with sessions() as session:
        waiting = experiments.waiting(session)
    for experiment_id in waiting:
        try:
            with sessions() as session:
                experiments.advance(session, experiment_id)
                session.commit()
        except Exception as error:  # noqa: BLE001  # a defect that one plan meets is not the others'
            log_place(experiment_id, error)


def sweep(sessions: sessionmaker[Session], store: Store, settings: Settings) -> None:
    """Remove what is over: temporary and unreferenced files, old keys, dead workers' rows."""
    store.sweep()
    with sessions() as session:
        uploads.sweep(session, store, older_than_s=settings.upload_hours * 3600.0)
        retention.sweep(session, store, settings)
        volumes.sweep_blobs(session, store)
        hours = settings.idempotency_hours
        session.execute(delete(Idempotency).where(Idempotency.created_at < db_now(-hours * 3600.0)))
        session.execute(delete(WorkerHeartbeat).where(WorkerHeartbeat.seen_at < db_now(-DAY_S)))
        session.commit()
        ended = session.scalars(
            select(Run.id).where(
                Run.state.in_([RunState.SUCCEEDED, RunState.CANCELED]),
                Run.finished_at < db_now(-DAY_S),
            )
        ).all()
        over = [*ended, *retention.failed_work(session, settings)]
        session.commit()
    for run_id in over:
        shutil.rmtree(store.work / run_id, ignore_errors=True)


@contextlib.contextmanager
def _survived(what: str) -> Iterator[None]:
    """A database or disk that is away costs one round, not the loop."""
    try:
        yield
    except (SQLAlchemyError, OSError, ServiceError) as error:
        logger.warning("%s: %s", what, type(error).__name__)
