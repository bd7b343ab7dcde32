"""The stack under chaos: real processes with short leases, on servers of its own.

PostgreSQL and Redis are started from the installed programs, in the folder of the test, on free
ports, so that they can be killed; PostgreSQL runs as user `postgres` where we are root. Redis
keeps nothing on disk: each kill loses every message.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg
import redis

from benchmarks.chaos.processes import Part, Supervisor
from service import auth, celery_app, db, migrate
from service.settings import Settings
from service.stack import environment

INFERENCE_WORKERS = ("worker-inference-1", "worker-inference-2")
START_S = 60.0
SABOTAGE = "benchmarks.chaos.sabotage"


class Unavailable(Exception):  # noqa: N818  # reads as what was found
    """A program that this needs is not installed."""


def postgres_folder() -> Path:
    """Where the installed PostgreSQL has its programs.

    Raises:
        Unavailable: There is none.
    """
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "initdb").exists():
            return folder
    found = shutil.which("initdb")
    if found is None:
        raise Unavailable("no PostgreSQL server is installed")
    return Path(found).parent


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class ChaosStack:
    """Everything that runs, with a supervisor.

    Args:
        folder: Where all of it lies.
        embedded: SQLite and the folder broker instead of PostgreSQL and Redis.
        without: A control: what is sabotaged (`fencing`, `republishing`).
        num_workers: Inference workers, 1 or 2.
        options: Further settings.
    """

    def __init__(
        self,
        folder: Path,
        *,
        embedded: bool,
        without: str | None = None,
        num_workers: int = 2,
        **options: object,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.supervisor = Supervisor()
        self.without = without
        self.workers = INFERENCE_WORKERS[:num_workers]
        self.is_embedded = embedded
        servers = {} if embedded else self._servers()
        values: dict[str, object] = {
            "data_dir": folder / "data",
            "port": free_port(),
            "lease_s": 8.0,
            "heartbeat_s": 1.0,
            "suspect_s": 1.0,
            "dispatch_interval_s": 0.5,
            "stop_grace_s": 5.0,
            "max_attempts": 50,  # the kills are ours: no run is to be given up (T-C8 counts to 3)
            "device": "cpu",
            "inference_threads": 1,
            "train_threads": 1,
            "min_free_bytes": 0,
        }
        self.settings = Settings(**{**values, **servers, **options})  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """Where the API answers."""
        return f"http://127.0.0.1:{self.settings.port}"

    def start(self) -> str:
        """Migrate and start every part; returns an admin's token."""
        migrate.upgrade(self.settings.database_url)
        engine = db.connect(self.settings.database_url)
        with db.sessions(engine)() as session:
            _, token = auth.create_token(session, "chaos", auth.Role.ADMIN)
            session.commit()
        engine.dispose()
        self._add("api", self._pcrl("api"))
        self._add("upkeep", self._pcrl("upkeep"))
        for name in self.workers:
            self._add(name, self._worker("inference"))
        self._add("worker-train", self._worker("train"))
        self.supervisor.watch()
        return token

    def stop(self) -> None:
        """End every process."""
        self.supervisor.stop()

    def part(self, name: str) -> Part:
        """A part by name."""
        return self.supervisor.parts[name]

    def _pcrl(self, name: str) -> list[str]:
        if self.without is not None:
            return [sys.executable, "-m", SABOTAGE, name]
        return [sys.executable, "-m", "service.cli", name]

    def _worker(self, queue: str) -> list[str]:
        command = celery_app.worker_command(queue, settings=self.settings)
        if self.without is not None:
            at = command.index("--include") + 1
            command[at] = f"{SABOTAGE},{command[at]}"
        return command

    def _add(self, name: str, command: Sequence[str]) -> None:
        env = environment(self.settings)
        env.pop("PCRL_SUPERVISOR_PID")
        env |= {"OMP_NUM_THREADS": "1", "CHAOS_WITHOUT": self.without or ""}
        self.supervisor.add(Part(name, command, env, self.logs / f"{name}.log"))

    def _servers(self) -> dict[str, object]:
        program = shutil.which("redis-server")
        if program is None:
            raise Unavailable("no redis-server is installed")
        redis_port, postgres_port = free_port(), free_port()
        env = dict(os.environ)
        redis_command = [program, "--port", str(redis_port), "--bind", "127.0.0.1"]
        redis_command += ["--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        self.supervisor.add(Part("redis", redis_command, env, self.logs / "redis.log"))
        data = self.folder / "postgres"
        as_user = _become_postgres(self.folder, data)
        bin_folder = postgres_folder()
        subprocess.run(
            [*as_user, bin_folder / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "-N"],
            check=True,
            capture_output=True,
        )
        options = {
            "port": postgres_port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "shared_buffers": "32MB",
            "max_connections": 100,
        }
        command = [*as_user, str(bin_folder / "postgres"), "-D", str(data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self.supervisor.add(Part("postgres", command, env, self.logs / "postgres.log"))
        url = f"postgresql://postgres@127.0.0.1:{postgres_port}/postgres"
        _until(lambda: psycopg.connect(url, connect_timeout=2).close(), psycopg.OperationalError)
        client = redis.Redis(port=redis_port)
        _until(client.ping, redis.ConnectionError)
        client.close()
        return {
            "database_url": url.replace("postgresql:", "postgresql+psycopg:"),
            "broker_url": f"redis://127.0.0.1:{redis_port}/0",
        }


def _become_postgres(folder: Path, data: Path) -> list[str]:
    """The start of a command that runs as user `postgres`; nothing if we are not root."""
    data.mkdir()
    if os.geteuid() != 0:
        return []
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        raise Unavailable("no user postgres, and PostgreSQL refuses to run as root") from None
    os.chown(data, user.pw_uid, user.pw_gid)
    for above in (folder, *folder.parents):
        if above.stat().st_uid == 0 and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return ["setpriv", *ids]


def _until(attempt: object, error: type[Exception]) -> None:
    deadline = time.monotonic() + START_S
    assert callable(attempt)
    while True:
        try:
            attempt()
            return
        except error:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
