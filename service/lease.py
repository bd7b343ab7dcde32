"""Keeping a claimed run: a thread that sends heartbeats while the work goes on.

The work asks `should_stop()` between steps. It turns true when the run was canceled, when it was
taken back (a later fence exists: stop at once, write nothing), or when the worker shuts down.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service import runs
from service.runs import Lease

logger = logging.getLogger(__name__)

_shutting_down = mmap.mmap(-1, 1)
"""One byte that a worker's main process shares with the processes it forks."""


def shut_down() -> None:
    """Ask every run of this worker to stop (called from a signal handler: no locks)."""
    _shutting_down[0] = 1


def is_shutting_down() -> bool:
    """Whether this worker was asked to stop."""
    return _shutting_down[0] == 1


class Keeper:
    """Heartbeats of one lease; a context manager around the work.

    Args:
        sessions: Where to get a session; the thread uses its own.
        lease: The claim to keep.
        heartbeat_s: Pause between heartbeats.
    """

    def __init__(
        self, sessions: sessionmaker[Session], lease: Lease, *, heartbeat_s: float
    ) -> None:
        self.lease = lease
        self.cancel_requested = False
        self._is_fenced = False
        self._sessions = sessions
        self._heartbeat_s = heartbeat_s
        self._kept_at = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def is_preempted(self) -> bool:
        """Whether the worker shuts down (and the run should resume elsewhere)."""
        return is_shutting_down()

    @property
    def fenced(self) -> bool:
        """Whether the run was taken back, or must have been (a heartbeat that hangs)."""
        return self._is_fenced or time.monotonic() - self._kept_at > 2 * self.lease.lease_s

    def should_stop(self) -> bool:
        """Whether the work must end now, for any reason."""
        return self.cancel_requested or self.fenced or self.is_preempted

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until the work is done."""
        self._done.wait(seconds)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(timeout=self._heartbeat_s + 30.0)

    def _beat(self) -> None:
        while not self._done.wait(self._heartbeat_s):
            sent_at = time.monotonic()
            try:
                with self._sessions() as session:
                    beat = runs.heartbeat(session, self.lease)
            except SQLAlchemyError as error:  # the database is away: try again until the lease ends
                logger.warning("no heartbeat for %s: %s", self.lease.run_id, type(error).__name__)
                if time.monotonic() - self._kept_at > self.lease.lease_s:
                    self._is_fenced = True
                continue
            self._kept_at = sent_at
            self.cancel_requested |= beat.cancel_requested
            if not beat.alive:
                self._is_fenced = True
                return
            self._is_fenced = False
