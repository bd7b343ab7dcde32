"""What happens in a run, as server-sent events; and waiting for its end.

Both ask the database again and again, each time in a short session on a worker thread: no thread
and no transaction is held in between, so a thousand listeners cost a thousand timers.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Sequence

import anyio
from fastapi.sse import format_sse_event
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service import db, runs, schemas
from service.ends import ends_of

MIN_POLL_S = 0.02
POLL_S = 0.25
MAX_POLL_S = 1.0
PING_S = 15.0
BATCH = 500
PING = b": ping\n\n"

_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=$|[,;])", re.IGNORECASE)


async def stream(
    sessions: sessionmaker[Session], run_id: str, after: int = 0
) -> AsyncIterator[bytes]:
    """The run's events after `after` as they come; ends when the run has ended.

    The event id is the database's sequence number, so a client that reconnects with
    `Last-Event-ID` misses nothing. A comment every 15 s keeps proxies from closing.
    """
    poll_s, sent_at = POLL_S, time.monotonic()
    while True:
        found, has_ended = await run_in_threadpool(_later, sessions, run_id, after)
        for event in found:
            yield _encode(event)
            after, sent_at, poll_s = event.seq, time.monotonic(), POLL_S
        if has_ended and len(found) < BATCH:
            return
        if found:
            continue
        if time.monotonic() - sent_at >= PING_S:
            yield PING
            sent_at = time.monotonic()
        await anyio.sleep(poll_s)
        poll_s = min(poll_s * 1.5, MAX_POLL_S)


async def wait_for_end(
    sessions: sessionmaker[Session], run_id: str, seconds: float
) -> db.Run | None:
    """The run once it has ended; None if it has not within `seconds`.

    Told late by a fortieth of its duration on average, 0.125 s at most.
    """
    began, ends = time.monotonic(), ends_of(sessions)
    with ends.awaited(run_id):
        while not await ends.has_ended(run_id):
            waited = time.monotonic() - began
            left = seconds - waited
            if left <= 0:
                return None
            poll_s = min(max(MIN_POLL_S, waited / 20), POLL_S)
            await anyio.sleep(min(poll_s, left))
    return await run_in_threadpool(_read, sessions, run_id)


def asked_wait_s(prefer: str | None) -> int | None:
    """N of `Prefer: wait=N` (RFC 7240), None where it is absent or malformed."""
    found = _WAIT.search(prefer or "")
    return int(found[1]) if found else None


def as_schema(event: db.RunEvent) -> schemas.Event:
    """The event as the API gives it."""
    return schemas.Event(
        id=event.seq, type=event.type, data=event.data, created_at=event.created_at
    )


def _later(
    sessions: sessionmaker[Session], run_id: str, after: int
) -> tuple[Sequence[db.RunEvent], bool]:
    """Events after `after`, and whether the run had ended before they were read."""
    with sessions() as session:
        has_ended = runs.get(session, run_id).state in db.TERMINAL
        return runs.events_after(session, run_id, after, limit=BATCH), has_ended


def _read(sessions: sessionmaker[Session], run_id: str) -> db.Run:
    with sessions() as session:
        return runs.get(session, run_id)


def _encode(event: db.RunEvent) -> bytes:
    data = as_schema(event).model_dump_json()
    return format_sse_event(data_str=data, event=event.type, id=str(event.seq))
