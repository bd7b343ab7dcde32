"""Processes that are started, found in /proc, killed and started again. Linux."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESTART_PAUSE_S = 0.3


@dataclass
class Part:
    """One process of the stack, in a group of its own."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    died_at: float | None = None

    def start(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        self.died_at = None

    @property
    def pid(self) -> int:
        """Its process id, running or not."""
        assert self.process is not None
        return self.process.pid

    def is_running(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None


@dataclass
class Supervisor:
    """Starts again whatever dies, as a service manager would."""

    parts: dict[str, Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def add(self, part: Part) -> None:
        """Start a part; from `watch` on it is kept alive."""
        part.start()
        self.parts[part.name] = part

    def watch(self) -> None:
        """Begin to restart what dies."""
        self._thread.start()

    def stop(self) -> None:
        """End everything."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        for part in self.parts.values():
            for pid in (part.pid, *descendants(part.pid)):
                signal_process(pid, signal.SIGCONT)
                signal_process(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)
            if part.process is not None:
                part.process.wait(10)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            now = time.monotonic()
            for part in self.parts.values():
                if part.is_running():
                    continue
                if part.died_at is None:
                    part.died_at = now
                elif now - part.died_at > RESTART_PAUSE_S:
                    part.start()


def signal_process(pid: int, number: signal.Signals) -> bool:
    """Signal a process; whether it was alive (a zombie of the process table is not)."""
    if not is_alive(pid):
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def is_alive(pid: int) -> bool:
    """Whether the process runs or sleeps."""
    stat = _stat(pid)
    return stat is not None and stat[0] not in "ZX"


def command_of(pid: int) -> str:
    """The command line, words divided by spaces; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (stat := _stat(int(folder.name))) is not None:
            children.setdefault(int(stat[1]), []).append(int(folder.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _stat(pid: int) -> list[str] | None:
    """State, parent and what follows in /proc/<pid>/stat."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
