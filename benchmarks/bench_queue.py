"""T-L5: milliseconds of a claim, a sweep and a place in the queue, behind 100,000 waiting runs.

The rows are of 50 projects, three priorities and two kinds; as many have ended before. A claim is
followed by the end of the run, so that every one finds another queue. SQLite lies in a temporary
folder; PostgreSQL is asked with `--postgres URL`, in a database of its own that is dropped again.

    python -m benchmarks.bench_queue --json --postgres postgresql+psycopg://postgres@127.0.0.1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from sqlalchemy import Engine, create_engine, insert, make_url, select, text
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import common
from service import db, migrate, queue, runs
from service.db import Run, RunState

P = ParamSpec("P")
T = TypeVar("T")
QUEUE = "inference"
NUM_PROJECTS = 50
GOALS = {"claim_p99_ms": 20.0, "due_slowest_ms": 200.0}


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        found = {"sqlite": _measured(f"sqlite:///{Path(folder) / 'queue.sqlite3'}", asked)}
    if asked.postgres:
        with _database(asked.postgres) as url:
            found["postgresql"] = _measured(url, asked)
    result: dict[str, object] = {
        "benchmark": "queue",
        "waiting": asked.waiting,
        "device": common.environment(torch.device("cpu"))["device"],
        "goals": GOALS,
        **found,
    }
    for name, figures in found.items():
        common.show_table(f"{asked.waiting} waiting runs on {name}", figures.items())
    if asked.json:
        common.show_json(result)


def _measured(url: str, asked: argparse.Namespace) -> dict[str, float]:
    migrate.upgrade(url)
    engine = db.connect(url)
    try:
        _fill(engine, asked.waiting)
        return measure(db.sessions(engine), asked.rounds)
    finally:
        engine.dispose()


def measure(sessions: sessionmaker[Session], rounds: int) -> dict[str, float]:
    """Milliseconds, by the clock; each step in a session of its own, as the processes do it."""
    claims, ends, sweeps, dues, places = [], [], [], [], []
    with sessions() as session:
        last = session.scalars(
            select(Run).where(Run.state == RunState.QUEUED).order_by(Run.priority, Run.id)
        ).first()
        assert last is not None
    for number in range(rounds):
        with sessions() as session:
            taken, lease = _timed(runs.claim, session, None, QUEUE, "bench")
            assert lease is not None
            claims.append(taken)
        with sessions() as session:
            ended = _timed(runs.finish, session, lease, RunState.SUCCEEDED, outcome="done")
            ends.append(ended[0])
        if number % 10 == 0:
            with sessions() as session:
                sweeps.append(_timed(runs.reap, session)[0])
            with sessions() as session:
                dues.append(_timed(runs.due, session)[0])
            with sessions() as session:
                row = runs.get(session, last.id)
                places.append(_timed(queue.position, session, row)[0])
    return {
        "claim_median_ms": statistics.median(claims),
        "claim_p99_ms": statistics.quantiles(claims, n=100)[98],
        "finish_median_ms": statistics.median(ends),
        "reap_slowest_ms": max(sweeps),
        "due_slowest_ms": max(dues),
        "position_slowest_ms": max(places),
    }


def _timed(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[float, T]:
    """Milliseconds of a call, and what it gave."""
    began = time.perf_counter()
    found = step(*args, **kwargs)
    return 1000 * (time.perf_counter() - began), found


def _fill(engine: Engine, num_waiting: int) -> None:
    now = datetime.now(UTC)
    with db.sessions(engine)() as session:
        for number in range(NUM_PROJECTS):
            session.add(db.Project(id=f"prj_{number}", name=f"project-{number}"))
        session.flush()
        for start in range(0, num_waiting, 5000):
            numbers = range(start, min(start + 5000, num_waiting))
            for state in (RunState.QUEUED, RunState.SUCCEEDED):
                session.execute(insert(Run), [_row(n, state, now) for n in numbers])
            session.commit()
        session.execute(text("ANALYZE"))
        session.commit()


def _row(number: int, state: RunState, now: datetime) -> dict[str, object]:
    kind = ("segment", "embed")[number % 2]
    has_ended = state is RunState.SUCCEEDED
    ended_at = now - timedelta(days=1) if has_ended else None
    return {
        "id": f"{kind[:3]}_{state.value[0]}{number:031x}",
        "kind": kind,
        "state": state,
        "queue": QUEUE,
        "priority": (number % 3 - 1) * 10,
        "spec": {},
        "attempt": int(has_ended),
        "fence": int(has_ended),
        "publish_after": None if has_ended else now - timedelta(seconds=1),
        "project_id": f"prj_{number % NUM_PROJECTS}",
        "created_by": "bench",
        "created_at": now - timedelta(days=1, seconds=-number / 10),
        "started_at": ended_at,
        "finished_at": ended_at,
    }


@contextmanager
def _database(url: str) -> Iterator[str]:
    """A database of its own on that server."""
    name = f"bench_queue_{uuid.uuid4().hex[:8]}"
    server = create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--waiting", type=int, default=100_000, help="runs that wait")
    parser.add_argument("--rounds", type=int, default=300, help="claims")
    parser.add_argument("--postgres", help="SQLAlchemy URL of a server, for a second table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
