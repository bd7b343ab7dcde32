"""What docker-compose.yml runs, as plain processes on real PostgreSQL and Redis.

The commands, settings, health checks and the Redis server's arguments are read from the compose
file (CPU variant), the secrets come from docker/init-secrets.sh; addresses and paths alone are
mapped to this machine. What this cannot show: images, networks, limits, the read-only root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from imaging import phantom
from service.client import Client
from service.stack import COMMANDS

pytestmark = [pytest.mark.services, pytest.mark.slow]

PARTS = ("upkeep", "worker-inference", "worker-train", "api")
READY_S = 60.0
GRACE_S = 40.0
"""Nothing runs at the end, so every part has less to do than its stop_grace_period allows."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def absent(what: str) -> None:
    """Skip, or fail where the servers were promised (as in tests/conftest.py)."""
    if os.environ.get("PCRL_TEST_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what}, and PCRL_TEST_REQUIRE_SERVICES=1 forbids to skip")
    pytest.skip(what)


@pytest.fixture
def services(compose_with: Callable[..., Any]) -> Any:
    """The services of the CPU variant."""
    return compose_with("docker/compose.cpu.yml")["services"]


@pytest.fixture
def secrets(root: Path, tmp_path: Path) -> Path:
    """The secrets that init-secrets.sh makes."""
    if os.geteuid() != 0:
        absent("docker/init-secrets.sh needs root")
    folder = tmp_path / "secrets"
    subprocess.run(["sh", root / "docker/init-secrets.sh", folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def broker(services: Any, secrets: Path, tmp_path: Path) -> Iterator[int]:
    """The Redis of the compose file, with its arguments and users; gives its port."""
    if shutil.which("redis-server") is None:
        absent("no redis-server binary")
    port = free_port()
    (tmp_path / "redis").mkdir()
    local = {"/data": str(tmp_path / "redis"), "/run/secrets/redis_users": f"{secrets}/redis_users"}
    command = [local.get(word, word) for word in services["redis"]["command"]]
    here = ["--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen([*command, *here], stdout=subprocess.DEVNULL)
    password = (secrets / "redis_password").read_text()
    client = redis.Redis(port=port, username="pcrl", password=password)
    deadline = time.monotonic() + 10
    while True:
        try:
            client.ping()
            break
        except redis.ConnectionError:
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.05)
    client.close()
    yield port
    process.terminate()
    process.wait(20)


@pytest.fixture
def environment(
    services: Any, secrets: Path, broker: int, postgres_url: str, tmp_path: Path
) -> Callable[[str], dict[str, str]]:
    """A service's environment in the compose file, with this machine's addresses and paths."""
    broker_url = secrets / "broker_url"
    broker_url.write_text(
        broker_url.read_text().replace("@redis:6379", f"@127.0.0.1:{broker}"), encoding="utf-8"
    )
    api_port = str(free_port())
    local = {
        "PCRL_DATA_DIR": str(tmp_path / "data"),
        "PCRL_DATABASE_URL": postgres_url,
        "PCRL_HOST": "127.0.0.1",
        "PCRL_PORT": api_port,
    }

    def of(name: str) -> dict[str, str]:
        stated = services[name]["environment"]
        values = {
            variable: str(value).replace("/run/secrets", str(secrets))
            for variable, value in stated.items()
        }
        values |= {variable: local[variable] for variable in local if variable in stated}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PCRL_")}
        root = str(Path(__file__).resolve().parents[2])
        # The machine is shared with other tests; one thread each is enough.
        threads = {"PCRL_INFERENCE_THREADS": "1", "PCRL_TRAIN_THREADS": "1", "OMP_NUM_THREADS": "1"}
        return {**inherited, **values, **threads, "PYTHONPATH": root}

    return of


class Parts:
    """The processes of the stack, each with its compose command and environment."""

    def __init__(self, services: Any, environment: Callable[[str], dict[str, str]], logs: Path):
        self.services, self.environment, self.logs = services, environment, logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir()

    def command(self, name: str) -> list[str]:
        program, *arguments = self.services[name]["command"]
        assert program == "pcrl"
        return [sys.executable, "-m", "service.cli", *arguments]

    def start(self, name: str) -> None:
        with (self.logs / name).open("wb") as log:
            self.running[name] = subprocess.Popen(
                self.command(name),
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.logs,
                process_group=0,
            )

    def health(self, name: str, root: Path) -> int:
        """Status of the compose file's own health check."""
        program, script, part = self.services[name]["healthcheck"]["test"][1:]
        assert (program, script) == ("python", "/opt/pcrl/healthcheck.py")
        check = [sys.executable, root / "docker/healthcheck.py", part]
        return subprocess.run(check, env=self.environment(name), capture_output=True).returncode

    def log(self) -> str:
        tails = (f"--- {path.name}\n{path.read_text()[-20_000:]}" for path in self.logs.iterdir())
        return "\n".join(tails)


@pytest.fixture
def parts(
    services: Any, environment: Callable[[str], dict[str, str]], tmp_path: Path
) -> Iterator[Parts]:
    stack = Parts(services, environment, tmp_path / "logs")
    yield stack
    for process in stack.running.values():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


def wait_until_ready(parts: Parts, url: str) -> None:
    deadline = time.monotonic() + READY_S
    found = "no answer"
    with httpx.Client(timeout=10) as http:
        while time.monotonic() < deadline:
            for name, process in parts.running.items():
                assert process.poll() is None, f"{name} ended early\n{parts.log()}"
            try:
                answer = http.get(f"{url}/readyz")
                if answer.status_code == 200:
                    return
                found = answer.text
            except httpx.TransportError:
                pass
            time.sleep(0.3)
    pytest.fail(f"not ready after {READY_S:.0f} s: {found}\n{parts.log()}")


def tiny_pretraining() -> dict[str, Any]:
    return {
        "network": {"base_width": 2},
        "method": {"queue_size": 16, "embedding_size": 16},
        "preprocessing": {"spacing_mm": [8.0, 8.0, 8.0]},
        "crops": {"crop_sizes": [[16, 16, 16]], "input_size": [16, 16, 16]},
        "num_steps": 2,
        "batch_size": 2,
        "checkpoint_every": 1,
        "log_every": 1,
    }


def test_the_compose_file_starts_the_parts_of_the_embedded_stack(services: Any) -> None:
    for name, arguments in COMMANDS.items():
        assert tuple(services[name]["command"]) == ("pcrl", *arguments)


@pytest.mark.timeout(300)
def test_the_composed_stack_trains_on_postgresql_and_redis_and_stops_in_time(
    parts: Parts,
    environment: Callable[[str], dict[str, str]],
    secrets: Path,
    root: Path,
    tmp_path: Path,
) -> None:
    url = f"http://127.0.0.1:{environment('api')['PCRL_PORT']}"
    subprocess.run(
        parts.command("migrate"), env=environment("migrate"), cwd=tmp_path, check=True, timeout=60
    )
    assert parts.health("worker-inference", root) != 0  # the control: nothing runs yet
    for name in PARTS:
        parts.start(name)
    wait_until_ready(parts, url)
    assert {name: parts.health(name, root) for name in PARTS} == dict.fromkeys(PARTS, 0)

    token = (secrets / "admin_token").read_text()
    made = phantom.make(0, shape=(48, 48, 32), spacing_mm=(8.0, 8.0, 8.0))
    image, _ = phantom.write_pair(made, tmp_path / "scans", "p0")
    with Client(url, token) as client:
        volume = client.upload(image, subject="p0")
        dataset = client.create_dataset("one", [(volume.id, None, "train")])
        run = client.pretrain(dataset.id, tiny_pretraining(), model_name="tiny")
        ended = client.wait(run.id, timeout_s=180)
    assert ended.state == "succeeded", f"{ended.error}\n{parts.log()}"
    assert ended.model is not None
    assert token not in parts.log()
    assert "NOPERM" not in parts.log()  # the one Redis user may do all that kombu does

    for process in parts.running.values():
        process.send_signal(signal.SIGTERM)
    asked_at = time.monotonic()
    statuses = {}
    for name, process in parts.running.items():
        left_s = max(0.1, asked_at + GRACE_S - time.monotonic())
        try:
            statuses[name] = process.wait(left_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name} did not stop within {GRACE_S:.0f} s\n{parts.log()}")
    # uvicorn ends by the signal that it was sent, after its clean shutdown.
    assert {name: status for name, status in statuses.items() if status not in (0, -15)} == {}
    assert parts.health("worker-train", root) != 0


def test_redis_refuses_whoever_is_not_the_one_user(broker: int, secrets: Path) -> None:
    with redis.Redis(port=broker) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()

    password = (secrets / "redis_password").read_text()
    with redis.Redis(port=broker, username="pcrl", password=password) as ours:
        assert ours.set("pcrl:x", 1)
        for refused in (
            lambda: ours.config_get("*"),
            lambda: ours.execute_command("MODULE", "LIST"),
            lambda: ours.execute_command("REPLICAOF", "127.0.0.1", "1"),
            lambda: ours.execute_command("SHUTDOWN", "NOSAVE"),
            lambda: ours.get("another"),
            ours.flushall,
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                refused()


def test_secrets_are_made_once_and_only_for_the_containers_group(root: Path, secrets: Path) -> None:
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}

    subprocess.run(["sh", root / "docker/init-secrets.sh", secrets], check=True)

    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == before
    assert set(before) == {
        "admin_token",
        "broker_url",
        "database_password",
        "redis_password",
        "redis_users",
    }
    for path in secrets.iterdir():
        assert (path.stat().st_mode & 0o777, path.stat().st_gid) == (0o640, 10001)
    assert before["redis_password"] not in before["redis_users"]
    assert len(set(before.values())) == len(before)
