"""What the chaos tests share: a real inference worker with quick work, and servers to kill."""

from __future__ import annotations

import importlib.util
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from benchmarks.chaos.processes import Part
from benchmarks.chaos.stack import free_port
from service import celery_app, db, migrate, runs, upkeep
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TASKS = """
import os, signal, time
from celery import shared_task
from service import runs
from service.db import RunState
from service.worker import this_worker, work_through

def work(worker, lease, keeper):
    with worker.sessions() as session:
        runs.started(session, lease)
    if lease.spec.get("poison"):
        os.kill(os.getpid(), signal.SIGSEGV)
    until = time.monotonic() + lease.spec.get("seconds", 0.0)
    while time.monotonic() < until and not keeper.should_stop():
        time.sleep(0.02)
    with worker.sessions() as session:
        if keeper.cancel_requested:
            runs.finish(session, lease, RunState.CANCELED, outcome="canceled")
        elif keeper.is_preempted:
            runs.give_back(session, lease, "preempted")
        else:
            runs.finish(session, lease, RunState.SUCCEEDED, outcome="done")

@shared_task(name="service.infer", ignore_result=True)
def infer(run_id):
    work_through(this_worker("inference"), work)
"""


@pytest.fixture(scope="session")
def workers():
    """`tests/service/workers.py`."""
    path = ROOT / "tests/service/workers.py"
    spec = importlib.util.spec_from_file_location("workers_of_chaos", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quick_tasks(tmp_path: Path) -> Path:
    """An inference worker's tasks that do as their run's spec says, in no time."""
    path = tmp_path / "quick_tasks.py"
    path.write_text(TASKS)
    return path


class RedisPart(Part):
    """A Redis of its own, which keeps nothing when it is killed."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        command = ["redis-server", "--port", str(self.port), *options]
        super().__init__("redis", command, {}, folder / "redis.log")

    def flush(self) -> None:
        """Forget everything."""
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisPart]:
    """A Redis that may be killed; it runs."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server is installed")
    part = RedisPart(tmp_path)
    part.start()
    yield part
    part.kill()


@pytest.fixture
def settings_of(tmp_path: Path) -> Callable[..., Settings]:
    """Short leases, a migrated database, and what a test adds."""

    def make(**options: object) -> Settings:
        values = {
            "data_dir": tmp_path / "data",
            "lease_s": 2.0,
            "heartbeat_s": 0.4,
            "suspect_s": 0.3,
            "dispatch_interval_s": 0.2,
            "min_free_bytes": 0,
        }
        settings = Settings(**{**values, **options})
        settings.data_dir.mkdir(exist_ok=True)
        migrate.upgrade(settings.database_url)
        return settings

    return make


class Service:
    """The API's and upkeep's part, in this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = db.connect(settings.database_url)
        self.sessions = db.sessions(self.engine)
        self.stop = threading.Event()
        self.thread = threading.Thread(
            target=upkeep.run, args=(settings,), kwargs={"stop": self.stop}
        )

    def post(self, *, ring: bool = True, **spec: object) -> str:
        with self.sessions() as session:
            run = runs.create(session, kind="segment", spec=spec, principal="t")
            session.commit()
        if ring:
            celery_app.ring(run.id, run.queue, settings=self.settings)
        return run.id

    def read(self, run_id: str):
        with self.sessions() as session:
            return runs.get(session, run_id)

    def outcomes(self, run_id: str) -> list[str | None]:
        with self.sessions() as session:
            return [attempt.outcome for attempt in runs.attempts(session, run_id)]

    def states(self, run_ids) -> set[str]:
        return {self.read(run_id).state for run_id in run_ids}

    def have_ended(self, run_ids) -> bool:
        return self.states(run_ids) <= db.TERMINAL


@pytest.fixture
def service_of() -> Iterator[Callable[..., Service]]:
    """Makes the service of some settings, with upkeep running."""
    made: list[Service] = []

    def make(settings: Settings, *, upkeeps: bool = True) -> Service:
        made.append(Service(settings))
        if upkeeps:
            made[-1].thread.start()
        return made[-1]

    yield make
    for service in made:
        service.stop.set()
        if service.thread.is_alive():
            service.thread.join()
        service.engine.dispose()
