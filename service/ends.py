"""Which of the runs that requests wait for have ended: one question to the database for all.

A client that waits asks again and again; on SQLite every question is the only transaction there
is. Eight clients that asked by themselves kept the worker from its own writes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import anyio
from anyio.lowlevel import RunVar
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service import db

FRESH_S = 0.02
"""An answer that is not older than this is not asked for again."""


class Ends:
    """The runs that requests of one event loop wait for."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._waiting: Counter[str] = Counter()
        self._asked: set[str] = set()
        self._ended: set[str] = set()
        self._asked_at = 0.0
        self._lock = anyio.Lock()

    @contextmanager
    def awaited(self, run_id: str) -> Iterator[None]:
        """While this lasts, `has_ended` may be asked about the run."""
        self._waiting[run_id] += 1
        try:
            yield
        finally:
            self._waiting[run_id] -= 1
            if not self._waiting[run_id]:
                del self._waiting[run_id]
                self._ended.discard(run_id)

    async def has_ended(self, run_id: str) -> bool:
        """Whether the run has ended or is gone, as of `FRESH_S` ago at most."""
        async with self._lock:
            if run_id in self._ended:
                return True
            is_old = time.monotonic() - self._asked_at >= FRESH_S
            if is_old or run_id not in self._asked:
                asked = set(self._waiting)
                going_on = await run_in_threadpool(self._going_on, sorted(asked))
                self._asked, self._asked_at = asked, time.monotonic()
                self._ended |= asked - going_on
                self._ended &= set(self._waiting)  # some may have left meanwhile
            return run_id in self._ended

    def _going_on(self, run_ids: list[str]) -> set[str]:
        with self._sessions() as session:
            states = select(db.Run.id).where(
                db.Run.id.in_(run_ids), db.Run.state.not_in(db.TERMINAL)
            )
            return set(session.scalars(states))


_by_database: RunVar[WeakKeyDictionary[sessionmaker[Session], Ends]] = RunVar("ends")


def ends_of(sessions: sessionmaker[Session]) -> Ends:
    """The one of this event loop and database."""
    try:
        known = _by_database.get()
    except LookupError:
        known = WeakKeyDictionary()
        _by_database.set(known)
    return known.setdefault(sessions, Ends(sessions))
