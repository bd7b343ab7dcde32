"""A check run: each golden case through the model, as inference does it, against what is expected.

I J K voxels, E embedding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging import nifti
from imaging.image2d import read_image
from models import predict
from models.predict2d import embed_image
from service import runs, segmenting, volumes
from service.db import RunState
from service.lease import Keeper
from service.resident import Held
from service.runs import Lease
from service.worker import Worker


def run(worker: Worker, lease: Lease, keeper: Keeper, held: Held) -> None:
    """Check a version on every case and record which it reproduces; a miss is no failed run."""
    found = []
    cases: list[dict[str, Any]] = lease.spec["cases"]
    for number, case in enumerate(cases):
        found.append(_examine(worker, keeper, held, case))
        progress = {
            "stage": "check",
            "step": number + 1,
            "total": len(cases),
            "fraction": (number + 1) / len(cases),
        }
        with worker.sessions() as session:
            runs.record(session, lease, "progress", progress)
    result = {
        "model": lease.spec["model"],
        "golden_digest": lease.spec["golden_digest"],
        "passed": all(one["passed"] for one in found),
        "cases": found,
        "provider": held.session.provider,
    }
    with worker.sessions() as session:
        runs.finish(session, lease, RunState.SUCCEEDED, result=result, outcome="done")


def dice(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    """2 |A and B| / (|A| + |B|) of two masks (I, J, K); 1 where both are empty."""
    total = int(np.count_nonzero(found)) + int(np.count_nonzero(expected))
    return 2.0 * int(np.count_nonzero(found & expected)) / total if total else 1.0


def cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Of two vectors (E,); 0 where one is all zero or they have different lengths."""
    if found.shape != expected.shape:
        return 0.0
    one, other = found.astype(np.float64), expected.astype(np.float64)
    scale = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / scale if scale else 0.0


def _compared(case: dict[str, Any], vector: NDArray[Any]) -> dict[str, Any]:
    """An embedding (E,) against the one that a golden case expects."""
    expected = case["expected"]
    found = cosine(vector, np.asarray(expected["vector"]))
    return {"name": case["name"], "cosine": found, "passed": found >= expected["min_cosine"]}


def _examine(worker: Worker, keeper: Keeper, held: Held, case: dict[str, Any]) -> dict[str, Any]:
    with worker.sessions() as session:
        image = volumes.get(session, case["volume_id"])
        labels = volumes.get(session, case["labels_id"]) if case["labels_id"] else None
    path, expected = worker.store.verify(image.voxels_sha256), case["expected"]
    if image.kind == "image_2d":
        vector = embed_image(held.session, read_image(path).pixels).vector
        return _compared(case, vector)
    scan = nifti.open_canonical(path)
    if labels is None:
        vector = predict.embed(held.session, scan, should_stop=keeper.should_stop).vector
        return _compared(case, vector)
    _, looked = segmenting.segment(
        worker.settings, worker.store, held, scan, should_stop=keeper.should_stop
    )
    mask = looked.segmentation.labels
    known = nifti.open_canonical(worker.store.verify(labels.voxels_sha256)).voxels
    names = held.session.manifest.labels
    scores = {}
    for label in expected["labels"]:
        if label["name"] in names:
            value = names.index(label["name"]) + 1
            scores[label["name"]] = dice(mask == value, known == label["value"])
        else:
            scores[label["name"]] = 0.0
    passed = all(scores[label["name"]] >= label["min_dice"] for label in expected["labels"])
    return {"name": case["name"], "dice": scores, "passed": passed}
