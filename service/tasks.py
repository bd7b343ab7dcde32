"""The inference worker: masks and embeddings, with models that stay loaded.

A message wakes it; it then works on the best waiting run of its queue until none waits. Every mask
is proven before anyone gets it: written, read back by another reader, compared with the source grid
(`service.results`); a mask that cannot be proven fails the run.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from celery import shared_task

from imaging import nifti, preview
from imaging.geometry import GeometryError
from imaging.volume import Grid, on_source_grid
from models import predict
from models.session import OnnxSession, SessionCache, open_session
from service import faults, results, runs, volumes
from service.db import RunKind, RunState
from service.db import Volume as VolumeRow
from service.embeddings import NewEmbedding
from service.lease import Keeper
from service.patience import AWAY
from service.results import INTENDED_USE
from service.runs import Lease, NewArtifact
from service.settings import Settings
from service.worker import Worker, this_worker, work_through

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0


@shared_task(name="service.infer", ignore_result=True)  # type: ignore[untyped-decorator]  # Celery
def infer(run_id: str) -> None:
    """Work until the inference queue is empty; the id is a doorbell and no more."""
    faults.point("woken.after_ack")
    logger.debug("woken for %s", run_id)
    work_through(this_worker("inference"), run)


def run(worker: Worker, lease: Lease, keeper: Keeper) -> None:
    """Do one claimed segmentation or embedding, to its end."""
    with worker.sessions() as session:
        runs.started(session, lease)
        volume = volumes.get(session, str(lease.volume_id), kind="image")
    try:
        if lease.kind is RunKind.SEGMENT:
            _segment(worker, lease, keeper, volume)
        else:
            _embed(worker, lease, keeper, volume)
    except predict.Stopped:
        _stopped(worker, lease, keeper)


def _segment(worker: Worker, lease: Lease, keeper: Keeper, row: VolumeRow) -> None:
    began = time.monotonic()
    model = _model(worker, lease)
    opened_s = time.monotonic() - began
    scan = nifti.open_canonical(worker.store.verify(row.voxels_sha256))
    found = predict.segment(
        model, scan, progress=_progress(worker, lease), should_stop=keeper.should_stop
    )
    source = _source(row)
    mask = np.ascontiguousarray(on_source_grid(found.labels, source))
    with tempfile.TemporaryDirectory(dir=worker.store.tmp) as folder:
        preview_path = Path(folder) / "preview.png"
        writing = time.monotonic()
        try:
            published = results.publish(
                worker.store,
                Path(folder),
                lease=lease,
                row=row,
                source=source,
                mask=mask,
                found=found,
            )
        except GeometryError as error:
            _fail(worker, lease, "geometry_not_certified", str(error))
            return
        write_s = time.monotonic() - writing
        window = preview.WINDOW_HU if row.modality == "CT" else None
        preview.overlay_png(scan, found.labels, preview_path, window=window)
        files = [
            *published.artifacts,
            NewArtifact("preview.png", *worker.store.put_file(preview_path), "image/png"),
        ]
    names = model.manifest.labels
    result = {
        **_provenance(lease, model),
        "labels": [
            {
                "name": name,
                "value": value,
                "voxels": found.voxels[name],
                "volume_ml": found.volumes_ml[name],
            }
            for value, name in enumerate(names, start=1)
        ],
        "voxels": found.voxels,
        "volumes_ml": found.volumes_ml,
        "lesions": {name: asdict(one) for name, one in found.lesions.items()},
        "removed_voxels": found.removed_voxels,
        "filled_voxels": found.filled_voxels,
        "num_windows": found.num_windows,
        **published.result,
        "timings_s": {
            "model": opened_s,
            **found.timings_s,
            "write": write_s,
            "total": time.monotonic() - began,
        },
    }
    with worker.sessions() as session:
        runs.finish(
            session, lease, RunState.SUCCEEDED, result=result, outcome="done", artifacts=files
        )


def _embed(worker: Worker, lease: Lease, keeper: Keeper, row: VolumeRow) -> None:
    began = time.monotonic()
    model = _model(worker, lease)
    opened_s = time.monotonic() - began
    scan = nifti.open_canonical(worker.store.verify(row.voxels_sha256))
    found = predict.embed(
        model, scan, progress=_progress(worker, lease), should_stop=keeper.should_stop
    )
    result = {
        **_provenance(lease, model),
        "vector": [float(value) for value in found.vector],
        "dimension": len(found.vector),
        "num_windows": found.num_windows,
        "timings_s": {
            "model": opened_s,
            **found.timings_s,
            "total": time.monotonic() - began,
        },
    }
    asked = lease.spec["model"]
    stored = NewEmbedding(
        model_name=str(asked["name"]),
        model_version=int(asked["version"]),
        bundle_digest=model.digest,
        vector=found.vector,
    )
    with worker.sessions() as session:
        runs.finish(
            session, lease, RunState.SUCCEEDED, result=result, outcome="done", embedding=stored
        )


def device_of(settings: Settings) -> str:
    """`cpu` or `cuda`: what was asked; `auto` is CUDA where both the GPU and its runtime are."""
    if settings.device != "auto":
        return settings.device
    try:
        metadata.version("onnxruntime-gpu")
    except metadata.PackageNotFoundError:
        return "cpu"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


@cache
def _sessions_of(max_bytes: int) -> SessionCache:
    return SessionCache(max_bytes)


def _model(worker: Worker, lease: Lease) -> OnnxSession:
    digest = str(lease.spec["model"]["digest"])
    settings = worker.settings
    return _sessions_of(settings.session_cache_bytes).get(
        digest,
        lambda: open_session(
            worker.store.bundle_dir(digest),
            device=device_of(settings),
            num_threads=settings.inference_threads,
            digest=digest,
        ),
    )


def _provenance(lease: Lease, model: OnnxSession) -> dict[str, Any]:
    return {
        "model": lease.spec["model"],
        "bundle_digest": model.digest,
        "provider": model.provider,
        "intended_use": INTENDED_USE,
    }


def _source(row: VolumeRow) -> Grid:
    i, j, k = row.source_shape
    return Grid((i, j, k), np.array(row.source_affine, dtype=np.float64))


def _progress(worker: Worker, lease: Lease) -> Callable[[int, int], None]:
    """Records windows done, at most once a second."""
    began = time.monotonic()
    told = began - PROGRESS_EVERY_S

    def tell(step: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < PROGRESS_EVERY_S and step < total:
            return
        told = now
        data = {
            "stage": "infer",
            "step": step,
            "total": total,
            "fraction": step / max(total, 1),
            "eta_s": (now - began) / step * (total - step) if step else None,
        }
        with contextlib.suppress(*AWAY), worker.sessions() as session:  # the next one tells more
            runs.record(session, lease, "progress", data)

    return tell


def _stopped(worker: Worker, lease: Lease, keeper: Keeper) -> None:
    """The work was asked to stop: canceled, or given back because the worker shuts down."""
    if keeper.fenced:
        raise runs.Fenced(lease.run_id)
    with worker.sessions() as session:
        if keeper.cancel_requested:
            runs.finish(session, lease, RunState.CANCELED, outcome="canceled")
        else:
            runs.give_back(session, lease, "preempted")


def _fail(worker: Worker, lease: Lease, code: str, detail: str) -> None:
    with worker.sessions() as session:
        runs.finish(
            session,
            lease,
            RunState.FAILED,
            error={"code": code, "detail": detail},
            outcome="error",
        )
