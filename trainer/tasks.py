"""The training worker: a supervisor that starts `python -m trainer` and records what it says.

It never imports torch. The child is a process of its own: the GPU's memory is free when it is gone,
whatever it died of; and a run goes on from its last checkpoint because its work folder stays.

    child's exit            run
    0                       succeeded, the bundle registered in the same transaction
    75, or worker shutdown  interrupted, does not count as an attempt
    64, 76-79, 1            failed, with the code of what happened
    a signal, or no news    interrupted, counts; failed after `max_attempts`
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from celery import shared_task
from sqlalchemy.exc import OperationalError

from models import bundle
from service import datasets, runs, volumes
from service.db import RunKind, RunState
from service.lease import Keeper
from service.runs import Lease, NewVersion
from service.worker import Worker, this_worker, work_through
from trainer import errors

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0
POLL_S = 0.2
MAX_PENDING = 10_000
UNEXPECTED = "failed"
"""The child's code for an exception nobody foresaw; its text may hold values, so it is not told."""
MAX_MESSAGE = 2000
CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")

CODES: dict[int, tuple[str, str, runs.Outcome]] = {
    errors.BAD_INPUT: ("invalid_data", "the recipe or the data cannot be trained on", "error"),
    errors.GPU_OUT_OF_MEMORY: (
        "gpu_out_of_memory",
        "the GPU's memory is too small; take a smaller batch, patch or base width",
        "oom",
    ),
    errors.HOST_OUT_OF_MEMORY: ("host_out_of_memory", "the machine ran out of memory", "oom"),
    errors.NON_FINITE_LOSS: ("non_finite_loss", "the loss became NaN or infinite", "error"),
    errors.PARITY_FAILED: ("parity_failed", "ONNX and torch disagree; nothing registered", "error"),
    errors.FAILED: ("training_error", "the training failed; its work folder has stderr", "error"),
}
"""What the child's exit status means, unless its own `error` event says it better."""


@shared_task(name="trainer.train", ignore_result=True)  # type: ignore[untyped-decorator]  # Celery
def train(run_id: str) -> None:
    """Work until the training queue is empty; the id is a doorbell and no more."""
    logger.debug("woken for %s", run_id)
    work_through(this_worker("train"), run)


def run(worker: Worker, lease: Lease, keeper: Keeper) -> None:
    """Supervise one claimed training to its end."""
    folder = worker.store.work_dir(lease.run_id)
    command = prepare(worker, lease, folder)
    with worker.sessions() as session:
        runs.started(session, lease)
    oom_kills = _oom_kills()
    with _child(command, folder) as child:
        news = _supervise(worker, lease, keeper, child)
    status = child.returncode
    logger.info("training of %s ended with status %s", lease.run_id, status)
    if keeper.fenced:
        raise runs.Fenced(lease.run_id)
    if status == 0:
        _succeed(worker, lease, folder / "out" / "bundle", news)
    elif keeper.cancel_requested:
        with worker.sessions() as session:
            runs.finish(session, lease, RunState.CANCELED, outcome="canceled", exit_code=status)
    elif keeper.is_preempted or status == errors.PREEMPTED:
        with worker.sessions() as session:
            runs.give_back(session, lease, "preempted", exit_code=status)
    else:
        _end_badly(worker, lease, news, status, is_oom=_oom_kills() > oom_kills)


def prepare(worker: Worker, lease: Lease, folder: Path) -> list[str]:
    """Write the recipe and the list of scans into the work folder.

    Returns:
        The child's command line.

    Raises:
        BlobCorrupt: A stored scan is not what was stored.
    """
    recipe, scans = folder / "recipe.json", folder / "scans.json"
    recipe.write_text(json.dumps(lease.spec["recipe"]), encoding="utf-8")
    scans.write_text(json.dumps(_scans(worker, str(lease.dataset_id))), encoding="utf-8")
    command = [sys.executable, "-m", "trainer", lease.kind.value, str(recipe)]
    command += ["--scans", str(scans), "--out", str(folder / "out"), "--events", "jsonl"]
    command += ["--device", worker.settings.device, "--run-id", lease.run_id]
    command += ["--threads", str(worker.settings.train_threads)]
    if lease.kind is RunKind.PRETRAIN:
        command += ["--processes", str(worker.settings.train_processes)]
    parent = lease.spec.get("parent")
    if parent is not None and lease.kind is RunKind.FINETUNE:
        command += ["--parent", str(worker.store.bundle_dir(parent))]
    return command


def _scans(worker: Worker, dataset_id: str) -> dict[str, Any]:
    with worker.sessions() as session:
        dataset = datasets.get(session, dataset_id)
        items = datasets.items_of(session, dataset_id)
        found = []
        for item in items:
            image = volumes.get(session, item.volume_id).voxels_sha256
            labels = volumes.get(session, item.labels_id).voxels_sha256 if item.labels_id else None
            found.append((item, image, labels))
        session.commit()  # hashing takes a while: no transaction meanwhile
    return {
        "digest": dataset.digest,
        "scans": [
            {
                "id": item.volume_id,
                "image": str(worker.store.verify(image)),
                "labels": str(worker.store.verify(labels)) if labels is not None else None,
                "subject": item.subject,
                "split": item.split,
            }
            for item, image, labels in found
        ],
    }


@contextlib.contextmanager
def _child(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The training process in a group of its own; killed if we leave before it ended.

    It sees none of our settings (they hold the database's password), and asks the kernel itself
    to die with us (PR_SET_PDEATHSIG).
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("PCRL_")}
    with (folder / "stderr.log").open("ab") as stderr:
        child = subprocess.Popen(  # noqa: S603  # our own command
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            process_group=0,
        )
    try:
        yield child
    finally:
        _signal(child, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


class _News:
    """What the child says, on its way into the database: in order, progress throttled."""

    def __init__(self, worker: Worker, lease: Lease) -> None:
        self.result: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.metrics: dict[str, float] = {}
        self._worker = worker
        self._lease = lease
        self._pending: deque[tuple[Any, dict[str, Any]]] = deque(maxlen=MAX_PENDING)
        self._progress: dict[str, Any] | None = None
        self._progress_at = 0.0

    def take(self, line: bytes) -> None:
        """Read one line; what is not an event of ours (a library's print) is dropped."""
        try:
            event = json.loads(line)
            kind = event.pop("event")
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if kind == "progress":
            self._progress = _finite(event)
        elif kind == "metric":
            event["values"] = _finite(event.get("values", {}))
            self.metrics.update(event["values"])
            self._pending.append(("metric", event))
        elif kind == "log":
            event["message"] = str(event.get("message", ""))[:MAX_MESSAGE]
            self._pending.append(("log", event))
        elif kind == "result":
            self.result = event
        elif kind == "error" and (self.error is None or self.error.get("code") == UNEXPECTED):
            self.error = event  # of several ranks the one that others failed of comes first

    def flush(self, *, everything: bool = False) -> None:
        """Write what is due; a database that is away keeps it for the next time.

        Raises:
            Fenced: The run is no longer ours.
        """
        now = time.monotonic()
        is_due = everything or now - self._progress_at >= PROGRESS_EVERY_S
        try:
            while self._pending:
                self._record(*self._pending[0])
                self._pending.popleft()
            if self._progress is not None and is_due:
                self._record("progress", self._progress)
                self._progress, self._progress_at = None, now
        except OperationalError as error:
            logger.warning("events of %s wait: %s", self._lease.run_id, type(error).__name__)

    def _record(self, kind: Any, data: dict[str, Any]) -> None:
        with self._worker.sessions() as session:
            runs.record(session, self._lease, kind, data)


def _supervise(
    worker: Worker, lease: Lease, keeper: Keeper, child: subprocess.Popen[bytes]
) -> _News:
    """Pass events on until the child has ended; pass on what it should know by signals."""
    assert child.stdout is not None
    news = _News(worker, lease)
    lines: queue.Queue[bytes | None] = queue.Queue(maxsize=1000)
    threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
    kill_at = math.inf
    heard_at = time.monotonic()
    is_open = True
    while is_open or child.poll() is None:
        line: bytes | None = b""
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=POLL_S)
        if line is None:
            is_open = False
        elif line:
            heard_at = time.monotonic()
            news.take(line)
        news.flush()
        now = time.monotonic()
        if keeper.fenced or now > kill_at:
            _signal(child, signal.SIGKILL)
        elif keeper.should_stop() and kill_at == math.inf:
            kill_at = now + worker.settings.stop_grace_s
            _signal(child, signal.SIGTERM)
        elif now - heard_at > worker.settings.stall_s:
            news.error = {"code": "stalled", "detail": "the training reported nothing any more"}
            _signal(child, signal.SIGKILL)
        if child.poll() is not None:
            _signal(child, signal.SIGKILL)  # what it left behind would hold the pipe open
        elif not is_open:
            time.sleep(POLL_S)
    news.flush(everything=True)
    return news


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    with contextlib.suppress(ValueError):  # closed under us: the child was killed
        for line in stream:
            lines.put(line)
    lines.put(None)


def _succeed(worker: Worker, lease: Lease, folder: Path, news: _News) -> None:
    digest = worker.store.publish_bundle(folder)
    manifest = bundle.load(worker.store.bundle_dir(digest))
    new = NewVersion(
        name=str(lease.spec["model_name"]),
        kind=manifest.kind,
        digest=digest,
        manifest=manifest.model_dump(mode="json"),
    )
    result = {
        "bundle_digest": digest,
        "metrics": {name: metric.model_dump() for name, metric in manifest.metrics.items()},
        "last_values": news.metrics,
    }
    with worker.sessions() as session:
        runs.finish(
            session,
            lease,
            RunState.SUCCEEDED,
            result=result,
            outcome="done",
            exit_code=0,
            register=new,
        )


def _end_badly(worker: Worker, lease: Lease, news: _News, status: int, *, is_oom: bool) -> None:
    """The child failed or was killed: end the run, or give it back for another attempt."""
    code, detail, outcome = cause_of(status, news.error, is_oom=is_oom)
    error = {"code": code, "detail": detail}
    with worker.sessions() as session:
        if outcome in ("crash", "stalled"):
            runs.give_back(
                session,
                lease,
                outcome,
                exit_code=status,
                error=error,
                max_attempts=worker.settings.max_attempts,
            )
        else:
            runs.finish(
                session, lease, RunState.FAILED, error=error, outcome=outcome, exit_code=status
            )


def cause_of(
    status: int, said: dict[str, Any] | None, *, is_oom: bool
) -> tuple[str, str, runs.Outcome]:
    """Why a training ended.

    Args:
        status: Exit status; negative is the signal that killed it.
        said: The child's own `error` event.
        is_oom: Whether the kernel killed something in this control group meanwhile.

    Returns:
        Error code, detail, and the attempt's outcome.
    """
    if status < 0:
        if said is not None and said.get("code") == "stalled":
            return "stalled", str(said["detail"]), "stalled"
        if status == -signal.SIGKILL and is_oom:
            return "host_out_of_memory", "the kernel ended it: no memory was left", "oom"
        return "native_crash", f"the training was ended by signal {-status}", "crash"
    code, detail, outcome = CODES.get(status, CODES[errors.FAILED])
    if said is not None and said.get("code") != UNEXPECTED:
        code, detail = str(said.get("code", code)), str(said.get("detail", detail))[:MAX_MESSAGE]
    return code, detail, outcome


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the child's whole group; one that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _oom_kills() -> int:
    """How often the kernel has killed a process of this control group for memory."""
    with contextlib.suppress(OSError, ValueError):
        for line in CGROUP_EVENTS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Without NaN and infinity, which JSON does not know."""
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, float) or math.isfinite(value)
    }
