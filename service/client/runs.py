"""Trainings, and following any run to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from service import schemas
from service.answers import TRANSIENT, ApiError
from service.client.transport import NUM_TRIES, STREAM_TIMEOUT_S, Transport

TERMINAL = frozenset({"succeeded", "failed", "canceled"})
POLL_S = 1.0

OnEvent = Callable[[schemas.Event], None]


class Runs(Transport):
    """Runs of the service."""

    def pretrain(
        self, dataset_id: str, recipe: Mapping[str, Any] | BaseModel, *, model_name: str
    ) -> schemas.Run:
        """Start a pretraining."""
        body = {"dataset_id": dataset_id, "recipe": _plain(recipe), "model_name": model_name}
        return self._create("runs", {"kind": "pretrain", **body}, schemas.Run)

    def finetune(
        self,
        dataset_id: str,
        recipe: Mapping[str, Any] | BaseModel,
        *,
        model_name: str,
        parent: str | None = None,
    ) -> schemas.Run:
        """Start a fine-tuning, from a parent (a model, or the run of one) or from nothing.

        A recipe of kind `classify` makes a classifier, any other a segmenter.
        """
        body = {
            "kind": "finetune",
            "dataset_id": dataset_id,
            "recipe": _plain(recipe),
            "model_name": model_name,
            "parent": parent,
        }
        return self._create("runs", body, schemas.Run)

    def run(self, run_id: str) -> schemas.Run:
        """A run of any kind."""
        return self._get(f"runs/{run_id}", schemas.Run)

    def runs(self, *, limit: int = 50, **filters: str) -> list[schemas.Run]:
        """The newest runs; filters are `kind`, `state` and `dataset_id`."""
        page_size = str(min(limit, 500))
        pages = self._pages("runs", schemas.RunPage, {"page_size": page_size, **filters})
        return [run for run, _ in zip(pages, range(limit), strict=False)]

    def metrics(self, run_id: str) -> schemas.RunMetrics:
        """The curves of a run."""
        return self._get(f"runs/{run_id}/metrics", schemas.RunMetrics)

    def run_files(self, run_id: str) -> tuple[schemas.RunFile, ...]:
        """The files of a training that has succeeded: previews, test cases."""
        return self._get(f"runs/{run_id}/files", schemas.RunFiles).files

    def download_run_file(self, run_id: str, name: str, path: Path) -> None:
        """Save a file of a training."""
        self._download(f"runs/{run_id}/files/{name}", path)

    def cancel(self, run_id: str) -> schemas.Run:
        """Ask a run of any kind to end."""
        collection = {"seg": "segmentations", "emb": "embeddings"}.get(run_id[:3], "runs")
        self._once("POST", f"{collection}/{run_id}:cancel")
        return self.run(run_id)

    def wait(
        self, run_id: str, on_event: OnEvent | None = None, *, timeout_s: float | None = None
    ) -> schemas.Run:
        """Follow a run to its end, through breaks of the connection.

        Events come by stream; where none gets through (some proxies hold them back), by asking.

        Args:
            run_id: A run of any kind.
            on_event: Told every event once, in order.
            timeout_s: How long to wait; for ever without it.

        Raises:
            ApiError: `timeout` after `timeout_s`, or what the service refused with.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        after, num_broken = 0, 0
        while True:
            before = after
            try:
                if num_broken < NUM_TRIES:
                    for event in self._stream(run_id, after, deadline):
                        after = event.id
                        _tell(on_event, event)
                else:
                    for event in self._listed(run_id, after):
                        after = event.id
                        _tell(on_event, event)
                    time.sleep(POLL_S)
                run = self.run(run_id)
            except ApiError as error:
                if error.status and error.status not in TRANSIENT:
                    raise
                num_broken = num_broken + 1 if after == before else 0
                if num_broken > 2 * NUM_TRIES:
                    raise
                if deadline is None or time.monotonic() < deadline:
                    time.sleep(min(2.0**num_broken * 0.1, 5.0))
            else:
                if num_broken < NUM_TRIES:  # a stream that ends early and empty is a broken one
                    num_broken = num_broken + 1 if after == before else 0
                if run.state in TERMINAL:
                    for event in self._listed(run_id, after):
                        _tell(on_event, event)
                    return run
            if deadline is not None and time.monotonic() > deadline:
                raise ApiError(0, "timeout", f"the run has not ended within {timeout_s:.0f} s")

    def _stream(self, run_id: str, after: int, deadline: float | None) -> Iterator[schemas.Event]:
        """Events after `after` by server-sent events, until the run ends or the time is up."""
        left_s = STREAM_TIMEOUT_S if deadline is None else deadline - time.monotonic()
        read_s = min(max(left_s, 0.1), STREAM_TIMEOUT_S)
        for _, _, data in self._listen(f"runs/{run_id}/events", after, read_s=read_s):
            yield schemas.Event.model_validate_json(data)
            if deadline is not None and time.monotonic() > deadline:
                return

    def _listed(self, run_id: str, after: int) -> Iterator[schemas.Event]:
        """Events after `after` by asking, as many as there are now."""
        while True:
            path, params = f"runs/{run_id}/events", {"after": str(after)}
            headers = {"Accept": "application/json"}
            answer = self._again("GET", path, params=params, headers=headers)
            found = schemas.Events.model_validate_json(answer.content).events
            if not found:
                return
            yield from found
            after = found[-1].id


def _tell(on_event: OnEvent | None, event: schemas.Event) -> None:
    if on_event is not None:
        on_event(event)


def _plain(recipe: Mapping[str, Any] | BaseModel) -> dict[str, Any]:
    return recipe.model_dump(mode="json") if isinstance(recipe, BaseModel) else dict(recipe)
