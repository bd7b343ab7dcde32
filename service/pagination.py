"""Listings page by page, by an opaque token that holds the key of the last row given.

Paging by key (newest first by creation time and id, or by name) and not by offset: rows that
appear or vanish while someone pages repeat and hide nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
from datetime import datetime
from typing import Annotated

from fastapi import Query

from service.db import Cursor
from service.errors import ServiceError

MAX_SIZE = 500

PageSize = Annotated[int, Query(ge=1, le=MAX_SIZE, description="Most items to give.")]
PageToken = Annotated[
    str | None,
    Query(max_length=400, description="`next_page_token` of the page before."),
]


def token_of(cursor: Cursor | None) -> str | None:
    """The token of a key (creation time, id); None at the end of the listing."""
    return None if cursor is None else _encode([cursor[0].isoformat(), cursor[1]])


def cursor_of(token: str | None) -> Cursor | None:
    """The key of a token, None without one.

    Raises:
        ServiceError: 422 `invalid_request`; it is not a token of this listing.
    """
    if token is None:
        return None
    created_at, row_id = _decode(token, 2)
    try:
        time = datetime.fromisoformat(created_at)
    except ValueError:
        raise _not_a_token() from None
    if time.tzinfo is None or not row_id.isascii() or not row_id.replace("_", "").isalnum():
        raise _not_a_token()
    return time, row_id


def name_token_of(name: str) -> str:
    """The token of a key that is a name."""
    return _encode([name])


def name_of(token: str | None) -> str | None:
    """The name in a token, None without one.

    Raises:
        ServiceError: 422 `invalid_request`; it is not a token of this listing.
    """
    if token is None:
        return None
    (name,) = _decode(token, 1)
    if not (name.isascii() and name.isprintable()):
        raise _not_a_token()
    return name


def _encode(key: list[str]) -> str:
    text = json.dumps(key, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decode(token: str, num_parts: int) -> list[str]:
    try:
        key = json.loads(
            base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        )
    except (binascii.Error, ValueError, RecursionError):
        raise _not_a_token() from None
    if not isinstance(key, list) or [type(part) for part in key] != [str] * num_parts:
        raise _not_a_token()
    return key


def _not_a_token() -> ServiceError:
    finding = {"pointer": "/query/page_token", "message": "not a next_page_token of this listing"}
    return ServiceError(
        422, "invalid_request", "page_token is not one of ours", extra={"errors": [finding]}
    )
