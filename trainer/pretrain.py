"""Self-supervised pretraining: one loop, from scans or 2D images to an encoder bundle.

Several processes train as one (`trainer.distributed`): all ranks run this loop, the first alone
writes.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.recipe import TISSUE_HU, AnyPretrain, PretrainRecipe, PretrainRecipe2d, Window
from trainer import checkpoint, distributed, export, folder, health, launch, methods
from trainer.build import lay_out
from trainer.data import sampling
from trainer.data.cache import Case, VolumeCache
from trainer.data.images2d import ResidentImages, load_images
from trainer.data.resident import Resident, Size
from trainer.data.sampling import PairSampler
from trainer.data.scans import ScanSet
from trainer.errors import CollapsedError, DataError, NonFiniteLossError, Preempted
from trainer.folder import ShouldStop
from trainer.methods.clean_norm import recalibrate
from trainer.report import Report


def run(
    recipe: AnyPretrain,
    scans: ScanSet,
    out: Path,
    report: Report,
    *,
    device: torch.device,
    should_stop: ShouldStop,
    run_id: str | None = None,
    cache: Path | None = None,
) -> Path:
    """Pretrain on the training split, or go on where an earlier call with this `out` stopped.

    Args:
        recipe: What to do.
        scans: What to do it on; labels are not read.
        out: The run's folder; see `trainer.folder`.
        report: Where progress goes.
        device: Where to compute.
        should_stop: Asked after every step; true on any rank ends the run with a checkpoint.
        run_id: The service's name for the run, for the lineage.
        cache: Folder of preprocessed scans; `out/cache` if None.

    Returns:
        The bundle's folder; on other ranks than the first it may not be there yet.

    Raises:
        DataError: Scans that cannot be trained on, or a batch that the ranks cannot share.
        Preempted: Stopped on request.
        NonFiniteLossError: The loss is not finite.
        CollapsedError: The features collapsed, and the recipe ends the run for it.
        DiskFullError: No room for a checkpoint.
        ParityError: ONNX and torch disagree.
    """
    launch.check(recipe, distributed.num_ranks())
    if (done := folder.finished(out, recipe, report)) is not None:
        return done
    volumes, sampler, sample = _load(recipe, scans, cache or out / folder.CACHE, report, device)
    head = folder.header(recipe, scans, sample, device, run_id)

    torch.manual_seed(recipe.seed)
    method = methods.make(recipe)
    method.to(device)
    lay_out(method)
    state = folder.resume(out, head, report)
    prepared = False
    if state is not None:
        method.load_state_dict(state["method"])
    else:
        prepared = method.prepare(volumes, sampler, report, should_stop)
    descent = method.descent(device)
    start = 0
    if state is not None:
        start = state["step"]
        descent.load_state_dict(state["optimizer"])
        checkpoint.restore_rng(state["rng"])

    def save(step: int) -> None:
        parts = {"method": method.state_dict(), "optimizer": descent.state_dict()}
        whole = {**head, **parts, "rng": checkpoint.rng_state()}
        checkpoint.save(out / folder.CHECKPOINTS, step, whole)

    if prepared and distributed.is_first():
        save(0)

    # On a GPU the loss is looked at when something is logged or saved, so that no step waits; the
    # first bad step is remembered on the device.
    bad_step = torch.full((), -1, dtype=torch.long, device=device)
    watch_every = recipe.log_every if device.type == "cuda" else 1
    watch = None
    if 0 < recipe.health.every <= recipe.num_steps:
        watch = health.Watch(volumes, recipe, out, report, device)
    window_start, window_s = start, time.monotonic()
    report.progress("pretrain", start, recipe.num_steps)
    for step in range(start + 1, recipe.num_steps + 1):
        losses = descent.step(method.make_views(volumes, sampler, step), step)

        is_bad = ~losses.total.detach().isfinite() & (bad_step < 0)
        bad_step = torch.where(is_bad, step, bad_step)
        is_logged = step % recipe.log_every == 0 or step == recipe.num_steps
        stops = distributed.any_rank(should_stop())
        is_saved = step % recipe.checkpoint_every == 0 or step == recipe.num_steps or stops
        if is_logged or is_saved or step % watch_every == 0:
            bad_step = distributed.largest(bad_step)
            if int(bad_step) >= 0:
                raise NonFiniteLossError(int(bad_step))
        if is_logged:
            pace = (step - window_start) / (time.monotonic() - window_s)
            window_start, window_s = step, time.monotonic()
            named = losses.named()
            every = distributed.mean(torch.stack(list(named.values()))).tolist()
            values = dict(zip(named, every, strict=True))
            pace_of = {"learning_rate": descent.rate, "steps_per_s": pace}
            report.metric(step, {**values, **pace_of})
            report.progress("pretrain", step, recipe.num_steps)
        if step == recipe.num_steps and recipe.method.sees_changed_input:
            recalibrate(method, volumes, sampler, device)
        if is_saved and distributed.is_first():
            save(step)
        if watch is not None and step % recipe.health.every == 0:
            collapsed = distributed.is_first() and watch.look(method, step)
            if recipe.health.stop_on_collapse and distributed.any_rank(collapsed):
                raise CollapsedError(step)
        if stops and step < recipe.num_steps:
            raise Preempted(step)

    if not distributed.is_first():
        return out / folder.BUNDLE
    final = checkpoint.load_newest(out / folder.CHECKPOINTS)
    assert final is not None
    return export.publish(
        final,
        out / folder.BUNDLE,
        report,
        scans.of("train"),
        device=device,
        should_stop=should_stop,
    )


def _load(
    recipe: AnyPretrain, scans: ScanSet, cache: Path, report: Report, device: torch.device
) -> tuple[Resident | ResidentImages, PairSampler | None, Tensor]:
    """What views are cut from, what says where, and real network input for the parity check."""
    chosen = scans.of("train")
    if recipe.method.needs_several_scans and len(chosen) == 1:
        raise DataError(
            "one_scan", "with mask_same_scan one scan has no negatives: add scans or turn it off"
        )
    if isinstance(recipe, PretrainRecipe2d):
        with distributed.first_then_others():
            images = load_images(chosen, recipe.preprocessing, cache, report, device)
        return images, None, images.inputs(torch.tensor([0]), recipe.preprocessing).half().cpu()
    store = VolumeCache(cache)
    cases = []
    with distributed.first_then_others():
        for done, scan in enumerate(chosen, start=1):
            cases.append(store.image(scan, recipe.preprocessing))
            report.progress("prepare", done, len(chosen))
    volumes, sampler = _make_resident(recipe, cases, device)
    if volumes.flat.device.type != device.type:
        report.log("info", "the volumes stay in host memory: too large for the device")
    middle = folder.centre_sample(cases[0].image, cases[0].background, recipe.crops.input_size)
    return volumes, sampler, middle


def _make_resident(
    recipe: PretrainRecipe, cases: list[Case], device: torch.device
) -> tuple[Resident, PairSampler]:
    sizes = recipe.crops.crop_sizes
    largest: Size = (
        max(size[0] for size in sizes),
        max(size[1] for size in sizes),
        max(size[2] for size in sizes),
    )
    volumes = Resident.of(
        [case.image for case in cases],
        fill=[case.background for case in cases],
        at_least=largest,
        device=device,
    )
    tissue = None
    if recipe.crops.max_tissue is not None:
        window = recipe.preprocessing.intensity
        assert isinstance(window, Window)
        limit = (TISSUE_HU - window.low_hu) / (window.high_hu - window.low_hu)
        tissue = [
            sampling.tissue_mask(volume.astype(np.float32), limit) for volume in volumes.on_host()
        ]
    return volumes, PairSampler(recipe.crops, volumes.shapes, tissue)
