"""The embedded stack: API, inference worker, training worker and upkeep as child processes.

What docker-compose does on a server, for a laptop, a first look and the tests: migrate, start
everything, restart what dies, stop everything together. Each child has its own process group, so
that Ctrl-C reaches this process alone and the children are asked to stop in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from service import migrate
from service.auth import ensure_admin_token
from service.db import connect, sessions
from service.settings import Settings

COMMANDS: dict[str, tuple[str, ...]] = {
    "upkeep": ("upkeep",),
    "worker-inference": ("worker", "--queue", "inference"),
    "worker-train": ("worker", "--queue", "train"),
    "api": ("api",),
}
MIN_RESTART_PAUSE_S = 1.0
MAX_RESTART_PAUSE_S = 30.0


class StackError(Exception):
    """The stack did not become ready; the message says which part and where its log is."""


class Stack:
    """The processes of one data folder; a context manager that starts and stops them.

    Args:
        settings: What the processes will see; passed on as `PCRL_` variables.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log_dir = settings.data_dir / "logs"
        self.admin_token: str | None = None
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._started_at: dict[str, float] = {}
        self._pauses_s: dict[str, float] = {}
        self._restart_at: dict[str, float] = {}

    @property
    def url(self) -> str:
        """Where the API answers."""
        return f"http://{self.settings.host}:{self.settings.port}"

    def start(self, *, timeout_s: float = 60.0) -> None:
        """Migrate, start every process and wait until the service is ready.

        `admin_token` is the first admin's token where this start has made it, else None.

        Raises:
            StackError: A part did not come up within `timeout_s`.
        """
        self.settings.data_dir.mkdir(parents=True, exist_ok=True)
        self.log_dir.mkdir(exist_ok=True)
        migrate.upgrade(self.settings.database_url)
        engine = connect(self.settings.database_url)
        with sessions(engine)() as session:
            self.admin_token = ensure_admin_token(session, self.settings)
        engine.dispose()
        for name in COMMANDS:
            self._spawn(name)
        try:
            self._wait_until_ready(timeout_s)
        except BaseException:
            self.stop()
            raise

    def supervise(self, *, until: float | None = None) -> None:
        """Restart what dies, with growing pauses; returns only at `until` (monotonic time)."""
        while until is None or time.monotonic() < until:
            self.restart_dead()
            time.sleep(0.5)

    def restart_dead(self) -> None:
        """One round of supervision."""
        now = time.monotonic()
        for name, child in self._children.items():
            if child.poll() is None:
                continue
            if name not in self._restart_at:
                survived = now - self._started_at[name] > MAX_RESTART_PAUSE_S
                previous = 0.0 if survived else self._pauses_s.get(name, 0.0)
                pause = min(max(2 * previous, MIN_RESTART_PAUSE_S), MAX_RESTART_PAUSE_S)
                self._pauses_s[name] = pause
                self._restart_at[name] = now + pause
            elif now >= self._restart_at[name]:
                del self._restart_at[name]
                self._spawn(name)

    def pid_of(self, name: str) -> int:
        """Process id of a part, for example `worker-train`."""
        return self._children[name].pid

    def stop(self, *, grace_s: float = 30.0) -> None:
        """Ask every process to stop, then kill what remains after `grace_s`.

        Of a worker the listening process alone is asked, as under docker; it tells the one that
        works. When the group was signalled, some stops on loaded cores took the whole grace.
        """
        for child in self._children.values():
            child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            _signal_group(child, signal.SIGKILL)
            child.wait()
        self._children.clear()

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, whatever happened."""
        self.stop()

    def _spawn(self, name: str) -> None:
        with (self.log_dir / f"{name}.log").open("ab") as log:
            self._children[name] = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "service.cli", *COMMANDS[name]],
                env=environment(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self._started_at[name] = time.monotonic()

    def _wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with httpx.Client(timeout=5.0) as http:  # to make one takes 40 ms of a processor
            while time.monotonic() < deadline:
                for name, child in self._children.items():
                    if child.poll() is not None:
                        raise StackError(
                            f"{name} ended with status {child.returncode} at its start; see "
                            f"{self.log_dir / f'{name}.log'}"
                        )
                with contextlib.suppress(httpx.TransportError):
                    if http.get(f"{self.url}/readyz").status_code == httpx.codes.OK:
                        return
                time.sleep(0.2)
        raise StackError(f"the service was not ready after {timeout_s:.0f} s; see {self.log_dir}")


def environment(settings: Settings) -> dict[str, str]:
    """This process' environment with `settings` as `PCRL_` variables, for a child process."""
    inherited: Mapping[str, str] = {
        name: value for name, value in os.environ.items() if not name.startswith("PCRL_")
    }
    values = settings.model_dump(mode="json", exclude_none=True)
    here = str(Path(__file__).resolve().parents[1])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **inherited,
        **{f"PCRL_{name.upper()}": str(value) for name, value in values.items()},
        "PCRL_SUPERVISOR_PID": str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal a child's process group; a group that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
