"""An import run: the file is opened in a confined child, proven, and becomes a version."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from models import bundle
from models.incoming import open_in_child
from service import registry, runs
from service.db import RunState, within
from service.lease import Keeper
from service.runs import Lease, NewVersion
from service.worker import Worker


def run(worker: Worker, lease: Lease, keeper: Keeper) -> None:
    """Open a file that was sent, prove it, and register what it holds.

    Raises:
        BundleError: It is refused; the run fails with this code.
        ServiceError: The registry refuses (the name belongs to models of another kind).
    """
    name = str(lease.spec["model_name"])
    source = worker.store.verify(str(lease.spec["sha256"]))
    with tempfile.TemporaryDirectory(dir=worker.store.tmp) as scratch:
        folder = open_in_child(source, Path(scratch))
        manifest = bundle.load(folder)
        if keeper.cancel_requested:
            with worker.sessions() as session:
                runs.finish(session, lease, RunState.CANCELED, outcome="canceled")
            return
        plain = json.loads((folder / bundle.MANIFEST).read_bytes())
        with worker.sessions() as session, within(session, lease.project_id):
            registry.check_name(session, name, manifest.kind)
            session.rollback()
        digest = worker.store.publish_bundle(folder)
    with worker.sessions() as session:
        runs.finish(
            session,
            lease,
            RunState.SUCCEEDED,
            result={"kind": manifest.kind, "digest": digest},
            outcome="done",
            register=NewVersion(name, manifest.kind, digest, plain),
        )
