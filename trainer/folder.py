"""The output folder of a run: what a rerun finds in it, and what each checkpoint says of the run.

bundle/        the result; its presence says that the run is done
cases.json     of a fine-tuning with test scans: what it scored on each of them
checkpoints/   what a rerun resumes from
cache/         preprocessed volumes
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import bundle
from models.experiment.cases import FILE, CaseResults
from models.recipe import AnyRecipe
from trainer import checkpoint
from trainer.checkpoint import State
from trainer.data.scan_set import ScanSet
from trainer.errors import DataError
from trainer.report import Report

BUNDLE = "bundle"
CHECKPOINTS = "checkpoints"
CACHE = "cache"

ShouldStop = Callable[[], bool]

Metrics = dict[str, dict[str, Any]]
"""Measured values by name, each as the fields of a `models.bundle.Metric`."""


def finished(out: Path, recipe: AnyRecipe, report: Report) -> Path | None:
    """The bundle that an earlier run of the same recipe left; None if there is none yet.

    Raises:
        DataError: `resume_mismatch`, if the bundle is of another recipe.
        BundleError: The bundle is damaged.
    """
    folder = out / BUNDLE
    if not folder.exists():
        return None
    manifest = bundle.load(folder)
    if manifest.recipe != recipe:
        raise DataError(
            "resume_mismatch", "the output folder holds a bundle of another recipe; use another"
        )
    report.result(BUNDLE, bundle.digest_of(folder))
    return folder


def write_cases(out: Path, results: CaseResults) -> None:
    """Publish the test split's results by rename; they are there before the bundle is."""
    draft = out / f".{FILE}"
    with draft.open("w", encoding="utf-8") as file:
        file.write(results.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    draft.rename(out / FILE)


def header(
    recipe: AnyRecipe,
    scans: ScanSet,
    sample: Tensor,
    device: torch.device,
    run_id: str | None,
) -> State:
    """What every checkpoint of a run says of it; an export needs nothing else.

    Args:
        recipe: What the run was asked for.
        scans: What it trains on.
        sample: Real network input for the parity check, float16 (1, C, I, J, K).
        device: Where it runs.
        run_id: The service's name for it.
    """
    return {
        "recipe": recipe.model_dump_json(),
        "recipe_digest": recipe.digest(),
        "data_digest": scans.digest,
        "sample": sample,
        "fingerprint": checkpoint.fingerprint(device),
        "run_id": run_id or "",
    }


def resume(out: Path, head: State, report: Report) -> State | None:
    """The newest whole checkpoint of this run; None to start from the beginning.

    Raises:
        DataError: `resume_mismatch`.
    """
    folder = out / CHECKPOINTS
    checkpoint.clear_drafts(folder)
    state = checkpoint.load_newest(folder, warn=lambda message: report.log("warning", message))
    if state is None:
        return None
    checkpoint.check_same_run(
        state, recipe_digest=head["recipe_digest"], data_digest=head["data_digest"]
    )
    report.log("info", f"resuming after step {state['step']}")
    if state["fingerprint"] != head["fingerprint"]:
        report.log(
            "warning",
            f"resuming on {head['fingerprint']} what began on {state['fingerprint']}: "
            "the result will not be bit for bit that of an uninterrupted run",
        )
    return state


def centre_sample(
    image: NDArray[np.float16], background: float, size: tuple[int, int, int]
) -> Tensor:
    """The middle of a volume, padded where it is smaller, float16 (1, 1, I, J, K)."""
    cut = []
    for have, want in zip(image.shape, size, strict=True):
        first = max(0, (have - want) // 2)
        cut.append(slice(first, first + want))
    middle = np.array(image[tuple(cut)])
    pads = [(0, want - have) for have, want in zip(middle.shape, size, strict=True)]
    padded = np.pad(middle, pads, constant_values=np.float16(background))
    return torch.from_numpy(padded)[None, None]
