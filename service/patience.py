"""Writing once more when the database was away: for the writes that end an attempt.

A database that restarts, or one connection that is cut, must not cost a run what it has worked
out. Every write of a worker carries its fence, so that one which was committed although its
answer got lost is refused the second time instead of being done twice.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

logger = logging.getLogger(__name__)

AWAY = (OperationalError, InterfaceError)
"""What a database raises that does not answer."""
PAUSE_S = 0.5

Answer = TypeVar("Answer")


def patiently(session: Session, write: Callable[[], Answer], *, for_s: float) -> Answer:
    """What `write` gives, tried again for `for_s` seconds while the database is away.

    Args:
        session: What `write` uses; rolled back between two tries.
        write: One whole transaction that may be repeated.
        for_s: How long; a worker's lease, since later the run is not its own any more.
    """
    until = time.monotonic() + for_s
    while True:
        try:
            return write()
        except AWAY as error:
            with contextlib.suppress(*AWAY):
                session.rollback()
            if time.monotonic() + PAUSE_S > until:
                raise
            logger.warning("the database is away (%s): trying again", type(error).__name__)
            time.sleep(PAUSE_S)
