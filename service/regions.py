"""The labels that an embedding's run asks for: of a segmentation that is there, or made for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging import nifti
from imaging.volume import Volume
from service import db, resident, retention, runs, segmenting
from service.errors import ServiceError
from service.lease import Keeper
from service.resident import Held
from service.worker import Worker

GRID_MM = 1e-3
_segmenting = threading.Lock()
"""Embeddings are done several at once; a segmentation is planned for the memory that is left."""


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """Labels on a scan's grid."""

    labels: NDArray[np.integer]
    """(I, J, K)."""
    values: dict[str, int]
    """Name of each region and its value."""


def found(worker: Worker, keeper: Keeper, asked: dict[str, Any], scan: Volume) -> Regions:
    """Read or make the labels that a run's spec asks for.

    Raises:
        ServiceError: 404 `not_found`, 410 `no_longer_kept`, 409 `not_ready` where the mask is not
            there any more or lies elsewhere.
        BundleError: What the segmenter raises.
        Stopped: The run is to end.
    """
    values = {str(name): int(value) for name, value in asked["values"].items()}
    if "model" not in asked:
        return Regions(_read(worker, str(asked["segmentation_id"]), scan), values)

    def segment(held: Held) -> NDArray[np.uint8]:
        _, case = segmenting.segment(
            worker.settings, worker.store, held, scan, should_stop=keeper.should_stop
        )
        return case.segmentation.labels

    with _segmenting:
        labels = resident.using(
            worker.settings, worker.store, str(asked["model"]["digest"]), segment
        )
    return Regions(labels, values)


def _read(worker: Worker, segmentation_id: str, scan: Volume) -> NDArray[np.integer]:
    """The mask of a segmentation, in the scan's own axes."""
    with worker.sessions() as session:
        run = runs.get(session, segmentation_id, kinds=[db.RunKind.SEGMENT])
        retention.require_files(run)
        masks = [
            one.sha256
            for one in runs.artifacts(session, segmentation_id)
            if one.name.partition(".")[0] == "mask"
        ]
    mask = None
    if masks:
        mask, _ = nifti.read(worker.store.verify(masks[0]))
    is_there = mask is not None and mask.shape == scan.shape
    if mask is None or not is_there or not np.allclose(mask.affine, scan.affine, atol=GRID_MM):
        raise ServiceError(409, "not_ready", "the segmentation has no mask on this scan's grid")
    labels: NDArray[np.integer] = np.asarray(mask.voxels).astype(np.uint8)
    return labels
