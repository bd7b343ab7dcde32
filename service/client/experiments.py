"""Experiments: a comparison of pretrainings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from service import schemas
from service.answers import TRANSIENT, ApiError
from service.client.runs import POLL_S
from service.client.transport import NUM_TRIES, Transport


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
        self,
        experiment_id: str,
        on_change: Callable[[schemas.ExperimentProgress], None] | None = None,
    ) -> schemas.Experiment:
        """Follow an experiment to its end, through breaks of the connection.

        By stream; where none gets through (some proxies hold them back), by asking.

        Args:
            experiment_id: The experiment.
            on_change: Told how far the whole is, whenever that is another.

        Raises:
            ApiError: What the service refused with, or that it does not answer any more.
        """
        after, num_broken, last = 0, 0, None
        while True:
            has_heard, by_stream = False, num_broken < NUM_TRIES
            try:
                for number, progress in self._news(experiment_id, after, by_stream=by_stream):
                    after, has_heard = number, True
                    if on_change is not None and progress != last:
                        on_change(progress)
                    last = progress
                    if progress.state != "running":
                        return self.experiment(experiment_id)
            except ApiError as error:
                if error.status and error.status not in TRANSIENT:
                    raise
                if not has_heard and num_broken >= 2 * NUM_TRIES:
                    raise
            if has_heard:
                num_broken = 0 if by_stream else NUM_TRIES  # once streams fail, asking goes on
            else:
                num_broken += 1
            time.sleep(POLL_S if has_heard else min(2.0**num_broken * 0.1, 5.0))

    def _news(
        self, experiment_id: str, after: int, *, by_stream: bool
    ) -> Iterator[tuple[int, schemas.ExperimentProgress]]:
        """How far an experiment is, again and again or once, and after which event that was."""
        path = f"experiments/{experiment_id}/events"
        if not by_stream:
            found = self._get(path, schemas.ExperimentEvents, {"after": str(after)})
            yield found.id, found.progress
            return
        for name, number, data in self._listen(path, after):
            if name == "progress":
                yield number, schemas.ExperimentProgress.model_validate_json(data)
