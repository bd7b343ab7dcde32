"""What a training says, on its way into the database, so that nothing of it gets lost.

The child's stdout is a file of the attempt, `work/<run>/events-<fence>.jsonl`: what it said is
there whatever happens to the process that reads. The supervisor follows the file; the supervisor
of a later attempt first replays the metrics of earlier files that never reached the database.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy.orm import Session, sessionmaker

from service import runs
from service.patience import AWAY, PAUSE_S
from service.runs import Lease

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0
MAX_PENDING = 10_000
MAX_LINE_BYTES = 1 << 20
UNEXPECTED = "failed"
"""The child's code for an exception nobody foresaw; its text may hold values, so it is not told."""
MAX_MESSAGE = 2000


def path_of(folder: Path, lease: Lease) -> Path:
    """The attempt's file of events."""
    return folder / f"events-{lease.fence:09d}.jsonl"


class Follower:
    """Whole lines of a file that grows; a line longer than 1 MiB is dropped."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rest = b""

    def lines(self) -> Iterator[bytes]:
        """Lines that were completed since the last call."""
        while chunk := self._file.read(MAX_LINE_BYTES):
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > MAX_LINE_BYTES:
                self._rest = b""
            yield from whole


class News:
    """Events in order, progress throttled."""

    def __init__(self, sessions: sessionmaker[Session], lease: Lease) -> None:
        self.result: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.metrics: dict[str, float] = {}
        self.step: tuple[object, object] | None = None
        """Stage and step that were told last."""
        self._sessions = sessions
        self._lease = lease
        self._pending: deque[tuple[Any, dict[str, Any]]] = deque(maxlen=MAX_PENDING)
        self._progress: dict[str, Any] | None = None
        self._progress_at = 0.0

    def take(self, line: bytes) -> None:
        """Read one line; what is not an event of ours (a library's print) is dropped."""
        try:
            event = json.loads(line)
            kind = event.pop("event")
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if kind == "progress":
            self._progress = _finite(event)
            self.step = event.get("stage"), event.get("step")
        elif kind == "metric":
            event["values"] = _finite(event.get("values", {}))
            self.metrics.update(event["values"])
            self._pending.append(("metric", event))
        elif kind == "log":
            event["message"] = str(event.get("message", ""))[:MAX_MESSAGE]
            self._pending.append(("log", event))
        elif kind == "result":
            self.result = event
        elif kind == "error" and (self.error is None or self.error.get("code") == UNEXPECTED):
            self.error = event  # of several ranks the one that others failed of comes first

    def replay(self, folder: Path) -> int:
        """Take the metrics of earlier attempts that never reached the database.

        A metric is known by its step and its names, so this may be done again after a kill.

        Returns:
            How many.

        Raises:
            Fenced: The run is no longer ours.
        """
        earlier = [
            path
            for path in sorted(folder.glob("events-*.jsonl"))
            if path < path_of(folder, self._lease)
        ]
        if not earlier:
            return 0
        with self._sessions() as session:
            known = {(one.name, one.step) for one in runs.metrics(session, self._lease.run_id)}
        old = News(self._sessions, self._lease)
        for path in earlier:
            with path.open("rb") as file:
                for line in Follower(file).lines():
                    old.take(line)
        lost = [
            (kind, event)
            for kind, event in old._pending
            if kind == "metric"
            and any((n, event.get("step")) not in known for n in event["values"])
        ]
        self._pending.extendleft(reversed(lost))
        self.flush()
        return len(lost)

    def flush(self, *, everything: bool = False) -> None:
        """Write what is due; a database that is away keeps it for the next time.

        Raises:
            Fenced: The run is no longer ours.
        """
        now = time.monotonic()
        is_due = everything or now - self._progress_at >= PROGRESS_EVERY_S
        try:
            while self._pending:
                self._record(*self._pending[0])
                self._pending.popleft()
            if self._progress is not None and is_due:
                self._record("progress", self._progress)
                self._progress, self._progress_at = None, now
        except AWAY as error:
            logger.warning("events of %s wait: %s", self._lease.run_id, type(error).__name__)

    def settle(self, for_s: float) -> None:
        """Write everything; wait so long for a database that is away.

        Raises:
            Fenced: The run is no longer ours.
        """
        until = time.monotonic() + for_s
        self.flush(everything=True)
        while self._pending and time.monotonic() < until:
            time.sleep(PAUSE_S)
            self.flush(everything=True)

    def _record(self, kind: Any, data: dict[str, Any]) -> None:
        with self._sessions() as session:
            runs.record(session, self._lease, kind, data)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Without NaN and infinity, which JSON does not know."""
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
