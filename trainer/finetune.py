"""Fine-tuning: one loop, from a few labelled scans to a segmenter or classifier bundle."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.recipe import AnyClassify, FinetuneRecipe
from trainer import checkpoint, export, folder, transfer
from trainer.build import build, lay_out
from trainer.checkpoint import State
from trainer.classification import Classification
from trainer.data.scan_set import ScanSet
from trainer.data.scans import with_labelled
from trainer.errors import NonFiniteLossError, Preempted
from trainer.folder import ShouldStop
from trainer.optimizers import cosine
from trainer.report import Report
from trainer.segmentation import Segmentation
from trainer.task import Setting, Task

TASKS: dict[str, Callable[[Any, Setting], Task]] = {
    "finetune": Segmentation,
    "classify": Classification,
}
"""By `recipe.kind`."""


def run(
    recipe: FinetuneRecipe | AnyClassify,
    scans: ScanSet,
    out: Path,
    report: Report,
    *,
    device: torch.device,
    should_stop: ShouldStop,
    run_id: str | None = None,
    cache: Path | None = None,
    parent: Path | None = None,
) -> Path:
    """Train on the training split, keep what does best on validation, measure that on test.

    Args:
        recipe: What to do.
        scans: What to do it on; those without labels are left out.
        out: The run's folder; see `trainer.folder`.
        report: Where progress goes.
        device: Where to compute.
        should_stop: Asked after every step; true ends the run with a checkpoint.
        run_id: The service's name for the run, for the lineage.
        cache: Folder of preprocessed volumes; `out/cache` if None.
        parent: Bundle to start from; None starts from random weights.

    Returns:
        The bundle's folder.

    Raises:
        DataError: Scans, labels or a parent that cannot be trained on.
        Preempted: Stopped on request.
        NonFiniteLossError: The loss is not finite.
        DiskFullError: No room for a checkpoint.
        ParityError: ONNX and torch disagree.
    """
    if (done := folder.finished(out, recipe, report)) is not None:
        return done
    scans = with_labelled(scans, recipe.labelled)
    torch.manual_seed(recipe.seed)
    network = build(recipe, fused=isinstance(recipe, FinetuneRecipe) and recipe.fused)
    origin = _start_from(network, parent, recipe, report)
    network.to(device)
    lay_out(network)
    network.train()
    setting = Setting(network, scans, cache or out / folder.CACHE, report, device)
    task = TASKS[recipe.kind](recipe, setting)
    head = {**folder.header(recipe, scans, task.sample(), device, run_id), **origin}

    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    start, best = 0, -1.0
    if (state := folder.resume(out, head, report)) is not None:
        start, best = state["step"], state["best"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        checkpoint.restore_rng(state["rng"])
    saved = start

    def save(step: int) -> None:
        parts = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "best": best}
        whole = {**head, **parts, "rng": checkpoint.rng_state()}
        checkpoint.save(out / folder.CHECKPOINTS, step, whole)

    bad_step = torch.full((), -1, dtype=torch.long, device=device)  # as in trainer.pretrain
    watch_every = recipe.log_every if device.type == "cuda" else 1
    window_start, window_s = start, time.monotonic()
    report.progress("finetune", start, recipe.num_steps)
    for step in range(start + 1, recipe.num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        loss = task.loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()

        bad_step = torch.where(~loss.detach().isfinite() & (bad_step < 0), step, bad_step)
        is_last = step == recipe.num_steps
        is_logged = step % recipe.log_every == 0 or is_last
        is_judged = step % recipe.validate_every == 0 or is_last
        stops = should_stop()
        is_saved = step % recipe.checkpoint_every == 0 or is_last or stops
        looks = is_logged or is_judged or is_saved or step % watch_every == 0
        if looks and int(bad_step) >= 0:
            raise NonFiniteLossError(int(bad_step), saved)
        if is_logged:
            pace = (step - window_start) / (time.monotonic() - window_s)
            lr = float(optimizer.param_groups[0]["lr"])
            report.metric(
                step, {"loss": float(loss.detach()), "learning_rate": lr, "steps_per_s": pace}
            )
            report.progress("finetune", step, recipe.num_steps)
        if is_judged:
            metrics = task.judge(task.judged_on)
            report.metric(step, {name: metric["value"] for name, metric in metrics.items()})
            if metrics[task.score]["value"] > best:
                best = metrics[task.score]["value"]
                kept = {**head, "network": network.state_dict(), "metrics": metrics, "best": best}
                if (quality := task.quality()) is not None:
                    kept["quality"] = quality.model_dump()
                checkpoint.save(out / folder.CHECKPOINTS, step, kept, kind="best", keep=1)
        if is_logged or is_judged:
            window_start, window_s = step, time.monotonic()
        if is_saved:
            save(step)
            saved = step
        if stops and not is_last:
            raise Preempted(step)

    final = checkpoint.load_newest(out / folder.CHECKPOINTS, kind="best")
    assert final is not None  # the task refuses scans that cannot be judged
    if task.has("test"):
        network.load_state_dict(final["network"])
        tested = {f"test_{name}": metric for name, metric in task.judge("test").items()}
        report.metric(recipe.num_steps, {name: metric["value"] for name, metric in tested.items()})
        final["metrics"] |= tested
        folder.write_cases(out, task.case_results("test"))
    return export.publish(
        final,
        out / folder.BUNDLE,
        report,
        [scan for scan in scans.of("train") if scan.labels is not None],
        device=device,
        should_stop=should_stop,
    )


def _start_from(
    network: nn.Module,
    parent: Path | None,
    recipe: FinetuneRecipe | AnyClassify,
    report: Report,
) -> State:
    """Load the parent; what goes into the lineage."""
    if parent is None:
        return {"parent_digest": "", "loaded_keys": [], "skipped_keys": []}
    moved = transfer.load_parent(network, parent, recipe)
    report.log(
        "info",
        f"{len(moved.loaded)} tensors taken from the parent, {len(moved.skipped)} of it not taken; "
        f"{len(moved.fresh)} of the network start random: {', '.join(moved.fresh)}",
    )
    for name in moved.inflated:
        report.log("info", f"{name} of the parent reads one channel; spread over all of the recipe")
    if moved.skipped:
        report.log("info", f"not taken from the parent: {', '.join(moved.skipped)}")
    return {
        "parent_digest": moved.parent_digest,
        "loaded_keys": list(moved.loaded),
        "skipped_keys": list(moved.skipped),
    }


def _learning_rate(recipe: FinetuneRecipe | AnyClassify, step: int) -> float:
    if recipe.schedule == "cosine":
        return cosine(recipe.learning_rate, step - 1, recipe.num_steps)
    return recipe.learning_rate
