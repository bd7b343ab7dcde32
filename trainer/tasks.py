"""The training worker: a supervisor that starts `python -m trainer` and records what it says.

It never imports torch. The child is a process of its own: the GPU's memory is free when it is gone,
whatever it died of; and a run goes on from its last checkpoint because its work folder stays.

    child's exit            run
    0                       succeeded, the bundle registered in the same transaction
    75, or worker shutdown  interrupted, does not count as an attempt
    64, 76-79, 1            failed, with the code of what happened
    a signal, no step any more (`trainer.stall`), a full disk
                            interrupted, counts; failed after `max_attempts`
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import shared_task

from models import bundle
from models.experiment.cases import FILE as CASES
from service import celery_app, datasets, experiments, faults, runs, volumes
from service.db import RunKind, RunState
from service.lease import Keeper
from service.patience import AWAY
from service.runs import Lease, NewArtifact, NewVersion
from service.worker import Worker, this_worker, work_through
from trainer import errors, launch
from trainer import news as news_file
from trainer.news import MAX_MESSAGE, UNEXPECTED, Follower, News
from trainer.stall import StallWatch

logger = logging.getLogger(__name__)

PREVIEWS = "previews"
"""Where `trainer.health` draws; that module is torch's, and this one does without."""
MAX_PREVIEWS = 20

POLL_S = 0.2
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
    faults.point("train.woken")
    logger.debug("woken for %s", run_id)
    work_through(this_worker("train"), run)


def run(worker: Worker, lease: Lease, keeper: Keeper) -> None:
    """Supervise one claimed training to its end."""
    folder = worker.store.work_dir(lease.run_id)
    command = prepare(worker, lease, folder)
    with worker.sessions() as session:
        runs.started(session, lease)
    oom_kills = _oom_kills()
    with _child(command, folder, lease) as child:
        news = _supervise(worker, lease, keeper, child, folder)
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
    _plan(worker, lease)


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
                "examples": [{"classes": item.classes}] if item.classes else [],
                "subject": item.subject,
                "split": item.split,
            }
            for item, image, labels in found
        ],
    }


@contextlib.contextmanager
def _child(command: list[str], folder: Path, lease: Lease) -> Iterator[subprocess.Popen[bytes]]:
    """The training process in a group of its own; killed if we leave before it ended.

    It sees none of our settings (they hold the database's password), and asks the kernel itself
    to die with us (PR_SET_PDEATHSIG). What it says goes to a file of the attempt, so that it is not
    lost with us.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("PCRL_")}
    env[launch.SUPERVISOR] = str(os.getpid())
    says = news_file.path_of(folder, lease)
    with (folder / "stderr.log").open("ab") as stderr, says.open("ab") as stdout:
        child = subprocess.Popen(  # noqa: S603  # our own command
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            process_group=0,
        )
    try:
        yield child
    finally:
        _signal(child, signal.SIGKILL)
        child.wait()


def _supervise(
    worker: Worker,
    lease: Lease,
    keeper: Keeper,
    child: subprocess.Popen[bytes],
    folder: Path,
) -> News:
    """Pass events on until the child has ended; pass on what it should know by signals."""
    news = News(worker.sessions, lease)
    news.replay(folder)
    watch = StallWatch(worker.settings.stall_s, time.monotonic())
    kill_at = math.inf
    with news_file.path_of(folder, lease).open("rb") as file:
        follower = Follower(file)
        is_over = False
        while not is_over:
            is_over = child.poll() is not None  # before reading: then nothing comes after
            if is_over:
                _signal(child, signal.SIGKILL)  # what it left behind in its group
            for line in follower.lines():
                news.take(line)
            news.flush()
            now = time.monotonic()
            if news.step is not None:
                watch.heard(*news.step, now)
            if keeper.fenced or now > kill_at:
                _signal(child, signal.SIGKILL)
            elif keeper.should_stop() and kill_at == math.inf:
                kill_at = now + worker.settings.stop_grace_s
                _signal(child, signal.SIGTERM)
            elif watch.is_stalled(now) and not is_over:
                news.error = {"code": "stalled", "detail": "the training took no step any more"}
                _signal(child, signal.SIGKILL)
            if not is_over:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_S)
    if not keeper.fenced:
        news.settle(lease.lease_s)
    return news


def _succeed(worker: Worker, lease: Lease, folder: Path, news: News) -> None:
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
            artifacts=(*_cases(worker, folder.parent / CASES), *_previews(worker, folder.parent)),
            register=new,
        )


def _cases(worker: Worker, path: Path) -> tuple[NewArtifact, ...]:
    """What a fine-tuning scored on the test cases, where there are any."""
    if not path.exists():
        return ()
    return (NewArtifact(CASES, *worker.store.put_file(path), "application/json"),)


def _previews(worker: Worker, out: Path) -> tuple[NewArtifact, ...]:
    """The newest pictures that a pretraining drew of its reconstructions."""
    drawn = sorted((out / PREVIEWS).glob("step-*.png"), key=lambda one: int(one.stem[5:]))
    return tuple(
        NewArtifact(f"preview-{one.stem[5:]}.png", *worker.store.put_file(one), "image/png")
        for one in drawn[-MAX_PREVIEWS:]
    )


def _plan(worker: Worker, lease: Lease) -> None:
    """Queue what this run's end has made possible in its experiment; upkeep would, a little later.

    This worker goes on with it; the doorbells are for others.
    """
    try:
        with worker.sessions() as session:
            made = experiments.advance_after(session, lease.run_id)
    except AWAY as error:
        logger.warning("upkeep plans after %s: %s", lease.run_id, type(error).__name__)
        return
    for run in made[1:]:
        celery_app.ring(run.id, run.queue, settings=worker.settings)


def _end_badly(worker: Worker, lease: Lease, news: News, status: int, *, is_oom: bool) -> None:
    """The child failed or was killed: end the run, or give it back for another attempt."""
    code, detail, outcome = cause_of(status, news.error, is_oom=is_oom)
    error = {"code": code, "detail": detail}
    with worker.sessions() as session:
        if outcome in ("crash", "stalled") or code == "disk_full":  # may pass by itself
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
