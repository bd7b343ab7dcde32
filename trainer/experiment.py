"""An experiment from the shell: every training of a plan, then the report.

    OUT/cells/KEY/     each training's folder (`trainer.folder`), with `failed.json` if it failed
    OUT/cache/         preprocessed scans, of all trainings
    OUT/report.md, report.json, curve.svg, cases.csv

Nothing but these files is remembered, and each appears whole: killed at any point and called again,
the command goes on where it was. A folder is locked while its training runs, so the command may be
called several times at once (on several GPUs) to share the work.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models import bundle
from models.bundle import BundleError
from models.experiment import render
from models.experiment.cases import FILE, CaseResults
from models.experiment.curve import svg
from models.experiment.plan import AnyFinetune, Cell, Plan, cells, recipe_of
from models.experiment.report import Outcome, build
from models.recipe import ImageNet, PretrainRecipe, PretrainRecipe2d
from trainer import finetune, folder, imagenet, pretrain
from trainer.data.held_out import without_held_out
from trainer.data.scan_set import ScanSet
from trainer.data.scans import discover
from trainer.errors import DataError, DiskFullError, Preempted, TrainingError
from trainer.folder import ShouldStop
from trainer.report import Report

CELLS = "cells"
FAILED = "failed.json"
LOCK = "lock"
POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class _Setting:
    plan: Plan
    source: ScanSet
    target: ScanSet
    out: Path
    report: Report
    device: torch.device
    should_stop: ShouldStop
    weights: Mapping[str, Path]
    """The file of each method that takes its weights from one."""


def run(
    plan: Plan,
    source: Path,
    target: Path,
    out: Path,
    report: Report,
    *,
    device: torch.device,
    should_stop: ShouldStop,
    weights: Sequence[Path] = (),
    retry: bool = False,
) -> dict[str, Outcome]:
    """Do what is left of a plan and write the report, of what is done if it is stopped.

    Args:
        plan: What to do; it may have grown since the last call.
        source: Folder or list of scans to pretrain on. Whatever it shares with the target's
            validation and test is left out (`trainer.data.held_out`).
        target: Folder or list of labelled scans; split as the fine-tuning's recipe says.
        out: Where everything goes.
        report: Where progress goes.
        device: Where to compute.
        should_stop: Asked after every step; true ends the call with a checkpoint.
        weights: Files for methods `imagenet`; `sha256` of a recipe tells which of several is its.
        retry: Do trainings again that failed in an earlier call.

    Returns:
        What has become of each cell, by key; a training that failed leaves the others alone.

    Raises:
        DataError: Scans that no cell could use, a target without test scans, an output folder of
            another plan (`resume_mismatch`), or weights that are missing or do not fit a method
            (`bad_weights`). Nothing has begun then.
        Preempted: Stopped on request.
        DiskFullError: No room.
    """
    files = _weights(plan, weights, out)
    unlabelled, labelled = _scans(plan, source, target, report)
    setting = _Setting(plan, unlabelled, labelled, out, report, device, should_stop, files)
    if retry:
        for failure in (out / CELLS).rglob(FAILED):
            failure.unlink()
    try:
        _work_through(setting)
    finally:
        found = {cell.key: outcome(out, cell) for cell in cells(plan)}
        if any(one.results is not None for one in found.values()):
            write_report(plan, found, out, source=source.stem, target=target.stem)
    return found


def outcome(out: Path, cell: Cell) -> Outcome:
    """What has become of a cell, by its folder."""
    place = out / CELLS / cell.key
    if (place / FAILED).exists():
        why = json.loads((place / FAILED).read_bytes())
        return Outcome("failed", reason=f"{why['code']}: {why['detail']}")
    if not (place / folder.BUNDLE).exists():
        return Outcome("open")
    if cell.kind == "pretrain":
        return Outcome("succeeded")
    results = CaseResults.model_validate_json((place / FILE).read_bytes())
    return Outcome("succeeded", results)


def write_report(
    plan: Plan, found: dict[str, Outcome], out: Path, *, source: str, target: str
) -> None:
    """Write the report in its forms, each by rename."""
    told = build(plan, found, name=f"{source} → {target}", source=source, target=target)
    _publish(out / "report.json", told.model_dump_json(indent=2) + "\n")
    _publish(out / "report.md", render.markdown(told, curve="curve.svg"))
    _publish(out / "curve.svg", svg(told))
    _publish(out / "cases.csv", render.cases_csv(plan, found))


def _scans(plan: Plan, source: Path, target: Path, report: Report) -> tuple[ScanSet, ScanSet]:
    """What is pretrained on, and what is fine-tuned on."""
    recipe = plan.finetune
    dims = recipe.network.dims
    labelled = discover(target, channels=recipe.channels, shares=recipe.split, dims=dims)
    if not any(scan.labels is not None or scan.examples for scan in labelled.of("test")):
        raise DataError("no_test_scans", "no test scan of the target has labels to be judged by")
    if all(method.pretrain is None for method in plan.methods):
        return labelled, labelled
    unlabelled = discover(source, dims=dims)
    kept = without_held_out(unlabelled, labelled)
    if left_out := len(unlabelled.scans) - len(kept.scans.scans):
        report.log(
            "info",
            f"pretraining leaves out {left_out} of {len(unlabelled.scans)} scans, which the target "
            f"validates or tests on: {kept.num_by_subject} by patient, {kept.num_by_content} more "
            "by content",
        )
    return kept.scans, labelled


def _weights(plan: Plan, paths: Sequence[Path], out: Path) -> dict[str, Path]:
    """The file of each method `imagenet`, read once to see that it fits.

    A method whose encoder has been made needs none; one that is given must be the one it was of.
    """
    files = imagenet.by_digest(paths)
    chosen = {}
    for cell in cells(plan):
        recipe, made = recipe_of(plan, cell), out / CELLS / cell.key / folder.BUNDLE
        if not isinstance(recipe, PretrainRecipe2d) or not isinstance(recipe.method, ImageNet):
            continue
        if made.exists() and not files:
            continue
        try:
            digest = imagenet.choose(recipe.method, files)
            imagenet.load_encoder(recipe, files[digest])
        except DataError as error:
            if made.exists() and recipe.method.sha256 is not None:
                continue  # its own file may be gone: those at hand are of other methods
            raise DataError(error.code, f"method {cell.method}: {error.detail}") from error
        if made.exists() and bundle.load(made).lineage.parent_digest != digest:
            detail = f"method {cell.method}: its encoder was made of another file"
            raise DataError("resume_mismatch", detail)
        chosen[cell.method] = files[digest]
    return chosen


def _work_through(setting: _Setting) -> None:
    """Train every cell that can be trained, until none is open."""
    every = cells(setting.plan)
    by_key = {cell.key: cell for cell in every}
    while still_open := [one for one in every if outcome(setting.out, one).state == "open"]:
        setting.report.progress("experiment", len(every) - len(still_open), len(every))
        took_one = False
        for cell in still_open:
            if setting.should_stop():
                raise Preempted(0)
            parent = None if cell.parent is None else by_key[cell.parent]
            state = "succeeded" if parent is None else outcome(setting.out, parent).state
            if state == "open":
                continue
            with _held(setting.out / CELLS / cell.key) as is_ours:
                if is_ours and outcome(setting.out, cell).state == "open":
                    took_one = True
                    _settle(setting, cell, parent, has_failed=state == "failed")
        if not took_one:  # others hold what is left
            time.sleep(POLL_S)
    setting.report.progress("experiment", len(every), len(every))


def _settle(setting: _Setting, cell: Cell, parent: Cell | None, *, has_failed: bool) -> None:
    """Train a cell to its end, or write down why it has none."""
    place = setting.out / CELLS / cell.key
    if has_failed:
        assert parent is not None
        why = outcome(setting.out, parent).reason
        _fail(place, "pretraining_failed", why)
        return
    setting.report.log("info", f"training {cell.key}")
    try:
        _train(setting, cell, place)
    except (Preempted, DiskFullError):
        raise
    except (TrainingError, BundleError) as error:
        if error.code == "resume_mismatch":
            raise
        setting.report.log("error", f"{cell.key}: {error.code}: {error.detail}")
        _fail(place, error.code, error.detail)
    except (torch.OutOfMemoryError, MemoryError):
        setting.report.log("error", f"{cell.key}: out of memory")
        _fail(place, "out_of_memory", "the training took more memory than there is")
    finally:
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def _train(setting: _Setting, cell: Cell, place: Path) -> None:
    recipe: Any = recipe_of(setting.plan, cell)
    common: dict[str, Any] = {
        "device": setting.device,
        "should_stop": setting.should_stop,
        "cache": setting.out / folder.CACHE,
    }
    if cell.kind == "pretrain" and cell.method in setting.weights:
        del common["should_stop"]  # nothing is trained
        file = setting.weights[cell.method]
        imagenet.run(recipe, file, setting.source, place, setting.report, **common)
        return
    if isinstance(recipe, PretrainRecipe | PretrainRecipe2d):
        pretrain.run(recipe, setting.source, place, setting.report, **common)
        return
    assert isinstance(recipe, AnyFinetune)
    encoder = None if cell.parent is None else setting.out / CELLS / cell.parent / folder.BUNDLE
    finetune.run(recipe, setting.target, place, setting.report, parent=encoder, **common)


@contextlib.contextmanager
def _held(place: Path) -> Iterator[bool]:
    """Whether this process has the folder for itself; the lock ends with the process."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _fail(place: Path, code: str, detail: str) -> None:
    _publish(place / FAILED, json.dumps({"code": code, "detail": detail}) + "\n")


def _publish(path: Path, text: str) -> None:
    """Write a file by rename, so that it is there whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
