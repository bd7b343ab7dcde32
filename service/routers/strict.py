"""JSON bodies, read strictly: of bounded size, of I-JSON values (RFC 7493) alone.

No NaN or infinity, no integer that a double cannot hold, no NUL character and no lone surrogate:
PostgreSQL, or the client that reads the answer, would choke on them later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

MAX_BODY_BYTES = 1 << 20
MAX_INTEGER = 2**53 - 1


class StrictRequest(Request):
    """A request whose JSON body is bounded and holds only values that every party can hold."""

    async def body(self) -> bytes:
        """The whole body; 413 when it is larger than `MAX_BODY_BYTES`."""
        if not hasattr(self, "_body"):
            declared = self.headers.get("content-length", "0")
            if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
                raise HTTPException(413)
            received = bytearray()
            async for chunk in self.stream():
                received += chunk
                if len(received) > MAX_BODY_BYTES:
                    raise HTTPException(413)
            self._body = bytes(received)
        return self._body

    async def json(self) -> Any:
        """The body's value; anything wrong with it is a `JSONDecodeError`."""
        body = await self.body()
        try:
            value = json.loads(
                body, parse_constant=_refuse, parse_float=_finite, parse_int=_small_integer
            )
            _check_text(value)
        except (ValueError, RecursionError):
            raise json.JSONDecodeError("not a JSON value that can be kept", "", 0) from None
        return value


class StrictRoute(APIRoute):
    """A route that reads its body through `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, given a strict request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def _refuse(constant: str) -> float:
    raise ValueError("not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def _small_integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
        raise ValueError("integer out of range")
    return int(text)


def _check_text(value: Any) -> None:
    """Raise ValueError for a NUL or a lone surrogate in any text of a JSON value."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("NUL character")
        value.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key)
            _check_text(item)
    elif isinstance(value, list):
        for item in value:
            _check_text(item)
