"""Logs of every process in one form: a line of text, or with `PCRL_LOG_FORMAT=json` a JSON object.

Each line carries the id of the request or of the run in which it was written. An exception shows
its type and places, never its text, which may hold a patient's name (reliability.md, S8).

    with about(run_id=lease.run_id): ...
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType

from service.settings import Settings

_request_id: ContextVar[str] = ContextVar("request_id", default="")
_run_id: ContextVar[str] = ContextVar("run_id", default="")

ExceptionInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


@contextlib.contextmanager
def about(*, request_id: str = "", run_id: str = "") -> Iterator[None]:
    """What is logged inside belongs to this request or run; an empty id changes nothing."""
    tokens = [
        (variable, variable.set(value))
        for variable, value in ((_request_id, request_id), (_run_id, run_id))
        if value
    ]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def configure(settings: Settings) -> None:
    """Log to stderr in this process, as the settings say; called again it changes the form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else Text())
    handler.addFilter(_add_ids)
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)


class Text(logging.Formatter):
    """`time level message request_id=... run_id=...`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """A line, with the ids that there are."""
        ids = "".join(f" {name}={value}" for name, value in _ids(record).items())
        return super().format(record) + ids

    def formatException(self, ei: ExceptionInfo) -> str:  # noqa: N802  # logging's name
        """The type and the places."""
        return _places(ei)


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message", "request_id"?, "run_id"?, "exception"?}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One object on one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_ids(record),
        }
        if record.exc_info:
            line["exception"] = _places(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _add_ids(record: logging.LogRecord) -> bool:
    """Taken where the line is written: a handler may format it in another context."""
    record.request_id, record.run_id = _request_id.get(), _run_id.get()
    return True


def _ids(record: logging.LogRecord) -> dict[str, str]:
    found = {name: str(getattr(record, name, "")) for name in ("request_id", "run_id")}
    return {name: value for name, value in found.items() if value}


def _places(found: ExceptionInfo) -> str:
    kind, error, _ = found
    if kind is None or error is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[-12:]))
    return f"{kind.__name__} at {places}"
