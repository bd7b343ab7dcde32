"""Resident sessions: the least recently used leave when bytes run out, live ones never do."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from weakref import WeakValueDictionary

from models.session.opening import OnnxSession

logger = logging.getLogger(__name__)


class SessionCache:
    """Resident sessions by bundle digest; safe to share between threads.

    Least recently used ones leave first, pinned ones (see `pin`) never. One that left but is still
    at work somewhere is handed out again rather than loaded twice.

    Args:
        max_bytes: Most that the resident models cost together (`OnnxSession.resident_bytes`). A
            model that is larger alone is opened and handed out, but does not stay. Pinned models
            stay even beyond it; the log says so.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_loads = 0
        """Models opened since the start."""
        self._resident: OrderedDict[str, OnnxSession] = OrderedDict()  # oldest use first
        self._live: WeakValueDictionary[str, OnnxSession] = WeakValueDictionary()
        self._pinned: frozenset[str] = frozenset()
        self._opening: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, digest: str, opener: Callable[[], OnnxSession]) -> OnnxSession:
        """The session of this bundle, opened if it is not live; by one thread only.

        What the opener raises goes through, and the next call tries again.
        """
        with self._lock:
            session = self._use(digest)
            if session is not None:
                return session
            opening = self._opening.setdefault(digest, threading.Lock())
        with opening:
            with self._lock:
                session = self._use(digest)
            if session is not None:
                return session
            session = opener()
            with self._lock:
                self.num_loads += 1
                self._live[digest] = session
                self._keep(digest, session)
                self._opening.pop(digest, None)
            return session

    def pin(self, digests: Collection[str]) -> None:
        """From now on these never leave, if they are or once they come; all others may."""
        with self._lock:
            self._pinned = frozenset(digests)
            for digest in self._pinned - set(self._resident):
                session = self._live.get(digest)
                if session is not None:  # at work, though it had to leave
                    self._keep(digest, session)
            self._shed()

    def is_live(self, digest: str) -> bool:
        """Whether `get` would find it loaded."""
        with self._lock:
            return digest in self._live

    def peek(self, digest: str) -> OnnxSession | None:
        """The session if it is loaded; this is no use of it."""
        with self._lock:
            return self._live.get(digest)

    def drop(self, digest: str) -> None:
        """Forget a session, pinned or not; whoever works with it keeps it until then."""
        with self._lock:
            self._resident.pop(digest, None)
            self._live.pop(digest, None)

    def drop_unpinned(self) -> None:
        """Let every model go that no alias points at."""
        with self._lock:
            for digest in [one for one in self._resident if one not in self._pinned]:
                del self._resident[digest]

    @property
    def resident_bytes(self) -> int:
        """What the models that stay cost."""
        with self._lock:
            return self._weight()

    def digests(self) -> list[str]:
        """The resident bundles, least recently used first."""
        with self._lock:
            return list(self._resident)

    def clear(self) -> None:
        """Let every model go; those at work end their work first."""
        with self._lock:
            self._resident.clear()

    def _use(self, digest: str) -> OnnxSession | None:
        session = self._live.get(digest)
        if session is not None:
            self._keep(digest, session)
        return session

    def _keep(self, digest: str, session: OnnxSession) -> None:
        if session.resident_bytes > self.max_bytes and digest not in self._pinned:
            self._resident.pop(digest, None)  # its first run showed what it costs
            return
        self._resident[digest] = session
        self._resident.move_to_end(digest)
        self._shed()

    def _shed(self) -> None:
        while self._weight() > self.max_bytes:
            oldest = next((one for one in self._resident if one not in self._pinned), None)
            if oldest is None:
                logger.warning(
                    "%d live models cost %d bytes, more than the %d of PCRL_SESSION_CACHE_BYTES",
                    len(self._resident),
                    self._weight(),
                    self.max_bytes,
                )
                return
            del self._resident[oldest]

    def _weight(self) -> int:
        return sum(session.resident_bytes for session in self._resident.values())
