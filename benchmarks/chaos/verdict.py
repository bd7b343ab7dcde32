"""What is lost, doubled or stuck: counted in the tables, and in the files that they name."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from benchmarks.chaos.load import TRAINING, Accepted, mask_of
from models import bundle
from models.bundle import BundleError
from service import db, runs
from service.db import Artifact, ModelVersion, Run, RunAttempt, RunEvent, RunState, Volume
from service.errors import ServiceError
from service.storage import BlobCorrupt, Store


@dataclass
class Verdict:
    """Findings of each kind, as sentences; none of them is good."""

    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)


def judge(session: Session, store: Store, accepted: Accepted) -> Verdict:
    """Hold what was accepted against what is there."""
    verdict = Verdict()
    rows = {run.id: run for run in session.scalars(select(Run))}
    for number, run_id in accepted.segmentations.items():
        if (why := _lost_mask(session, store, rows.get(run_id), number)) is not None:
            verdict.lost.append(f"{run_id}: {why}")
    for run_id in accepted.trainings.values():
        if (why := _lost_training(session, store, rows.get(run_id))) is not None:
            verdict.lost.append(f"{run_id}: {why}")
    _doubled(session, rows, accepted, verdict)
    _stuck(session, rows, verdict)
    session.rollback()
    return verdict


def _lost_mask(session: Session, store: Store, run: Run | None, number: int) -> str | None:
    if run is None:
        return "its row is gone"
    if run.state != RunState.SUCCEEDED:
        return f"{run.state} {(run.error or {}).get('code', '')}"
    try:
        path = store.verify(runs.artifact(session, run.id, "mask.nii.gz").sha256)
    except (ServiceError, BlobCorrupt) as error:
        return f"no mask: {type(error).__name__}"
    image = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    expected = mask_of(number)
    if not np.array_equal(np.asarray(image.dataobj), expected):
        return "another mask"
    counted = (run.result or {}).get("voxels", {}).get("box")
    return None if counted == int(expected.sum()) else f"counted {counted} voxels"


def _lost_training(session: Session, store: Store, run: Run | None) -> str | None:
    if run is None:
        return "its row is gone"
    if run.state != RunState.SUCCEEDED:
        return f"{run.state} {(run.error or {}).get('code', '')}"
    version = session.scalars(select(ModelVersion).where(ModelVersion.run_id == run.id)).first()
    if version is None:
        return "no model version"
    try:
        bundle.load(store.bundle_dir(version.digest))
    except BundleError as error:
        return f"its bundle is {error.code}"
    steps = {point.step for point in runs.metrics(session, run.id, names=["learning_rate"])}
    missing = sorted(set(range(1, TRAINING["num_steps"] + 1)) - steps)
    return f"metrics of steps {missing} are missing" if missing else None


def _doubled(session: Session, rows: dict[str, Run], accepted: Accepted, verdict: Verdict) -> None:
    known = {*accepted.segmentations.values(), *accepted.trainings.values()}
    verdict.duplicated += [f"{run_id}: nobody was told of it" for run_id in rows.keys() - known]
    subjects = Counter(session.scalars(select(Volume.subject)))
    verdict.duplicated += [f"volume of {name}: {n}" for name, n in subjects.items() if n > 1]
    won: dict[str, list[int]] = {}
    for attempt in session.scalars(select(RunAttempt).where(RunAttempt.outcome == "done")):
        won.setdefault(attempt.run_id, []).append(attempt.fence)
    for run_id, run in rows.items():
        if run.state == RunState.SUCCEEDED and won.get(run_id) != [run.fence]:
            verdict.duplicated.append(f"{run_id}: fence {run.fence}, won by {won.get(run_id)}")
    for artifact in session.scalars(select(Artifact)):
        if artifact.fence != rows[artifact.run_id].fence:
            verdict.duplicated.append(f"{artifact.run_id}: a file of fence {artifact.fence}")
    ends: Counter[str] = Counter(
        event.run_id
        for event in session.scalars(select(RunEvent).where(RunEvent.type == "state"))
        if event.data["state"] in db.TERMINAL
    )
    verdict.duplicated += [f"{run_id}: ended {n} times" for run_id, n in ends.items() if n > 1]
    versions = Counter(session.scalars(select(ModelVersion.run_id)))
    verdict.duplicated += [f"{name}: {n} versions" for name, n in versions.items() if n > 1]


def _stuck(session: Session, rows: dict[str, Run], verdict: Verdict) -> None:
    for run_id, run in rows.items():
        if run.state not in db.TERMINAL:
            verdict.stuck.append(f"{run_id}: {run.state} at attempt {run.attempt}")
        elif run.lease_owner is not None or run.publish_after is not None:
            verdict.stuck.append(f"{run_id}: {run.state} and still leased or rung for")
    open_ends = session.scalars(select(RunAttempt).where(RunAttempt.ended_at.is_(None)))
    verdict.stuck += [
        f"{one.run_id}: attempt {one.fence} never ended"
        for one in open_ends
        if rows[one.run_id].state in db.TERMINAL
    ]
