"""Experiments: a comparison of pretrainings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from service import schemas
from service.client.runs import POLL_S
from service.client.transport import Transport


class Experiments(Transport):
    """Experiments of the service."""

    def create_experiment(
        self,
        name: str,
        source_dataset_id: str,
        target_dataset_id: str,
        plan: Mapping[str, Any],
    ) -> schemas.Experiment:
        """Plan an experiment.

        Args:
            name: For people, and the report's title.
            source_dataset_id: What is pretrained on.
            target_dataset_id: What is fine-tuned on and judged by.
            plan: `methods`, `finetune`, `ratios`, `seeds`, `pretrain_per` and `budget`.
        """
        datasets = {"source_dataset_id": source_dataset_id, "target_dataset_id": target_dataset_id}
        return self._create("experiments", {"name": name, **datasets, **plan}, schemas.Experiment)

    def experiment(self, experiment_id: str) -> schemas.Experiment:
        """How far an experiment is."""
        return self._get(f"experiments/{experiment_id}", schemas.Experiment)

    def experiments(self) -> list[schemas.Experiment]:
        """Every experiment, newest first."""
        return list(self._pages("experiments", schemas.ExperimentPage, {}))

    def experiment_trainings(self, experiment_id: str) -> list[schemas.ExperimentCell]:
        """Every training of an experiment with its run."""
        path = f"experiments/{experiment_id}/trainings"
        return list(self._get(path, schemas.ExperimentCells).items)

    def experiment_report(
        self,
        experiment_id: str,
        path: Path,
        *,
        format: Literal["json", "markdown", "svg", "csv"] = "markdown",
    ) -> None:
        """Save the report so far: its text, its curve (`svg`) or its cases (`csv`)."""
        self._download(f"experiments/{experiment_id}/report?format={format}", path)

    def extend_experiment(self, experiment_id: str, more: Mapping[str, Any]) -> schemas.Experiment:
        """Add `methods`, `ratios` or `seeds`; `retry` does what failed or was canceled again."""
        return self._create(f"experiments/{experiment_id}:extend", dict(more), schemas.Experiment)

    def cancel_experiment(self, experiment_id: str) -> schemas.Experiment:
        """Stop an experiment; what is done stays."""
        answer = self._once("POST", f"experiments/{experiment_id}:cancel")
        return schemas.Experiment.model_validate_json(answer.content)

    def wait_experiment(
        self, experiment_id: str, on_change: Callable[[schemas.Experiment], None] | None = None
    ) -> schemas.Experiment:
        """Follow an experiment to its end."""
        while True:
            experiment = self.experiment(experiment_id)
            if on_change is not None:
                on_change(experiment)
            if experiment.finished_at is not None:
                return experiment
            time.sleep(POLL_S)
