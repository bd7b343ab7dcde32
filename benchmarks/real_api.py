"""The API as the process that it is in production: started, killed, started again, measured."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from benchmarks.chaos.processes import descendants
from service import auth, db, migrate
from service.settings import Settings
from service.stack import environment

MIB = 1 << 20


class RealApi:
    """`pcrl api` over a data folder of its own; a context manager.

    Args:
        folder: The data folder.
        options: Further settings.
    """

    def __init__(self, folder: Path, **options: object) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        values: dict[str, object] = {"data_dir": folder, "port": self.port, "min_free_bytes": 0}
        self.settings = Settings(**{**values, **options})  # type: ignore[arg-type]
        migrate.upgrade(self.settings.database_url)
        engine = db.connect(self.settings.database_url)
        with db.sessions(engine)() as session:
            _, self.token = auth.create_token(session, "test", auth.Role.ADMIN)
            session.commit()
        engine.dispose()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, timeout_s: float = 60.0) -> None:
        """Start it and wait until it answers."""
        env = environment(self.settings)
        env.pop("PCRL_SUPERVISOR_PID")
        with (self.settings.data_dir / "api.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "api"],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + timeout_s
        with httpx.Client(base_url=self.url, trust_env=False) as http:  # 40 ms of a processor each
            while time.monotonic() < deadline and self._process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/healthz").status_code == 200:
                        return
                time.sleep(0.05)
        raise RuntimeError(f"the API did not start; see {self.settings.data_dir / 'api.log'}")

    def wait(self, timeout_s: float) -> int:
        """Its exit status, once it has ended."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait(20)

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
        """Kill."""
        self.kill()


class Growth:
    """By how much the peak of a process' memory rose."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # forgets the peak
        self.before = self._read("VmRSS")

    @property
    def mib(self) -> float:
        """MiB between the resident memory at the beginning and the peak since (VmHWM)."""
        return (self._read("VmHWM") - self.before) / MIB

    def _read(self, name: str) -> int:
        lines = self._status.read_text(encoding="ascii").splitlines()
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024


def processor_s(pid: int) -> float:
    """Processor time of a process and of what it started, alive or ended, in s (proc(5), stat)."""
    ticks = 0
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(OSError):  # it has just ended
            fields = Path(f"/proc/{one}/stat").read_text(encoding="ascii").rpartition(") ")[2]
            times = fields.split()[11:15]  # utime, stime, cutime, cstime
            ticks += sum(int(time) for time in times)
    return ticks / os.sysconf("SC_CLK_TCK")
