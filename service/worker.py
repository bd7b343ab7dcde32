"""What a worker process has at hand, and how it lives: claims, ends, shutdown.

Celery's main process listens and forks one process that works. SIGTERM (to either, or to both)
raises the shared flag of `service.lease`; the run at hand then gives itself back.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from celery.signals import setup_logging, worker_ready, worker_shutdown, worker_shutting_down
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from imaging.errors import ScanError
from models.bundle import BundleError
from service import lease, logs, runs
from service.db import RunKind, RunState, connect
from service.db import sessions as sessions_of
from service.device import look
from service.errors import ServiceError
from service.lease import Keeper
from service.patience import AWAY
from service.pulse import Pulse
from service.queue import ANYTHING, Able
from service.runs import Fenced, Lease
from service.settings import Settings, get_settings
from service.storage import BlobCorrupt, Store

logger = logging.getLogger(__name__)

LOOK_S = 0.05
"""Pause between looks for runs to be done beside those at work."""
INTERNAL_DETAIL = "the worker failed; its log has the place under the run's id"


@dataclass(frozen=True, slots=True)
class Worker:
    """One working process: its settings, database, store and name."""

    settings: Settings
    sessions: sessionmaker[Session]
    store: Store
    queue: str
    name: str
    able: Able = ANYTHING


Work = Callable[[Worker, Lease, Keeper], None]
"""Does a claimed run and finishes it; raises what it cannot handle."""


def this_worker(queue: str) -> Worker:
    """This process' worker (never the one of the process it was forked from)."""
    return _worker(queue, os.getpid())


@lru_cache(maxsize=2)
def _worker(queue: str, pid: int) -> Worker:
    settings = get_settings()
    worker = make_worker(settings, queue, name=f"{socket.gethostname()}:{pid}:{queue}")
    return replace(worker, able=look(settings).able)


def make_worker(settings: Settings, queue: str, *, name: str) -> Worker:
    """A worker with its own engine."""
    sessions = sessions_of(connect(settings.database_url))
    return Worker(settings, sessions, Store(settings.data_dir), queue, name[-120:])


def work_through(worker: Worker, work: Work, *, together: RunKind | None = None) -> int:
    """Claim and do runs until the queue is empty or the worker shuts down; returns how many.

    Runs of the kind `together` that follow each other in the queue are done at once, in threads.
    """
    done = 0
    with _sigterm_raises_the_flag():
        while (claimed := _claim(worker)) is not None:
            if claimed.kind is together:
                done += _work_together(worker, claimed, work)
            else:
                done += 1
                work_on(worker, claimed, work)
    return done


def _claim(worker: Worker, only: RunKind | None = None) -> Lease | None:
    """The best waiting run; None if there is none, or the worker shuts down."""
    if lease.is_shutting_down():
        return None
    with worker.sessions() as session:
        return runs.claim(
            session,
            None,
            worker.queue,
            worker.name,
            lease_s=worker.settings.lease_s,
            able=worker.able,
            max_running=worker.settings.max_running,
            only=only,
        )


def _work_together(worker: Worker, first: Lease, work: Work) -> int:
    """Do a claimed run, and beside it those of its kind that are next; returns how many.

    While the network runs for one, the others' scans are read and their results written.
    """
    done, num_threads = 0, worker.settings.embed_threads
    at_work: set[Future[None]] = set()
    claimed: Lease | None = first
    with ThreadPoolExecutor(num_threads, thread_name_prefix="together") as pool:
        while claimed is not None or at_work:
            if claimed is not None:
                done += 1
                at_work.add(pool.submit(work_on, worker, claimed, work))
            if claimed is None or len(at_work) == num_threads:
                at_work = wait(at_work, LOOK_S, FIRST_COMPLETED).not_done
            is_room = 0 < len(at_work) < num_threads  # none at work: the best run, of any kind
            claimed = _claim(worker, first.kind) if is_room else None
    return done


def work_on(worker: Worker, claimed: Lease, work: Work) -> None:
    """Do one claimed run; whatever happens, it ends, is given back, or was taken away."""
    with logs.about(run_id=claimed.run_id):
        _work_on(worker, claimed, work)


def _work_on(worker: Worker, claimed: Lease, work: Work) -> None:
    try:
        with Keeper(worker.sessions, claimed, heartbeat_s=worker.settings.heartbeat_s) as keeper:
            work(worker, claimed, keeper)
    except Fenced:
        logger.warning("run %s was taken back from this worker", claimed.run_id)
    except (ScanError, BundleError) as error:
        outcome: runs.Outcome = "oom" if error.code.endswith("_out_of_memory") else "error"
        fail(worker, claimed, error.code, error.detail, outcome=outcome)
    except ServiceError as error:
        fail(worker, claimed, error.code, error.detail)
    except BlobCorrupt as error:
        fail(worker, claimed, error.code, str(error))
    except AWAY as error:  # neither the run's fault nor its end
        log_place(claimed.run_id, error)
        hand_back(worker, claimed, "lost", "worker_lost", "the worker lost the database")
    except MemoryError:
        fail(worker, claimed, "host_out_of_memory", "the worker ran out of memory", outcome="oom")
    except Exception as error:  # noqa: BLE001  # the one place where nothing may pass
        log_place(claimed.run_id, error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            hand_back(worker, claimed, "error", "disk_full", "no room was left for the result")
        else:
            fail(worker, claimed, "internal_error", INTERNAL_DETAIL)


def hand_back(
    worker: Worker, claimed: Lease, outcome: runs.Outcome, code: str, detail: str
) -> None:
    """Give a run back for another attempt; after `max_attempts` it fails with this code."""
    error = {"code": code, "detail": detail}
    try:
        with worker.sessions() as session:
            runs.give_back(
                session, claimed, outcome, error=error, max_attempts=worker.settings.max_attempts
            )
    except (Fenced, SQLAlchemyError) as failure:  # the reaper will see to it
        logger.warning("run %s not given back: %s", claimed.run_id, type(failure).__name__)


def fail(
    worker: Worker, claimed: Lease, code: str, detail: str, *, outcome: runs.Outcome = "error"
) -> None:
    """End a run as failed, or as canceled if that was asked; a lost lease leaves it alone."""
    try:
        with worker.sessions() as session:
            runs.finish(
                session,
                claimed,
                RunState.FAILED,
                error={"code": code, "detail": detail},
                outcome=outcome,
            )
    except (Fenced, SQLAlchemyError) as error:  # the reaper will see to it
        logger.warning("run %s not marked failed: %s", claimed.run_id, type(error).__name__)


def log_place(what: str, error: BaseException) -> None:
    """Log the type and the places of what failed (an id), never its text: it may hold values."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-12:]))
    logger.error("%s failed: %s at %s", what, type(error).__name__, places)


@contextlib.contextmanager
def _sigterm_raises_the_flag() -> Iterator[None]:
    """While runs are done, SIGTERM asks them to stop instead of ending the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda _number, _frame: lease.shut_down())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


_pulse = Pulse()


def _on_setup_logging(**_: Any) -> None:
    """In place of Celery's own form; the processes that it forks inherit it."""
    logs.configure(get_settings())


def _on_ready(sender: Any, **_: Any) -> None:
    _pulse.start(get_settings(), sorted(sender.app.amqp.queues.consume_from))


def _on_shutting_down(**_: Any) -> None:
    lease.shut_down()


def _on_shutdown(**_: Any) -> None:
    _pulse.stop()


setup_logging.connect(_on_setup_logging, weak=False)
worker_ready.connect(_on_ready, weak=False)
worker_shutting_down.connect(_on_shutting_down, weak=False)
worker_shutdown.connect(_on_shutdown, weak=False)
