"""The inference worker: masks and embeddings, with models that stay loaded.

A message wakes it; it then works on the best waiting run of its queue until none waits. Every mask
is proven before anyone gets it: written, read back by another reader, compared with the source grid
(`service.results`); a mask that cannot be proven fails the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from celery import shared_task
from celery.signals import worker_process_init

from imaging import nifti, preview
from imaging.geometry import GeometryError
from imaging.image2d import read_image
from imaging.orientation import on_source_grid
from imaging.volume import Grid
from models import memory, predict, preflight
from models.cascade import Case
from models.predict2d import embed_image
from models.preflight import Preflight
from models.regions import RegionEmbedding, embed_regions
from models.session import OnnxSession
from service import (
    checking,
    entropy_map,
    faults,
    importing,
    regions,
    resident,
    results,
    runs,
    segmenting,
    volumes,
    warmer,
)
from service.db import RunKind, RunState
from service.db import Volume as VolumeRow
from service.embeddings import WHOLE, NewEmbedding
from service.entropy_map import StoredMap
from service.lease import Keeper
from service.patience import AWAY
from service.pulse import heartbeat_name
from service.resident import Held
from service.results import INTENDED_USE
from service.runs import Lease, NewArtifact
from service.worker import Worker, this_worker, work_through

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 1.0


@shared_task(name="service.infer", ignore_result=True)  # type: ignore[untyped-decorator]  # Celery
def infer(run_id: str) -> None:
    """Work until the inference queue is empty; the id is a doorbell and no more."""
    faults.point("woken.after_ack")
    logger.debug("woken for %s", run_id)
    work_through(this_worker("inference"), run, together=RunKind.EMBED)


def run(worker: Worker, lease: Lease, keeper: Keeper) -> None:
    """Do one claimed segmentation or embedding, to its end."""
    with worker.sessions() as session:
        runs.started(session, lease)
    try:
        if lease.kind is RunKind.IMPORT:
            importing.run(worker, lease, keeper)
            return
        resident.using(
            worker.settings,
            worker.store,
            str(lease.spec["model"]["digest"]),
            lambda held: _do(worker, lease, keeper, held),
        )
    except predict.Stopped:
        _stopped(worker, lease, keeper)


def _do(worker: Worker, lease: Lease, keeper: Keeper, held: Held) -> None:
    if lease.kind is RunKind.CHECK:
        checking.run(worker, lease, keeper, held)
        return
    with worker.sessions() as session:
        reads = "image" if lease.kind is RunKind.SEGMENT else None
        volume = volumes.get(session, str(lease.volume_id), kind=reads)
    if lease.kind is RunKind.SEGMENT:
        _segment(worker, lease, keeper, volume, held)
    elif volume.kind == "image_2d":
        _embed_image(worker, lease, volume, held)
    else:
        _embed(worker, lease, keeper, volume, held)


def _segment(worker: Worker, lease: Lease, keeper: Keeper, row: VolumeRow, held: Held) -> None:
    began = time.monotonic() - held.opened_s
    model = held.session
    scan = nifti.open_canonical(worker.store.verify(row.voxels_sha256))
    flips = tuple(lease.spec.get("flips", ()))
    plan, case = segmenting.segment(
        worker.settings,
        worker.store,
        held,
        scan,
        flips=flips,
        wants_map=bool(lease.spec.get("uncertainty")),
        on_plan=lambda plan: _say(worker, lease, f"the segmentation {plan}"),
        progress=_progress(worker, lease),
        should_stop=keeper.should_stop,
    )
    found = case.segmentation
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
            entropies = None
            if case.entropy_map is not None:
                entropies = entropy_map.publish(
                    worker.store, Path(folder), case.entropy_map, source
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
            *([entropies.artifact] if entropies is not None else []),
        ]
    names = model.manifest.labels
    result = {
        **_provenance(lease, held),
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
        "flips": list(flips),
        **_looks(model, case, entropies),
        "preflight": _planned(plan),
        **published.result,
        "timings_s": {
            "model": held.opened_s,
            **found.timings_s,
            "write": write_s,
            "total": time.monotonic() - began,
        },
    }
    with worker.sessions() as session:
        runs.finish(
            session, lease, RunState.SUCCEEDED, result=result, outcome="done", artifacts=files
        )


def _embed(worker: Worker, lease: Lease, keeper: Keeper, row: VolumeRow, held: Held) -> None:
    began = time.monotonic() - held.opened_s
    model = held.session
    scan = nifti.open_canonical(worker.store.verify(row.voxels_sha256))
    asked = lease.spec.get("regions")
    left = memory.available_bytes(worker.settings.inference_memory_bytes)
    num_regions = len(asked["values"]) if asked is not None else 0
    plan = preflight.plan_embedding(model, scan, available_bytes=left, num_regions=num_regions)
    tell, should_stop = _progress(worker, lease), keeper.should_stop
    told: tuple[RegionEmbedding, ...] = ()
    if asked is None:
        found = predict.embed(model, scan, plan=plan, progress=tell, should_stop=should_stop)
    else:
        parts = regions.found(worker, keeper, asked, scan)
        found, told = embed_regions(
            model,
            scan,
            parts.labels,
            parts.values,
            plan=plan,
            progress=tell,
            should_stop=should_stop,
        )
    more = {"preflight": _planned(plan), **_regions(asked, told)}
    _keep(worker, lease, held, found, began=began, told=told, more=more)


def _embed_image(worker: Worker, lease: Lease, row: VolumeRow, held: Held) -> None:
    began = time.monotonic() - held.opened_s
    pixels = read_image(worker.store.verify(row.voxels_sha256)).pixels
    found = embed_image(held.session, pixels)
    _keep(worker, lease, held, found, began=began)


def _keep(
    worker: Worker,
    lease: Lease,
    held: Held,
    found: predict.Embedding,
    *,
    began: float,
    told: Sequence[RegionEmbedding] = (),
    more: Mapping[str, Any] | None = None,
) -> None:
    """Record an embedding, and its vectors for the search."""
    result = {
        **_provenance(lease, held),
        "vector": [float(value) for value in found.vector],
        "dimension": len(found.vector),
        "num_windows": found.num_windows,
        "ood": asdict(found.ood),
        **(more or {}),
        "timings_s": {
            "model": held.opened_s,
            **found.timings_s,
            "total": time.monotonic() - began,
        },
    }
    pointer = lease.spec["model"]
    vectors: list[tuple[str, npt.NDArray[np.float32] | None]] = [(WHOLE, found.vector)]
    vectors += [(one.region, one.vector) for one in told]
    stored = [
        NewEmbedding(
            model_name=str(pointer["name"]),
            model_version=int(pointer["version"]),
            bundle_digest=held.session.digest,
            vector=vector,
            region=region,
        )
        for region, vector in vectors
    ]
    with worker.sessions() as session:
        runs.finish(
            session, lease, RunState.SUCCEEDED, result=result, outcome="done", vectors=stored
        )


def _regions(asked: dict[str, Any] | None, told: Sequence[RegionEmbedding]) -> dict[str, Any]:
    """What a result says of regions; nothing where none were asked for."""
    if asked is None:
        return {}
    return {
        "regions": [
            {
                **asdict(one),
                "vector": None if one.vector is None else [float(value) for value in one.vector],
            }
            for one in told
        ],
        "segmentation_id": asked.get("segmentation_id"),
        "segmenter": asked.get("model"),
    }


def _planned(plan: Preflight) -> dict[str, Any]:
    """What it was expected to take, as the result has it."""
    return {
        "predicted_bytes": plan.predicted_bytes,
        "available_bytes": plan.available_bytes,
        "predicted_s": plan.predicted_s,
        "degraded": list(plan.degraded),
    }


def _looks(model: OnnxSession, case: Case, entropies: StoredMap | None) -> dict[str, Any]:
    """How the scan was looked at, how sure the model was, and whether it knows such scans."""
    quality = model.manifest.quality
    return {
        "cascade": asdict(case.cascade) if case.cascade is not None else None,
        "uncertainty": {
            **asdict(case.uncertainty),
            "map": entropies.line if entropies is not None else None,
        },
        "quality": {
            **asdict(case.quality),
            "max_foreground_entropy": quality.max_foreground_entropy if quality else None,
        },
        "ood": asdict(case.ood),
    }


def _provenance(lease: Lease, held: Held) -> dict[str, Any]:
    return {"model": lease.spec["model"], **held.facts(), "intended_use": INTENDED_USE}


def _source(row: VolumeRow) -> Grid:
    i, j, k = row.source_shape
    return Grid((i, j, k), np.array(row.source_affine, dtype=np.float64))


def _say(worker: Worker, lease: Lease, message: str) -> None:
    """A line in the run's events."""
    with worker.sessions() as session:
        runs.record(session, lease, "log", {"level": "info", "message": message})


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


def _on_process_init(**_: Any) -> None:
    """In the process that works, after it was forked: load the models that aliases point at."""
    worker = this_worker("inference")
    name = heartbeat_name("inference", os.getppid())
    warmer.Warmer(worker.sessions, worker.settings, worker.store, name).start()


worker_process_init.connect(_on_process_init, weak=False)
