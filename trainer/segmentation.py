"""Fine-tuning to segment: patches of labelled scans, judged by Dice on whole volumes.

Classes that exclude each other (`labels`) are a softmax with Dice and cross-entropy; classes that
may overlap (`regions`) are a sigmoid each, with Dice and binary cross-entropy.

B batch, C channels, R regions or classes, I J K voxels.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor

from models.bundle import Quality
from models.experiment.cases import CaseResult, CaseResults
from models.recipe import FinetuneRecipe
from models.tiling import margins, pad
from models.uncertainty import EntropyMeter, calibrated
from trainer.data import cases
from trainer.data.cache import LabelledCase, VolumeCache
from trainer.data.label_crop import cropped
from trainer.data.patches import cut, flipped, resident_channels
from trainer.data.resident import Resident, Size
from trainer.data.sampling import PatchSampler
from trainer.data.scan_set import SPLITS, Split
from trainer.errors import DataError
from trainer.folder import Metrics, centre_sample
from trainer.losses import region_loss, segmentation_loss
from trainer.metrics import dice_per_label, dice_per_region, mean_ignoring_nan
from trainer.randomness import generator
from trainer.report import Report
from trainer.task import Setting

SAMPLE_SIZE: Size = (96, 96, 64)
"""Most of a patch that the parity check looks at."""


class Segmentation:
    """The task of a `FinetuneRecipe`; see `trainer.task`.

    Raises:
        DataError: Scans or labels that cannot be trained on.
    """

    score = "dice_mean"

    def __init__(self, recipe: FinetuneRecipe, setting: Setting) -> None:
        store = VolumeCache(setting.cache)
        self._recipe, self._network = recipe, setting.network
        self._device, self._report = setting.device, setting.report
        self._members = region_members(recipe)
        weights = [1.0, *(recipe.class_weights.get(name, 1.0) for name in recipe.labels)]
        self._class_weights = torch.tensor(weights, device=setting.device)  # background first
        self._cases = cases.read_all(
            setting.scans,
            lambda scan: cropped(store.labelled(scan, recipe), recipe),
            lambda scan: scan.labels is not None,
            setting.report,
        )
        self.judged_on: Split = "val" if self._cases["val"] else "train"
        everything = [case for split in SPLITS for case in self._cases[split]]
        first_channels = [case.channels[0] for case in everything]
        cases.check_extents(first_channels, recipe.patch_size, setting.report)
        self._check_targets(setting.report)
        self._certainty: list[tuple[float | None, float]] = []
        """Mean foreground entropy and mean Dice of each scan that judges."""
        self._scores: dict[Split, list[list[float]]] = {}
        """Of each case as it was judged last, NaN where it has none of a label or region."""
        self._subject_of = {scan.id: scan.subject for scan in setting.scans.scans}
        self._images, self._labels, self._sampler = self._make_resident(self._cases["train"])

    def has(self, split: Split) -> bool:
        """Whether there are scans to judge on."""
        return bool(self._cases[split])

    def quality(self) -> Quality | None:
        """When serving shall flag a scan, by what `judge` found last on `judged_on`."""
        if not self._certainty:
            return None
        split: Literal["train", "val"] = "val" if self.judged_on == "val" else "train"
        return calibrated(self._certainty, min_dice=self._recipe.quality_min_dice, split=split)

    def case_results(self, split: Split) -> CaseResults:
        """Dice of each label or region by case, as `judge` found it last."""
        cases = tuple(
            CaseResult(
                case_id=case.id,
                subject=self._subject_of[case.id],
                values={
                    name: score
                    for name, score in zip(self._recipe.targets, scores, strict=True)
                    if not math.isnan(score)
                },
            )
            for case, scores in zip(self._cases[split], self._scores[split], strict=True)
        )
        return CaseResults(measure="dice", labels=self._recipe.targets, cases=cases)

    def sample(self) -> Tensor:
        """Real network input for the parity check, float16 (1, C, I, J, K)."""
        i, j, k = (min(*pair) for pair in zip(self._recipe.patch_size, SAMPLE_SIZE, strict=True))
        first = self._cases[self.judged_on][0]
        images = [centre_sample(c.image, c.background, (i, j, k)) for c in first.channels]
        return torch.cat(images, dim=1)

    def loss(self, step: int) -> Tensor:
        """Of one batch of patches; the patches follow from the seed and the step."""
        recipe, size = self._recipe, self._recipe.patch_size
        random = generator(recipe.seed, step, "patches")
        patches = self._sampler.draw(recipe.batch_size, step, random)
        image = flipped(cut(self._images, patches.volume, patches.start, size), patches.flips)
        target = self._labels.crop(patches.volume, patches.start, size)
        target = flipped(target, patches.flips).long()  # (B, I, J, K)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            logits: Tensor = self._network(image)
        if recipe.labels:
            return segmentation_loss(logits.float(), target, self._class_weights)
        regions = self._members.to(target.device)[:, target].movedim(0, 1)  # (B, R, I, J, K)
        return region_loss(logits.float(), regions)

    @torch.inference_mode()
    def judge(self, split: Split) -> Metrics:
        """Dice of each label or region over whole volumes, by Gaussian sliding windows.

        Returns:
            `dice_NAME` and `dice_mean`; a name that no case holds is left out, and `dice_mean` is
            then over the others.
        """
        self._network.eval()
        cases, judged = self._cases[split], []
        for done, case in enumerate(cases, start=1):
            judged.append(self._dice(case))
            self._report.progress("judge", done, len(cases))  # or it would look stalled
        by_case = self._scores[split] = [scores for scores, _ in judged]
        self._network.train()
        if split == self.judged_on and self._recipe.labels:
            means = [(mean_ignoring_nan(scores), entropy) for scores, entropy in judged]
            self._certainty = [(entropy, mean) for (mean, n), entropy in means if n]
        metrics: Metrics = {}
        for name, scores in zip(self._recipe.targets, zip(*by_case, strict=True), strict=True):
            mean, n = mean_ignoring_nan(scores)
            if n:
                metrics[f"dice_{name}"] = {"value": mean, "n": n, "split": split}
        if not metrics:
            return {}
        overall = sum(metric["value"] for metric in metrics.values()) / len(metrics)
        return {**metrics, "dice_mean": {"value": overall, "n": len(by_case), "split": split}}

    def _dice(self, case: LabelledCase) -> tuple[list[float], float | None]:
        """Of each label or region, NaN where the case has none of it; mean entropy of labels."""
        recipe, patch, shape = self._recipe, self._recipe.patch_size, case.labels.shape
        # Padded here, not by MONAI: each channel has an air of its own.
        padded = [pad(c.image.astype(np.float32), patch, c.background) for c in case.channels]
        image = torch.from_numpy(np.stack(padded))[None].to(self._device)  # (1, C, I, J, K)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            logits = sliding_window_inference(
                image,
                patch,
                recipe.batch_size,
                self._network,
                overlap=recipe.overlap,
                mode="gaussian",
            )
        assert isinstance(logits, Tensor)
        before = [first for first, _ in margins((shape[0], shape[1], shape[2]), patch)]
        i, j, k = (slice(at, at + n) for at, n in zip(before, shape, strict=True))
        logits = logits[0, :, i, j, k].float()  # (R, I, J, K)
        truth = torch.from_numpy(case.labels.copy()).long()
        if recipe.labels:
            logits = logits.cpu()
            meter = EntropyMeter(recipe.targets)
            meter.add(logits.numpy())
            scores = dice_per_label(logits.argmax(dim=0), truth, len(recipe.labels))
            return scores, meter.result().mean_foreground_entropy
        return dice_per_region((logits > 0).cpu(), self._members[:, truth]), None

    def _check_targets(self, report: Report) -> None:
        """Every label is held by a training scan, and at least one by a scan that judges."""
        held = {
            split: [(case.id, self._held_by(case)) for case in self._cases[split]]
            for split in SPLITS
        }
        for at, name in enumerate(self._recipe.targets):
            by_split = {
                split: [scan for scan, holds in held[split] if holds[at]] for split in SPLITS
            }
            cases.check_members(name, by_split, at_least=1, report=report)
        if not any(any(holds) for _, holds in held[self.judged_on]):
            raise DataError("nothing_to_judge", f"no {self.judged_on} scan holds any of the labels")

    def _held_by(self, case: LabelledCase) -> list[bool]:
        """Whether the case holds each label or region."""
        present = (
            torch.from_numpy(case.labels.copy())
            .flatten()
            .bincount(minlength=self._members.shape[1])
        )
        return [bool(present[members].any()) for members in self._members]

    def _make_resident(
        self, train: list[LabelledCase]
    ) -> tuple[list[Resident], Resident, PatchSampler]:
        recipe, patch = self._recipe, self._recipe.patch_size
        images = resident_channels([case.channels for case in train], patch, self._device)
        labels = Resident.of(
            [case.labels for case in train],
            fill=[0.0] * len(train),
            at_least=patch,
            device=self._device,
        )
        sampler = PatchSampler(
            labels,
            len(recipe.values),
            patch,
            foreground_share=recipe.foreground_share,
            flip_probability=recipe.flip_probability,
        )
        return images, labels, sampler


def region_members(recipe: FinetuneRecipe) -> Tensor:
    """Which classes of the label volume each label or region consists of, bool (R, 1 + classes).

    Indexed with classes (I, J, K), it gives the masks (R, I, J, K).
    """
    values = list(recipe.values.values())
    regions: list[tuple[int, ...]] = [(value,) for value in recipe.labels.values()]
    regions += recipe.regions.values()
    inside = [[False, *(value in region for value in values)] for region in regions]
    return torch.tensor(inside)
