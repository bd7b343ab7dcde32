"""Plays API, worker and upkeep as forked processes, one of which fails at a named point (T-C7).

A process of its own without threads, so that it may fork: it reads one case a line from stdin
(JSON: `fault`, `folder`) and answers with one JSON line of what there is at the end.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
import traceback
from pathlib import Path

from service import auth, celery_app, db, faults, idempotency, runs, tasks, upkeep, volumes
from service.routers.answers import accepted
from service.routers.deps import Once
from service.runs import NewArtifact, NewVersion, reaping, requests
from service.settings import Settings, get_settings
from service.storage import BlobCorrupt, Store
from trainer import tasks as training

KEY, PRINCIPAL = "key", auth.Principal("t", "t", auth.Role.ADMIN, "prj_default")
FAST = {"lease_s": 0.6, "heartbeat_s": 0.05, "suspect_s": 0.05, "min_free_bytes": 0}
TIMEOUT_S = 60.0
PAUSE_S = 0.1  # a fork costs as much processor time: most of a case is to wait for a lease
requests.FIRST_REMINDER_S = reaping.FIRST_REMINDER_S = reaping.REMINDER_S = 0.1
idempotency.ABANDONED_S = 0.5


class Case:
    def __init__(self, folder: Path, fault: str) -> None:
        self.folder, self.fault, self.point = folder, fault, fault.partition(":")[0]
        self.settings = Settings(data_dir=folder / "data", **FAST)
        self.kind = "pretrain" if self.point.startswith(("bundle", "train")) else "segment"
        self.queue = db.QUEUE_OF[db.RunKind(self.kind)]

    def play(self) -> dict:
        deadline = time.monotonic() + TIMEOUT_S
        if self.point.startswith(("volume", "blob.before_link")):
            while self.forked(self.upload) != 0 and time.monotonic() < deadline:
                time.sleep(0.02)
        while self.forked(self.api) != 0 and time.monotonic() < deadline:
            time.sleep(PAUSE_S)
        while self.states() - {s.value for s in db.TERMINAL} and time.monotonic() < deadline:
            self.forked(self.worker)
            self.forked(self.upkeep)
            time.sleep(PAUSE_S)
        return self.found()

    def forked(self, role) -> int:
        """Run a role in a child with the fault armed; its wait status."""
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1]
        status = 1
        try:
            faults.arm(self.fault)
            role()
            status = 0
        except BaseException:  # noqa: BLE001  # whatever ends it, its place is told
            with (self.folder / "errors").open("a") as log:
                traceback.print_exc(file=log)
        os._exit(status)

    def sessions(self):
        return db.sessions(db.connect(self.settings.database_url))

    def upload(self) -> None:
        store = Store(self.settings.data_dir)
        with store.receive() as writer, self.sessions()() as session:
            writer.write((self.folder.parent / "scan.nii").read_bytes())
            sha256 = writer.close()
            volumes.ingest(
                session, store, sha256, writer.size, kind="image", subject="s", series_uid=None,
                principal="t", policy=None, path=writer.path,
            )  # fmt: skip
            session.commit()

    def api(self) -> None:
        def work(session):
            spec = {"model_name": "m"}
            run = runs.create(session, kind=self.kind, spec=spec, principal="t")
            return accepted(run, "runs", lambda row: Shown(row.id))

        answer, is_new = Once(self.sessions(), "POST /runs", KEY, "0" * 64).answer(PRINCIPAL, work)
        if is_new:
            celery_app.ring(answer.body["id"], self.queue, settings=self.settings)

    def worker(self) -> None:
        """Takes a doorbell from the folder broker (which acknowledges it), as Celery does."""
        messages = sorted((self.settings.data_dir / "broker").glob(f"*.{self.queue}.msg"))
        if not messages:
            return
        messages[0].unlink()
        os.environ["PCRL_DATA_DIR"] = str(self.settings.data_dir)
        os.environ |= {f"PCRL_{name.upper()}": str(value) for name, value in FAST.items()}
        tasks.run = training.run = self.work
        (tasks.infer if self.queue == "inference" else training.train).run("id")

    def work(self, worker, lease, keeper) -> None:
        with worker.sessions() as session:
            runs.started(session, lease)
            runs.record(session, lease, "progress", {"step": 1})
        if lease.fence == 1 and self.point.startswith("give_back"):
            with worker.sessions() as session:
                runs.give_back(session, lease, "preempted")
            return
        if lease.fence == 1 and self.point.startswith("reap"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.point.startswith("heartbeat"):
            time.sleep(0.2)
        path = self.folder / f"result-{lease.fence}"
        path.write_text("the mask")
        files, register = [], None
        if self.queue == "inference":
            files = [NewArtifact("mask.nii.gz", *worker.store.put_file(path), "text/plain")]
        else:
            digest = worker.store.publish_bundle(self.folder.parent / "bundle")
            register = NewVersion("m", "encoder", digest, {})
        with worker.sessions() as session:
            runs.finish(
                session, lease, db.RunState.SUCCEEDED, outcome="done", artifacts=files,
                register=register,
            )  # fmt: skip

    def upkeep(self) -> None:
        upkeep.dispatch(self.sessions(), self.settings)

    def rows(self, query: str) -> list:
        with contextlib.closing(sqlite3.connect(self.settings.data_dir / "pcrl.sqlite3")) as one:
            return one.execute(query).fetchall()

    def states(self) -> set[str]:
        return {state for (state,) in self.rows("SELECT state FROM run")} or {"none"}

    def found(self) -> dict:
        store = Store(self.settings.data_dir)
        corrupt = 0
        for (sha256,) in self.rows(
            "SELECT sha256 FROM artifact UNION SELECT sha256 FROM blob"
            " UNION SELECT original_sha256 FROM volume"
        ):
            try:
                store.verify(sha256)
            except BlobCorrupt:
                corrupt += 1
        bundles = [digest for (digest,) in self.rows("SELECT digest FROM model_version")]
        events = self.rows("SELECT data FROM run_event WHERE type = 'state'")
        ends = [json.loads(data)["state"] for (data,) in events]
        return {
            "struck": Path(self.fault.split(":", 2)[2]).exists(),
            "states": sorted(self.states()),
            "runs": len(self.rows("SELECT id FROM run")),
            "ends": sum(state in {"succeeded", "failed", "canceled"} for state in ends),
            "won": [
                fence
                for (fence,) in self.rows("SELECT fence FROM run_attempt WHERE outcome = 'done'")
            ],
            "fence": self.rows("SELECT fence FROM run"),
            "open_attempts": len(self.rows("SELECT 1 FROM run_attempt WHERE ended_at IS NULL")),
            "files": len(self.rows("SELECT 1 FROM artifact")) + len(bundles),
            "volumes": len(self.rows("SELECT 1 FROM volume")),
            "corrupt": corrupt + sum(not store.bundle_dir(one).exists() for one in bundles),
        }


class Shown:
    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def model_dump(self, **_: object) -> dict:
        return {"id": self.run_id}


def warm_up(folder: Path) -> None:
    """Play each kind here, unharmed: what is imported and mapped once need not be in every fork."""
    for kind in ("segment", "bundle"):
        own = folder / f"warm-{kind}"
        shutil.copytree(folder / "template", own / "data")
        case = Case(own, f"{kind}:none:{own / 'struck'}")
        for role in (case.api, case.upkeep, case.worker):
            role()
        assert case.states() == {"succeeded"}
        get_settings.cache_clear()
    gc.collect()  # closes the connections
    gc.freeze()  # and a fork shares what is left
    assert threading.active_count() == 1


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    warm_up(Path(sys.argv[1]))
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(Case(Path(case["folder"]), case["fault"]).play()), flush=True)
