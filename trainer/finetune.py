"""Segmentation fine-tuning: one loop, from a few labelled scans to a segmenter bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from models.networks.unet3d import UNet3d
from models.recipe import FinetuneRecipe
from trainer import checkpoint, export, folder, transfer
from trainer.checkpoint import State
from trainer.data.cache import Case, VolumeCache
from trainer.data.resident import Resident, Size
from trainer.data.sampling import Patches, PatchSampler
from trainer.data.scans import ScanSet, Split
from trainer.errors import DataError, NonFiniteLossError, Preempted
from trainer.folder import ShouldStop
from trainer.losses import segmentation_loss
from trainer.metrics import dice_per_label, mean_ignoring_nan
from trainer.pretrain import cosine
from trainer.randomness import generator
from trainer.report import Report

SAMPLE_SIZE: Size = (96, 96, 64)
"""Most of a patch that the parity check looks at."""


def run(
    recipe: FinetuneRecipe,
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
    """Fine-tune on the training split, keep what does best on the validation split.

    Args:
        recipe: What to do.
        scans: What to do it on; every scan of `train` and `val` needs labels.
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
    torch.manual_seed(recipe.seed)
    network = UNet3d(
        1, 1 + len(recipe.labels), recipe.network.base_width, "group", fused=recipe.fused
    )
    origin = _start_from(network, parent, recipe, report)
    network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    network.train()
    train, val, judged_on = _prepare(recipe, scans, cache or out / folder.CACHE, report)
    images, labels, sampler = _make_resident(recipe, train, device)
    size = _smaller(recipe.patch_size, SAMPLE_SIZE)
    sample = folder.centre_sample(val[0].image, val[0].background, size)
    head = {**folder.header(recipe, scans, sample, device, run_id), **origin}

    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    start, best = 0, -1.0
    if (state := folder.resume(out, head, report)) is not None:
        start, best = state["step"], state["best"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        checkpoint.restore_rng(state["rng"])

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
        patches = sampler.draw(recipe.batch_size, step, generator(recipe.seed, step, "patches"))
        image = _cut(images, patches, recipe.patch_size).float()[:, None]  # (B, 1, I, J, K)
        target = _cut(labels, patches, recipe.patch_size).long()  # (B, I, J, K)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(image)
        loss = segmentation_loss(logits.float(), target)
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
            raise NonFiniteLossError(int(bad_step))
        if is_logged:
            pace = (step - window_start) / (time.monotonic() - window_s)
            lr = float(optimizer.param_groups[0]["lr"])
            report.metric(
                step, {"loss": float(loss.detach()), "learning_rate": lr, "steps_per_s": pace}
            )
            report.progress("finetune", step, recipe.num_steps)
        if is_judged:
            metrics = validate(network, val, recipe, device, judged_on)
            report.metric(step, {name: metric["value"] for name, metric in metrics.items()})
            score = metrics["dice_mean"]["value"]
            if score > best:
                best = score
                kept = {**head, "network": network.state_dict(), "metrics": metrics, "best": best}
                checkpoint.save(out / folder.CHECKPOINTS, step, kept, kind="best", keep=1)
        if is_logged or is_judged:
            window_start, window_s = step, time.monotonic()
        if is_saved:
            save(step)
        if stops and not is_last:
            raise Preempted(step)

    final = checkpoint.load_newest(out / folder.CHECKPOINTS, kind="best")
    if final is None:
        raise DataError("nothing_to_judge", f"no {judged_on} scan holds any of the labels")
    return export.publish(final, out / folder.BUNDLE, report)


@torch.inference_mode()
def validate(
    network: nn.Module,
    cases: list[Case],
    recipe: FinetuneRecipe,
    device: torch.device,
    split: Split,
) -> dict[str, dict[str, Any]]:
    """Dice of each label over whole volumes, by Gaussian sliding windows.

    Returns:
        `dice_LABEL` and `dice_mean` as {value, n, split}; a label that no case holds is left out,
        and `dice_mean` is then over the others (-1 if there are none).
    """
    network.eval()
    names = list(recipe.labels)
    by_label: list[list[float]] = [[] for _ in names]
    for case in cases:
        assert case.labels is not None
        image = torch.from_numpy(case.image.astype("float32"))[None, None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = sliding_window_inference(
                image,
                recipe.patch_size,
                recipe.batch_size,
                network,
                overlap=recipe.overlap,
                mode="gaussian",
                cval=case.background,
            )
        assert isinstance(logits, Tensor)
        predicted = logits[0].float().argmax(dim=0).cpu()
        truth = torch.from_numpy(case.labels.copy()).long()
        for scores, score in zip(
            by_label, dice_per_label(predicted, truth, len(names)), strict=True
        ):
            scores.append(score)
    network.train()
    metrics: dict[str, dict[str, Any]] = {}
    for name, scores in zip(names, by_label, strict=True):
        mean, n = mean_ignoring_nan(scores)
        if n:
            metrics[f"dice_{name}"] = {"value": mean, "n": n, "split": split}
    means = [metric["value"] for metric in metrics.values()]
    overall = sum(means) / len(means) if means else -1.0
    return {**metrics, "dice_mean": {"value": overall, "n": len(cases), "split": split}}


def _start_from(
    network: UNet3d, parent: Path | None, recipe: FinetuneRecipe, report: Report
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
    return {
        "parent_digest": moved.parent_digest,
        "loaded_keys": list(moved.loaded),
        "skipped_keys": list(moved.skipped),
    }


def _prepare(
    recipe: FinetuneRecipe, scans: ScanSet, cache: Path, report: Report
) -> tuple[list[Case], list[Case], Split]:
    """Training and validation cases, and the split that the latter really are."""
    store = VolumeCache(cache)
    judged_on: Split = "val" if scans.of("val") else "train"
    if judged_on == "train":
        report.log("warning", "no validation scans: the training scans choose the best checkpoint")
    chosen = [*scans.of("train"), *scans.of("val")]
    cases = []
    for done, scan in enumerate(chosen, start=1):
        cases.append(store.labelled(scan, recipe))
        report.progress("prepare", done, len(chosen))
    num_train = len(scans.of("train"))
    train = cases[:num_train]
    if not any(case.labels is not None and case.labels.any() for case in train):
        raise DataError("unusable_labels", "no training scan holds any of the labels")
    return train, cases[num_train:] or train, judged_on


def _make_resident(
    recipe: FinetuneRecipe, cases: list[Case], device: torch.device
) -> tuple[Resident, Resident, PatchSampler]:
    patch = recipe.patch_size
    images = Resident.of(
        [case.image for case in cases],
        fill=[case.background for case in cases],
        at_least=patch,
        device=device,
    )
    labels = Resident.of(
        [case.labels for case in cases if case.labels is not None],
        fill=[0.0] * len(cases),
        at_least=patch,
        device=device,
    )
    sampler = PatchSampler(
        labels,
        len(recipe.labels),
        patch,
        foreground_share=recipe.foreground_share,
        flip_probability=recipe.flip_probability,
    )
    return images, labels, sampler


def _cut(volumes: Resident, patches: Patches, size: Size) -> Tensor:
    """The patches, flipped as drawn, (B, I, J, K)."""
    cut = volumes.crop(patches.volume, patches.start, size)
    for axis in range(3):
        flip = patches.flips[:, axis, None, None, None].to(cut.device)
        cut = torch.where(flip, cut.flip(1 + axis), cut)
    return cut


def _learning_rate(recipe: FinetuneRecipe, step: int) -> float:
    if recipe.schedule == "cosine":
        return cosine(recipe.learning_rate, step - 1, recipe.num_steps)
    return recipe.learning_rate


def _smaller(a: Size, b: Size) -> Size:
    return min(a[0], b[0]), min(a[1], b[1]), min(a[2], b[2])
