"""Fine-tuning to classify: places in scans, whole scans or 2D images, judged by AUC.

Training may draw examples in balance; validation and test take them as they are, once each.

B batch, N examples, L labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models.bundle import Quality
from models.experiment.cases import CaseResult, CaseResults
from models.recipe import AnyClassify, ClassifyRecipe, ClassifyRecipe2d
from models.recipe.finetune import LEAST_MEMBERS
from trainer.data import cases
from trainer.data.examples import Batches, VolumeSource, truth_of
from trainer.data.examples2d import ImageSource
from trainer.data.scan_set import SPLITS, Example, ScanFile, Split
from trainer.errors import DataError
from trainer.folder import Metrics
from trainer.losses import multi_label_loss
from trainer.metrics import auc, average_precision
from trainer.report import Report
from trainer.task import Setting


class Case(Protocol):
    """A scan that was read."""

    @property
    def id(self) -> str:
        """The scan's."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """What is known of it."""


class Examples(Protocol):
    """The examples of one split on the device."""

    @property
    def truth(self) -> Tensor:
        """1 or 0, NaN where it is not known, float32 (N, L)."""

    def inputs(self, index: Tensor) -> Tensor:
        """Network input (B, C, ...) of the examples `index` (B,), as they are judged."""


class Source(Protocol):
    """How examples are read, laid out and drawn; `SOURCES` has one for each form of scan."""

    def read(self, scan: ScanFile) -> Case:
        """Read one scan; raises `DataError` with its id."""

    def check(self, cases: Sequence[Any], report: Report) -> None:
        """Refuse cases that cannot be laid out."""

    def lay_out(self, cases: Sequence[Any]) -> Examples:
        """Put the cases of one split on the device."""

    def batches(self, examples: Any) -> Batches:
        """What makes the training batch of a step."""


SOURCES: dict[type[AnyClassify], Callable[[Any, Path, torch.device], Source]] = {
    ClassifyRecipe: VolumeSource,
    ClassifyRecipe2d: ImageSource,
}


class Classification:
    """The task of a `ClassifyRecipe` or `ClassifyRecipe2d`; see `trainer.task`.

    Raises:
        DataError: Scans or examples that cannot be trained on.
    """

    score = "auc_mean"

    def __init__(self, recipe: AnyClassify, setting: Setting) -> None:
        self._recipe, self._network = recipe, setting.network
        self._device, self._report = setting.device, setting.report
        self._source = SOURCES[type(recipe)](recipe, setting.cache, setting.device)
        self._cases = cases.read_all(
            setting.scans, self._source.read, lambda scan: bool(scan.examples), setting.report
        )
        self.judged_on: Split = "val" if self._cases["val"] else "train"
        every_case = [case for split in SPLITS for case in self._cases[split]]
        self._source.check(every_case, setting.report)
        self._check_labels()
        self._loaded: tuple[Split, Examples] | None = None
        self._scores: dict[Split, Tensor] = {}
        """Of each example as it was judged last, (N, L)."""
        self._subject_of = {scan.id: scan.subject for scan in setting.scans.scans}
        self._train = self._source.lay_out(self._cases["train"])
        self._batches = self._source.batches(self._train)

    def has(self, split: Split) -> bool:
        """Whether there are examples to judge on."""
        return bool(self._cases[split])

    def quality(self) -> Quality | None:
        """None: a classifier's result has no flag."""
        return None

    def case_results(self, split: Split) -> CaseResults:
        """Score and truth of each example, as `judge` found them last; a place is numbered."""
        labels, rows = self._recipe.labels, self._truth(split)
        number: Counter[str] = Counter()
        found = []
        for (scan, truth), scores in zip(rows, self._scores[split].tolist(), strict=True):
            number[scan] += 1
            known = {n: int(t) for n, t in zip(labels, truth, strict=True) if not math.isnan(t)}
            found.append(
                CaseResult(
                    case_id=f"{scan}#{number[scan]}",
                    subject=self._subject_of[scan],
                    values=dict(zip(labels, scores, strict=True)),
                    truth=known,
                )
            )
        return CaseResults(measure="auc", labels=labels, cases=tuple(found))

    def sample(self) -> Tensor:
        """Real network input for the parity check, float16 (1, C, ...)."""
        return self._examples(self.judged_on).inputs(torch.tensor([0])).half().cpu()

    def loss(self, step: int) -> Tensor:
        """Of one batch of examples; the batch follows from the seed and the step."""
        recipe = self._recipe
        index, image = self._batches(step)
        truth = self._train.truth[index].to(self._device)  # (B, L)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            logits: Tensor = self._network(image)
        if recipe.exclusive:
            return F.cross_entropy(logits.float(), truth.argmax(dim=1))
        return multi_label_loss(logits, truth)

    @torch.inference_mode()
    def judge(self, split: Split) -> Metrics:
        """Area under the ROC curve and average precision of each label, over every example.

        Returns:
            `auc_LABEL`, `ap_LABEL`, and the means; a label of which the split has no example with
            or none without it is left out and logged, and the means are then over the others.
        """
        examples = self._examples(split)
        self._network.eval()
        everything = torch.split(torch.arange(len(examples.truth)), self._recipe.batch_size)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            logits = [self._network(examples.inputs(index)).float().cpu() for index in everything]
        self._network.train()
        scores = torch.cat(logits)  # (N, L)
        if self._recipe.exclusive:
            scores = scores.softmax(dim=1)
        self._scores[split] = scores
        metrics: Metrics = {}
        for at, name in enumerate(self._recipe.labels):
            is_known = ~examples.truth[:, at].isnan()
            truth, score = examples.truth[is_known, at], scores[is_known, at]
            if (truth == 0).all() or (truth == 1).all():
                self._report.log("warning", f"{name} cannot be judged on {split}: one class only")
                continue
            for measure, value in (
                ("auc", auc(score, truth)),
                ("ap", average_precision(score, truth)),
            ):
                metrics[f"{measure}_{name}"] = {"value": value, "n": len(truth), "split": split}
        for measure in ("auc", "ap"):
            values = [m["value"] for name, m in metrics.items() if name.startswith(f"{measure}_")]
            if values:
                mean = sum(values) / len(values)
                metrics[f"{measure}_mean"] = {"value": mean, "n": len(scores), "split": split}
        return metrics

    def _examples(self, split: Split) -> Examples:
        """A split's examples on the device; one split beside training's at a time."""
        if split == "train":
            return self._train
        if self._loaded is None or self._loaded[0] != split:
            self._loaded = None
            self._loaded = split, self._source.lay_out(self._cases[split])
        return self._loaded[1]

    def _check_labels(self) -> None:
        """Training has some of each class, and what judges has both classes of some label."""
        judged = []
        truth = {split: self._truth(split) for split in SPLITS}
        for at, label in enumerate(self._recipe.labels):
            for value, name in ((1.0, label), (0.0, f"not {label}")):
                members = {
                    split: [scan for scan, row in truth[split] if row[at] == value]
                    for split in SPLITS
                }
                cases.check_members(name, members, at_least=LEAST_MEMBERS, report=self._report)
                judged.append(bool(members[self.judged_on]))
        if not any(has and has_not for has, has_not in zip(judged[::2], judged[1::2], strict=True)):
            raise DataError(
                "nothing_to_judge", f"no label has both classes among the {self.judged_on} examples"
            )

    def _truth(self, split: Split) -> list[tuple[str, list[float]]]:
        """Scan and truth of each example.

        Raises:
            DataError: `unusable_labels`: exclusive labels of which not exactly one holds.
        """
        rows = []
        for case in self._cases[split]:
            for row in truth_of(case.examples, self._recipe.labels).tolist():
                if self._recipe.exclusive and sorted(row) != sorted([1.0] + [0.0] * (len(row) - 1)):
                    raise DataError(
                        "unusable_labels",
                        f"scan {case.id}: of exclusive labels one must be 1 and the others 0",
                    )
                rows.append((case.id, row))
        return rows
