"""Real worker processes for tests: started as the product starts them, stopped by process id."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from service import celery_app
from service.settings import Settings
from service.stack import environment

ROOT = Path(__file__).parents[2]


def wait_for(condition: Callable[[], object], *, timeout_s: float = 40.0, what: str = "") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def worker(
    settings: Settings,
    queue: str,
    log: Path,
    *,
    include: Path | None = None,
    options: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A Celery worker in its own process group; killed at the end if it still runs.

    Args:
        settings: What it sees.
        queue: What it works on.
        log: Where its output goes.
        include: A module file to load instead of the queue's own tasks.
        options: More of Celery's command line.
    """
    env = {**environment(settings), "OMP_NUM_THREADS": "1"}
    env.pop("PCRL_SUPERVISOR_PID", None)
    command = celery_app.worker_command(queue, settings=settings)
    if include is not None:
        command[command.index("--include") + 1] = include.stem
        env["PYTHONPATH"] = f"{include.parent}:{env['PYTHONPATH']}"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *options], env=env, cwd=ROOT, stdout=output, stderr=output, process_group=0
        )
    try:
        yield process
    finally:
        stop(process, signal.SIGKILL)


def stop(process: subprocess.Popen[bytes], number: signal.Signals, *, wait_s: float = 30.0) -> int:
    """Signal the worker's whole group and wait for its main process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    return process.wait(wait_s)
