"""The sign of life of a worker's listening process: a row that it renews while it lives.

That process forks the one that works, and again whenever it dies. A fork in the middle of a beat
would hand the child SQLite's own notes in memory of a write lock that nobody ever lets go there:
every transaction of that child then fails with "database is locked"
(https://www.sqlite.org/howtocorrupt.html, "Carrying an open database connection across a fork").
So a beat opens its connection and closes it, and a fork waits for its end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

from sqlalchemy import Engine, delete
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.db import WorkerHeartbeat, connect, db_now, insert_if_absent
from service.db import sessions as sessions_of
from service.device import Device, look
from service.settings import Settings

logger = logging.getLogger(__name__)

PULSE_S = 2.5
"""A worker's row is renewed so often, so that /readyz turns within ten seconds of its death."""
LOOK_EVERY_S = 15.0
"""How often the memory of a GPU is asked for."""

_beating = threading.Lock()
_forks: list[bool] = []


def _before_fork() -> None:
    _beating.acquire()
    _forks.append(True)


def _after_fork() -> None:
    if _forks:  # a signal's handler may have broken the wait off, and Python forks all the same
        _forks.pop()
        _beating.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def heartbeat_name(queue: str, pid: int) -> str:
    """Under which name the listening process with this id is seen."""
    return f"{socket.gethostname()}:{pid}:{queue}"[-120:]


def beat(
    sessions: sessionmaker[Session], name: str, queue: str, device: str, found: Device | None = None
) -> None:
    """Write that a worker is alive, and what its device has."""
    with sessions() as session:
        insert_if_absent(session, WorkerHeartbeat, worker=name, queue=queue, device=device)
        row = session.get(WorkerHeartbeat, name)
        assert row is not None
        row.seen_at, row.device = db_now(), device
        if found is not None:
            row.device_kind, row.memory_bytes = found.kind, found.memory_bytes
            row.used_bytes = found.used_bytes
        session.commit()


class Pulse:
    """One heartbeat row for each queue that a process listens to, until it stops."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, settings: Settings, queues: list[str]) -> None:
        """Begin to beat, in a thread."""
        self._thread = threading.Thread(target=self._run, args=(settings, queues), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the rows away."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)

    def _run(self, settings: Settings, queues: list[str]) -> None:
        engine = connect(settings.database_url)
        names = {queue: heartbeat_name(queue, os.getpid()) for queue in queues}
        found, looked_at = look(settings), time.monotonic()
        while True:
            with _between_forks("heartbeat", engine) as sessions:
                for queue, name in names.items():
                    beat(sessions, name, queue, settings.device, found)
            if self._stop.wait(min(settings.heartbeat_s, PULSE_S)):
                break
            if time.monotonic() - looked_at > LOOK_EVERY_S:
                found, looked_at = look(settings), time.monotonic()
        ended = delete(WorkerHeartbeat).where(WorkerHeartbeat.worker.in_(names.values()))
        with _between_forks("last heartbeat", engine) as sessions, sessions() as session:
            session.execute(ended)
            session.commit()
        engine.dispose()


@contextlib.contextmanager
def _between_forks(what: str, engine: Engine) -> Iterator[sessionmaker[Session]]:
    """Sessions during which this process does not fork; an absent database costs a beat.

    On PostgreSQL a fork does no harm (psycopg leaves a parent's connection alone) and must not
    wait for a server that is silent.
    """
    is_sqlite = engine.dialect.name == "sqlite"
    with _beating if is_sqlite else contextlib.nullcontext():
        try:
            yield sessions_of(engine)
        except SQLAlchemyError as error:
            logger.warning("%s: %s", what, type(error).__name__)
        finally:
            if is_sqlite:
                engine.dispose()
