"""Routes that answer with server-sent events, or with a list where a client cannot stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Header, Query, Request, Response
from fastapi.sse import EventSourceResponse

_MAX_SEQ = 2**63 - 1
After = Annotated[
    int | None,
    Query(ge=0, le=_MAX_SEQ, description="Events with a larger id; answered as a list."),
]
LastEventId = Annotated[
    int | None,
    Header(ge=0, le=_MAX_SEQ, description="Where a stream that broke is taken up again."),
]


def wants_list(request: Request, after: int | None) -> bool:
    """Whether the client asked for a list, by `Accept` or by `after`."""
    accept = request.headers.get("accept", "")
    if "text/event-stream" in accept:
        return False
    return after is not None or "application/json" in accept


def answer(events: AsyncIterator[bytes]) -> Response:
    """The stream; no cache keeps it, no proxy holds it back."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventSourceResponse(events, headers=headers)
