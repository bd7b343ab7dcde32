"""Up to when everything that was written can be seen: for readers of rows that many writers number.

On PostgreSQL numbers of a sequence are given out before the commit, so that a row may appear after
others with larger numbers. Whoever resumes after a number must know that none comes below it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

_OLDEST = text(
    "SELECT coalesce(min(xact_start), clock_timestamp()) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend'"
)
_MARGIN = timedelta(seconds=1)
"""Between a row's number and its time, which one statement takes one after the other."""


def settled_before(session: Session) -> datetime | None:
    """When the oldest transaction that is still open began; None where there is no such doubt.

    A row that was written before it has a smaller number than any that is yet to appear: whoever
    gives out a number now began after that row was there. SQLite has one writer at a time, which
    the session that asks is.
    """
    if session.get_bind().dialect.name != "postgresql":
        return None
    oldest: datetime = session.execute(_OLDEST).scalar_one()
    return oldest - _MARGIN
