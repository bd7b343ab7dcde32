"""Around every request: its id, the security headers, one line in the log, the last catch.

The log names the route, not the query, and for a request that failed not even the path that was
sent: an address is where callers put a patient's name by mistake.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.problems import log_unexpected, unexpected

logger = logging.getLogger("service.access")

SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REQUEST_ID = re.compile(r"[0-9a-f-]{16,36}")


class Aborted(Exception):  # noqa: N818  # reads as what happened
    """The answer broke off after it had begun; the server closes the connection."""


class Envelope:
    """ASGI middleware; the outermost of ours."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        begun_at, status = time.monotonic(), 0

        async def sealed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            with logs.about(request_id=request_id):
                await self.app(scope, receive, sealed)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:  # noqa: BLE001  # the last catch: it logs and answers 500
            if status:
                log_unexpected(error, request_id)
                raise Aborted(f"request {request_id}") from None
            answer = unexpected(Request(scope, receive), error)
            await answer(scope, receive, sealed)
        finally:
            seconds = time.monotonic() - begun_at
            _log(scope, status, request_id, seconds)
            _count(scope, status, seconds)


def _id_of(scope: Scope) -> str:
    """The proxy's request id if it has the form of one, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _count(scope: Scope, status: int, seconds: float) -> None:
    metrics = getattr(scope["app"].state, "http_metrics", None) if "app" in scope else None
    if metrics is not None:
        route = getattr(scope.get("route"), "path", "-")
        metrics.observe(scope["method"], route, status, seconds)


def _log(scope: Scope, status: int, request_id: str, seconds: float) -> None:
    route = getattr(scope.get("route"), "path", "-")
    path = scope["path"] if status < 400 else route
    logger.info("%s %s %d %.1f ms %s", scope["method"], path, status, 1000.0 * seconds, request_id)
