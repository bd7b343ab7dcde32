"""What a fine-tuning learns and how that is judged, as the loop of `trainer.finetune` sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from models.bundle import Quality
from models.experiment.cases import CaseResults
from trainer.data.scan_set import ScanSet, Split
from trainer.folder import Metrics
from trainer.report import Report


@dataclass(frozen=True, slots=True)
class Setting:
    """What a task is made from, besides its recipe."""

    network: nn.Module
    """On the device; the loop trains it."""
    scans: ScanSet
    cache: Path
    """Folder of preprocessed volumes."""
    report: Report
    device: torch.device


class Task(Protocol):
    """Made before the first step, with all scans read; what cannot be used is refused then."""

    score: str
    """The metric whose highest value chooses the checkpoint."""
    judged_on: Split
    """`val`, or `train` where there are no validation scans."""

    def has(self, split: Split) -> bool:
        """Whether there is something to judge on."""

    def sample(self) -> Tensor:
        """Real network input for the parity check, float16 (1, C, ...)."""

    def loss(self, step: int) -> Tensor:
        """Of one batch, with its gradient; follows from the seed and the step."""

    def judge(self, split: Split) -> Metrics:
        """How good the network is now."""

    def case_results(self, split: Split) -> CaseResults:
        """What the last `judge` of that split found, case by case."""

    def quality(self) -> Quality | None:
        """When serving shall flag a scan, from the last `judge` on `judged_on`; None: never."""
