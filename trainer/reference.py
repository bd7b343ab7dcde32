"""The training scans as a served model sees them: what later scans are held against.

The exported network runs over each scan, from its file, by the code that serves: the same
preprocessing, windows and weights. What cannot be served as one image has no reference.

E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from imaging.errors import ScanError
from imaging.intake import read_scan
from imaging.volume import Volume
from models import bundle, cascade, predict, reference
from models.bundle import BundleError, Manifest
from models.predict import Progress, Stopped
from models.session import OnnxSession, open_session
from trainer.data.scan_set import ScanFile, voxels_beside
from trainer.errors import Preempted
from trainer.report import Report

Float32Array = NDArray[np.float32]
MAX_SCANS = 200
"""Of the reference; of more, as many are taken at even distances."""


def of_scans(
    bundle_dir: Path,
    scans: Sequence[ScanFile],
    path: Path,
    report: Report,
    *,
    device: torch.device,
    num_steps: int,
    should_stop: Callable[[], bool] | None = None,
) -> bundle.Reference | None:
    """Embed the training scans, write them, and find the threshold.

    A model without it is a good model, so what fails here is logged and does not end the run.

    Args:
        bundle_dir: The model, as a bundle.
        scans: Of the training split.
        path: Where the embeddings go (`models.reference`).
        report: Told of progress.
        device: CUDA is used where this onnxruntime has it.
        num_steps: Of the training, for `Preempted`.
        should_stop: Asked before every batch.

    Returns:
        For the manifest; None where the model is not served on scans of one image.

    Raises:
        Preempted: `should_stop` turned true.
    """
    manifest = bundle.load(bundle_dir)
    if not is_served(manifest):
        return None
    chosen = evenly(scans, MAX_SCANS)
    vectors = []
    try:
        session = open_session(
            bundle_dir,
            device="cuda" if device.type == "cuda" else "cpu",
            num_threads=torch.get_num_threads(),
            cpu_fallback=True,
            precision="float32",
        )
        for done, scan in enumerate(chosen):
            report.progress("reference", done, len(chosen))
            vector = vector_of(
                session,
                read_scan(scan.image, kind="image", beside=voxels_beside(scan.image)).volume,
                # Windows done are said as scans done: silence would look like a stall.
                progress=lambda *_, done=done: report.progress("reference", done, len(chosen)),
                should_stop=should_stop,
            )
            if vector is not None:
                vectors.append(vector)
        report.progress("reference", len(chosen), len(chosen))
        is_encoder = manifest.kind == "encoder"
        found = reference.write(path, vectors, "embedding" if is_encoder else "features")
    except Stopped:
        raise Preempted(num_steps) from None
    except (BundleError, ScanError, OSError, ValueError) as error:
        report.log("warning", f"no reference to tell unusual scans by: {error}")
        return None
    limit = "too few for a threshold" if found.threshold is None else f"{found.threshold:.3g}"
    report.log("info", f"reference of {found.num_scans} training scans, threshold {limit}")
    return found


def is_served(manifest: Manifest) -> bool:
    """Whether the model gives a vector for a scan of one image."""
    if len(manifest.patch_size) != 3 or len(manifest.channels) != 1:
        return False
    if manifest.kind == "encoder":
        return True
    return manifest.activation == "softmax" and bundle.features_of(manifest) is not None


def vector_of(
    session: OnnxSession,
    volume: Volume,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Float32Array | None:
    """What serving compares of a scan, (E,) of unit length; None where nothing is seen of it."""
    if session.manifest.kind == "encoder":
        return predict.embed(session, volume, progress=progress, should_stop=should_stop).vector
    case = cascade.segment_case(session, volume, progress=progress, should_stop=should_stop)
    return case.features


def evenly(scans: Sequence[ScanFile], at_most: int) -> list[ScanFile]:
    """All of them, or so many at even distances."""
    if len(scans) <= at_most:
        return list(scans)
    return [scans[n * len(scans) // at_most] for n in range(at_most)]
