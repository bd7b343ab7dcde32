"""Training workers as real processes: whatever is killed, the run ends as it should.

The supervised child is a small script that speaks the trainer's event interface and resumes from
its own checkpoint file, so that a test takes seconds; the whole chain with the real trainer is in
`tests/service/test_workers_inference.py` and in `make demo`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from service import celery_app, db, migrate, runs, upkeep
from service.settings import Settings

pytestmark = pytest.mark.slow

_spec = importlib.util.spec_from_file_location("workers", Path(__file__).with_name("workers.py"))
workers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)

CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from service.process import stop_with_parent

stop_with_parent(os.getppid(), signal.SIGKILL)
out, mode = Path(sys.argv[1]), sys.argv[2]
out.mkdir(exist_ok=True)
(out / "pids").open("a").write(f"{os.getpid()}\\n")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
say = lambda **event: print(json.dumps(event), flush=True)
checkpoint = out / "step"
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
if mode == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
for step in range(first + 1, 31):
    time.sleep(0.1)
    draft = out / "draft"
    draft.write_text(str(step))
    draft.rename(checkpoint)
    say(event="progress", stage="train", step=step, total=30, fraction=step / 30, eta_s=1.0)
    say(event="metric", step=step, values={"loss": 1.0 / step, "bad": float("nan")})
    print("a library prints this")
    if asked:
        sys.exit(75)
say(event="error", code="parity_failed", detail="0.2 is above 0.1")
sys.exit(79)
"""
TASKS = """
import sys
from pathlib import Path
from trainer import tasks

def prepare(worker, lease, folder):
    child = Path(__file__).with_name("child.py")
    return [sys.executable, str(child), str(folder / "out"), lease.spec["mode"]]

tasks.prepare = prepare
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    path = tmp_path / "script_tasks.py"
    path.write_text(TASKS)
    return path


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.nightly),
        pytest.param("servers", marks=pytest.mark.services),
    ]
)
def settings(request, tmp_path):
    """Short leases; SQLite and the folder broker, or PostgreSQL and Redis."""
    servers = {}
    if request.param == "servers":
        servers = {
            "database_url": request.getfixturevalue("postgres_url"),
            "broker_url": request.getfixturevalue("redis_url"),
        }
    settings = Settings(
        data_dir=tmp_path / "data",
        lease_s=2.5,
        heartbeat_s=0.4,
        suspect_s=0.5,
        dispatch_interval_s=0.2,
        stop_grace_s=5.0,
        **servers,
    )
    migrate.upgrade(settings.database_url)
    return settings


@pytest.fixture
def sessions(settings):
    engine = db.connect(settings.database_url)
    yield db.sessions(engine)
    engine.dispose()


@pytest.fixture
def upkeeping(settings, sessions):
    stop = threading.Event()
    thread = threading.Thread(target=upkeep.run, args=(settings,), kwargs={"stop": stop})
    thread.start()
    yield
    stop.set()
    thread.join()


def post(sessions, settings, mode="train"):
    with sessions() as session:
        run = runs.create(session, kind="pretrain", spec={"mode": mode}, principal="t")
        session.commit()
    assert celery_app.ring(run.id, run.queue, settings=settings)
    return run.id


def read(sessions, run_id):
    with sessions() as session:
        return runs.get(session, run_id)


def step_of(sessions, run_id):
    return (read(sessions, run_id).progress or {}).get("step", 0)


def pids_of(settings, run_id):
    path = settings.data_dir / "work" / run_id / "out" / "pids"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def outcomes(sessions, run_id):
    with sessions() as session:
        return [attempt.outcome for attempt in runs.attempts(session, run_id)]


def live_queues(sessions):
    with sessions() as session:
        return session.scalars(select(db.WorkerHeartbeat.queue)).all()


def test_a_run_whose_worker_is_killed_resumes_and_ends_without_a_human(
    settings, sessions, script, tmp_path, upkeeping
):
    run_id = post(sessions, settings)
    log = tmp_path / "worker.log"
    with workers.worker(settings, "train", log, include=script) as first:
        workers.wait_for(lambda: step_of(sessions, run_id) >= 5, what=log.read_text())
        (child,) = pids_of(settings, run_id)
        workers.stop(first, signal.SIGKILL)
        workers.wait_for(lambda: not is_alive(child), timeout_s=5.0, what="for the child to die")

    with workers.worker(settings, "train", log, include=script):
        workers.wait_for(lambda: read(sessions, run_id).state in db.TERMINAL)

    run = read(sessions, run_id)
    assert (run.state, run.error["code"]) == ("failed", "parity_failed")  # how this child ends
    assert run.attempt == 2
    assert outcomes(sessions, run_id) == ["lost", "error"]
    with sessions() as session:
        steps = [point.step for point in runs.metrics(session, run_id, names=["loss"])]
        assert runs.metrics(session, run_id, names=["bad"]) == []
    assert steps == sorted(set(steps))  # no step twice
    assert (steps[0], steps[-1]) == (1, 30)  # resumed where it was
    assert len(steps) == 30  # what the killed worker had not written down was replayed


def test_t_c13_a_worker_that_is_asked_to_stop_gives_its_run_back(
    settings, sessions, script, tmp_path
):
    run_id = post(sessions, settings)
    log = tmp_path / "worker.log"
    with workers.worker(settings, "train", log, include=script) as process:
        workers.wait_for(lambda: step_of(sessions, run_id) >= 2)
        assert live_queues(sessions) == ["train"]
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.wait(15.0)

    run = read(sessions, run_id)
    assert time.monotonic() - began < 15.0
    assert (run.state, run.attempt) == ("interrupted", 0)
    assert outcomes(sessions, run_id) == ["preempted"]
    assert not any(is_alive(pid) for pid in pids_of(settings, run_id))
    assert live_queues(sessions) == []  # readiness sees at once that nobody serves the queue


def test_t_c10_a_canceled_training_stops(settings, sessions, script, tmp_path):
    run_id = post(sessions, settings)
    with workers.worker(settings, "train", tmp_path / "worker.log", include=script):
        workers.wait_for(lambda: step_of(sessions, run_id) >= 2)
        with sessions() as session:
            runs.request_cancel(session, run_id)
            session.commit()
        workers.wait_for(lambda: read(sessions, run_id).state in db.TERMINAL, timeout_s=10.0)

        assert read(sessions, run_id).state == "canceled"
        assert not any(is_alive(pid) for pid in pids_of(settings, run_id))


@pytest.mark.parametrize("settings", ["embedded"], indirect=True)
def test_t_c8_a_training_that_segfaults_is_tried_three_times_and_the_next_run_goes_on(
    settings, sessions, script, tmp_path
):
    poison, other = post(sessions, settings, "crash"), post(sessions, settings)
    with workers.worker(settings, "train", tmp_path / "worker.log", include=script):
        workers.wait_for(lambda: step_of(sessions, other) >= 1)

    run = read(sessions, poison)
    assert (run.state, run.error["code"]) == ("failed", "native_crash")
    assert outcomes(sessions, poison) == ["crash"] * 3
    assert len(pids_of(settings, poison)) == 3


def test_a_broker_that_is_down_never_fails_the_request(tmp_path):
    settings = Settings(data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0")

    begin = time.monotonic()
    assert celery_app.ring("run_1", "train", settings=settings) is False
    assert time.monotonic() - begin < 3  # kombu by itself tries for six seconds
