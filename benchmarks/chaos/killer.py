"""Whom to kill next. A kill counts only when it hit a live process."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable

from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.chaos.processes import command_of, descendants, is_alive, signal_process
from benchmarks.chaos.stack import ChaosStack
from service import db
from service.db import Run

TARGETS = (
    "api", "worker-inference", "worker-train", "training", "upkeep", "redis", "postgres", "backend"
)  # fmt: skip
EMBEDDED_TARGETS = ("api", "worker-inference", "worker-train", "training", "upkeep")
WAIT_S = 15.0


class Killer:
    """Kills by a seeded plan: every kind of process in each round, in random order.

    Args:
        stack: Whose processes.
        seed: Of the plan.
        only: One kind alone.
        trains: Whether there are trainings to kill, and to wait for.
    """

    def __init__(
        self, stack: ChaosStack, seed: int, *, only: str | None = None, trains: bool = True
    ) -> None:
        self._only = only
        self._trains = trains
        self.stack = stack
        self.random = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.frozen = 0
        self.last_at = 0.0
        self._plan: list[str] = []
        self._engine = db.connect(stack.settings.database_url)

    def kill(self) -> str | None:
        """Kill one process; its kind, or None if none of the kind came to life in time."""
        if not self._plan:
            kinds: tuple[str, ...] = EMBEDDED_TARGETS if self.stack.is_embedded else TARGETS
            kinds = tuple(kind for kind in kinds if self._trains or kind != "training")
            kinds = (self._only,) if self._only is not None else kinds
            self._plan = self.random.sample(kinds, len(kinds))
        kind = self._plan.pop()
        deadline = time.monotonic() + (WAIT_S if self._only is None else 10 * WAIT_S)
        waits = kind == "worker-train" and self._trains
        while waits and not self._trainings() and time.monotonic() < deadline:
            time.sleep(0.05)  # better while it has something to lose
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            pid = self._pid(kind)
            if pid is not None and signal_process(pid, signal.SIGKILL):
                self.killed[kind] += 1
                self.last_at = time.monotonic()
                return kind
            time.sleep(0.05)
        return None

    def freeze(self, seconds: float, *, should_end: Callable[[], bool]) -> bool:
        """Stop an inference worker while it holds a run, for longer than its lease; whether it hit.

        The run is looked at again once the process stands still: only then was the window hit.
        """
        deadline = time.monotonic() + 4 * WAIT_S
        while time.monotonic() < deadline and not should_end():
            held = self._held()
            if held is None:
                time.sleep(0.005)
                continue
            run_id, fence, pid = held
            if not signal_process(pid, signal.SIGSTOP):
                continue
            time.sleep(0.05)
            if self._held(run_id) == (run_id, fence, pid):
                time.sleep(seconds)
                signal_process(pid, signal.SIGCONT)
                self.frozen += 1
                self.last_at = time.monotonic()
                return True
            signal_process(pid, signal.SIGCONT)
        return False

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def _held(self, run_id: str | None = None) -> tuple[str, int, int] | None:
        query = select(Run.id, Run.fence, Run.lease_owner).where(
            Run.queue == "inference", Run.state.in_(db.HELD)
        )
        if run_id is not None:
            query = query.where(Run.id == run_id)
        try:
            with self._engine.connect() as connection:
                row = connection.execute(query.limit(1)).one_or_none()
        except SQLAlchemyError:
            return None
        if row is None or row.lease_owner is None:
            return None
        return row.id, row.fence, int(row.lease_owner.split(":")[-2])

    def _pid(self, kind: str) -> int | None:
        if kind == "backend":
            return self._backend()
        if kind == "training":
            return self._one(self._trainings())
        if kind == "worker-inference":
            main = self.stack.part(self.random.choice(self.stack.workers)).pid
            return self._one([main, *descendants(main)])
        return self.stack.part(kind).pid

    def _trainings(self) -> list[int]:
        below = descendants(self.stack.part("worker-train").pid)
        return [pid for pid in below if "-m trainer " in command_of(pid)]

    def _backend(self) -> int | None:
        """A connection of somebody else's that has just worked."""
        query = (
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' "
            "AND pid <> pg_backend_pid() ORDER BY state_change DESC LIMIT 4"
        )
        try:
            with self._engine.connect() as connection:
                return self._one([row[0] for row in connection.execute(text(query))])
        except SQLAlchemyError:
            return None

    def _one(self, pids: list[int]) -> int | None:
        alive = [pid for pid in pids if is_alive(pid)]
        return self.random.choice(alive) if alive else None
