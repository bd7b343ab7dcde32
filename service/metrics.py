"""What Prometheus reads: the state of queues, runs, workers and disk, out of the database.

The API is the one thing to scrape: workers write their rows and their runs' results, and nobody
needs to reach them. No label holds an identifier of a patient, a scan, a run or a caller.

Gauges are read at each scrape. The histogram of stage times and the counter of model loads are kept
in this process: each scrape adds the runs that have ended since the last one, so they begin at zero
when the API starts, as Prometheus expects of a counter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session, sessionmaker

from service.db import (
    CLAIMABLE,
    HELD,
    QUEUE_OF,
    Blob,
    Run,
    RunAttempt,
    RunState,
    WorkerHeartbeat,
    db_now,
)
from service.storage import Store

STAGE_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)
OVERLAP_S = 60.0
"""A run's end may be committed so much later than the time that it carries."""
SEEN_S = 86400.0


class ServiceMetrics(Collector):
    """Everything but requests; register it with a `CollectorRegistry`."""

    def __init__(self, sessions: sessionmaker[Session], store: Store, version: str) -> None:
        self._sessions, self._store, self._version = sessions, store, version
        self._ended = Ended()

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: registering must not ask the database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read the database once, in one transaction."""
        with self._sessions() as session:
            now = session.scalars(select(db_now())).one()
            families = [
                *_runs(session, now),
                _attempts(session),
                *_workers(session, now),
                _gauge("pcrl_stored_bytes", "Bytes of stored files", _stored(session)),
            ]
            self._ended.take(session, now)
            session.rollback()
        yield from families
        yield from self._ended.registry.collect()
        yield _gauge("pcrl_disk_free_bytes", "Free space for the store", self._store.free_bytes())
        minimum = self._store.min_free_bytes
        yield _gauge("pcrl_disk_min_free_bytes", "Below it uploads are refused", minimum)
        build = GaugeMetricFamily("pcrl_build_info", "The version", labels=["version"])
        build.add_metric([self._version], 1)
        yield build


class Ended:
    """Counters over runs that have ended since the process started."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._since: datetime | None = None
        self._counted: dict[str, datetime] = {}
        self._seconds = Histogram(
            "pcrl_run_stage_seconds",
            "Time that succeeded runs spent in a stage",
            ("kind", "stage"),
            buckets=STAGE_BUCKETS_S,
            registry=self.registry,
        )
        self._loads = Counter(
            "pcrl_model_loads",
            "Runs whose model was opened (cold) or resident (warm)",
            ("how",),
            registry=self.registry,
        )

    def take(self, session: Session, now: datetime) -> None:
        """Count the runs that have ended since the last time, each once."""
        with self._lock:
            if self._since is None:
                self._since = now
            horizon = self._since - timedelta(seconds=OVERLAP_S)
            ended = session.execute(
                select(Run.id, Run.kind, Run.result, Run.started_at, Run.finished_at).where(
                    Run.state == RunState.SUCCEEDED, Run.finished_at >= horizon
                )
            ).all()
            for row in ended:
                if row.id not in self._counted:
                    self._counted[row.id] = row.finished_at
                    self._count(row.kind, row.result or {}, row.started_at, row.finished_at)
            self._since = now
            oldest = now - timedelta(seconds=2 * OVERLAP_S)
            self._counted = {key: at for key, at in self._counted.items() if at >= oldest}

    def _count(
        self, kind: str, result: dict[str, object], started: datetime | None, ended: datetime
    ) -> None:
        timings = result.get("timings_s")
        stages = dict(timings) if isinstance(timings, dict) else {}
        if started is not None:
            stages["run"] = (ended - started).total_seconds()
        for stage, seconds in stages.items():
            if isinstance(seconds, int | float):
                self._seconds.labels(kind, str(stage)).observe(float(seconds))
        if isinstance(was_resident := result.get("model_was_resident"), bool):
            self._loads.labels("warm" if was_resident else "cold").inc()


def _runs(session: Session, now: datetime) -> Iterator[Metric]:
    counts = GaugeMetricFamily("pcrl_runs", "Runs by state", labels=["queue", "state"])
    found: dict[tuple[str, str], int] = {}
    for queue, state, number in session.execute(
        select(Run.queue, Run.state, func.count()).group_by(Run.queue, Run.state)
    ):
        found[queue, state] = number
    for queue in sorted(set(QUEUE_OF.values())):
        for state in RunState:
            counts.add_metric([queue, state.value], found.get((queue, state.value), 0))
    yield counts
    ages = GaugeMetricFamily(
        "pcrl_oldest_run_age_seconds", "Age of the oldest run; 0: none", labels=["queue", "what"]
    )
    for what, states, since in (
        ("queued", CLAIMABLE, func.min(Run.created_at)),
        ("running", HELD, func.min(Run.started_at)),
    ):
        oldest = _by_queue(session, since, Run.state.in_(states))
        for queue in sorted(set(QUEUE_OF.values())):
            at = oldest.get(queue)
            ages.add_metric([queue, what], max(0.0, (now - at).total_seconds()) if at else 0.0)
    yield ages


def _by_queue(
    session: Session, value: ColumnElement[Any], where: ColumnElement[bool]
) -> dict[str, datetime]:
    rows = session.execute(select(Run.queue, value).where(where).group_by(Run.queue))
    return {queue: at for queue, at in rows if at is not None}


def _attempts(session: Session) -> Metric:
    family = CounterMetricFamily(
        "pcrl_run_attempts", "Attempts that have ended", labels=["kind", "outcome"]
    )
    for kind, outcome, number in session.execute(
        select(Run.kind, func.coalesce(RunAttempt.outcome, ""), func.count())
        .join(Run, Run.id == RunAttempt.run_id)
        .where(RunAttempt.outcome.is_not(None))
        .group_by(Run.kind, RunAttempt.outcome)
    ):
        family.add_metric([kind, outcome], number)
    return family


def _workers(session: Session, now: datetime) -> Iterator[Metric]:
    """By host and queue; a host's restarted worker has a new process id, so that is no label."""
    seen = GaugeMetricFamily(
        "pcrl_worker_heartbeat_age_seconds",
        "Since the newest sign of life",
        labels=["host", "queue", "device"],
    )
    memory = GaugeMetricFamily(
        "pcrl_gpu_memory_bytes", "Memory of workers' GPUs", labels=["host", "device", "what"]
    )
    newest: dict[tuple[str, str, str], WorkerHeartbeat] = {}
    rows = session.scalars(
        select(WorkerHeartbeat)
        .where(WorkerHeartbeat.seen_at > db_now(-SEEN_S))
        .order_by(WorkerHeartbeat.seen_at)
    )
    for row in rows:
        newest[row.worker.partition(":")[0], row.queue, row.device] = row
    gpus: dict[tuple[str, str], WorkerHeartbeat] = {}
    for (host, queue, device), row in newest.items():
        seen.add_metric([host, queue, device], max(0.0, (now - row.seen_at).total_seconds()))
        if row.used_bytes is not None:
            gpus[host, device] = row
    for (host, device), row in gpus.items():
        memory.add_metric([host, device, "used"], float(row.used_bytes or 0))
        memory.add_metric([host, device, "total"], float(row.memory_bytes))
    yield seen
    if gpus:
        yield memory


def _stored(session: Session) -> float:
    return float(session.scalar(select(func.coalesce(func.sum(Blob.size_bytes), 0))) or 0)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
