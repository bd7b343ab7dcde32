"""The thread of an inference worker that loads and keeps what is wanted (`service.warming`)."""

from __future__ import annotations

import logging
import threading

from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from models import pace
from models.bundle import BundleError
from service import resident, warming
from service.db import WarmModel
from service.settings import Settings
from service.storage import Store

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Pause between two looks."""


class Warmer:
    """A thread of an inference worker that keeps loaded what is wanted.

    Args:
        sessions: Where to look.
        settings: Where and how models run.
        store: Where their bundles lie.
        worker: The name of the worker's heartbeat.
    """

    def __init__(
        self, sessions: sessionmaker[Session], settings: Settings, store: Store, worker: str
    ) -> None:
        self._sessions = sessions
        self._settings = settings
        self._store = store
        self._worker = worker
        self._told: dict[str, str | None] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="warmer", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join(timeout=60.0)

    def once(self) -> list[str]:
        """One look: pin and load what is wanted, say so; returns what is warm."""
        with self._sessions() as session:
            digests = warming.wanted(session)
            told = {
                row.digest: row.error
                for row in session.scalars(
                    select(WarmModel).where(WarmModel.worker == self._worker)
                )
            }
        if self._told is None:  # of an earlier process with this name, if of any
            told = {}
        cache = resident.cache_of(self._settings.session_cache_bytes)
        cache.pin([*digests, *map(resident.coarse_key, digests)])
        warm: dict[str, str | None] = {}
        for digest in digests:
            if told.get(digest) is not None:  # failed, and nobody asked again
                warm[digest] = told[digest]
            else:
                is_loaded = resident.is_whole(self._settings, digest)
                warm[digest] = None if is_loaded else self._load(digest)
        if warm != told or self._told is None:
            self._tell(warm)
        self._told = warm
        return [digest for digest, error in warm.items() if error is None]

    def _load(self, digest: str) -> str | None:
        """Load a model and run it once; the code of what went wrong."""
        try:
            held = resident.hold(self._settings, self._store, digest)
            warmed_s = held.session.warm_up()
            coarse = resident.coarse_of(self._settings, self._store, held)
            if coarse is not None:
                warmed_s += coarse.warm_up()
            for session in (held.session, coarse):
                if session is not None and len(session.manifest.patch_size) == 3:
                    pace.pace_of(session)  # else the first request would wait for it
        except BundleError as error:
            logger.warning("model %s cannot be warmed: %s", digest[:12], error)
            return error.code
        logger.info("model %s: loaded %.2f s, run %.2f s", digest[:12], held.opened_s, warmed_s)
        return None

    def _tell(self, warm: dict[str, str | None]) -> None:
        with self._sessions() as session:
            session.execute(delete(WarmModel).where(WarmModel.worker == self._worker))
            for digest, error in warm.items():
                session.add(WarmModel(worker=self._worker, digest=digest, error=error))
            session.commit()

    def _run(self) -> None:
        while True:
            try:
                self.once()
            except (SQLAlchemyError, OSError, MemoryError) as error:  # look again
                logger.warning("warming: %s", type(error).__name__)
            if self._stop.wait(LOOK_S):
                return
