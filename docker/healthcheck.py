"""The containers' health check: `healthcheck.py api | upkeep | inference | train`; status 0 or 1.

api               answers /healthz (readiness is another question: it needs the workers)
upkeep            no waiting run is long overdue for its doorbell
inference, train  the worker of this container was seen by the database
"""

from __future__ import annotations

import socket
import sys
from urllib.request import urlopen

from sqlalchemy import func, select

from service import db
from service.settings import get_settings

SEEN_S = 60.0
"""A worker is alive if it was seen so recently (as in service/routers/health.py)."""

OVERDUE_S = 120.0
"""Upkeep rings every few seconds; a run that waits so long for it was forgotten."""


def main(part: str) -> int:
    """Exit status for a part of the stack."""
    settings = get_settings()
    if part == "api":
        url = f"http://127.0.0.1:{settings.port}/healthz"
        with urlopen(url, timeout=4) as answer:
            return int(answer.status != 200)
    with db.sessions(db.connect(settings.database_url))() as session:
        if part == "upkeep":
            overdue = select(func.count()).where(
                db.Run.state.in_(db.CLAIMABLE), db.Run.publish_after < db.db_now(-OVERDUE_S)
            )
            return int(session.scalars(overdue).one() > 0)
        seen = select(func.count()).where(
            db.WorkerHeartbeat.queue == part,
            db.WorkerHeartbeat.worker.startswith(f"{socket.gethostname()}:", autoescape=True),
            db.WorkerHeartbeat.seen_at > db.db_now(-SEEN_S),
        )
        return int(session.scalars(seen).one() == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
