"""Batches: one request over a dataset."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from service import schemas
from service.client.runs import POLL_S
from service.client.transport import Transport
from service.formats import DicomFormat


class Batches(Transport):
    """Batches of the service."""

    def create_batch(
        self,
        dataset_id: str,
        model: str,
        kind: Literal["segment", "embed"],
        *,
        formats: Sequence[DicomFormat] = (),
        split: schemas.Split | None = None,
    ) -> schemas.Batch:
        """Run a model on every scan of a dataset, or of one of its splits."""
        options = {"formats": list(formats), "split": split}
        body = {"dataset_id": dataset_id, "model": model, "kind": kind, "options": options}
        return self._create("batches", body, schemas.Batch)

    def batch(self, batch_id: str) -> schemas.Batch:
        """How far a batch is."""
        return self._get(f"batches/{batch_id}", schemas.Batch)

    def batches(self) -> list[schemas.Batch]:
        """Every batch, newest first."""
        return list(self._pages("batches", schemas.BatchPage, {}))

    def batch_items(self, batch_id: str, **filters: str) -> list[schemas.BatchItem]:
        """Every scan of a batch; the filter is `state`."""
        return list(self._pages(f"batches/{batch_id}/items", schemas.BatchItems, filters))

    def wait_batch(
        self, batch_id: str, on_change: Callable[[schemas.Batch], None] | None = None
    ) -> schemas.Batch:
        """Follow a batch to its end."""
        while True:
            batch = self.batch(batch_id)
            if on_change is not None:
                on_change(batch)
            if batch.finished_at is not None:
                return batch
            time.sleep(POLL_S)

    def cancel_batch(self, batch_id: str) -> schemas.Batch:
        """Ask every scan of a batch that has not ended to end."""
        answer = self._once("POST", f"batches/{batch_id}:cancel")
        return schemas.Batch.model_validate_json(answer.content)

    def retry_batch(self, batch_id: str) -> schemas.Batch:
        """Do the failed and canceled scans of a batch again."""
        return self._create(f"batches/{batch_id}:retry", {}, schemas.Batch)

    def batch_table(self, batch_id: str) -> schemas.BatchTable:
        """What came of every scan of a batch that has ended."""
        return self._get(f"batches/{batch_id}/table", schemas.BatchTable)

    def download_batch_table(self, batch_id: str, path: Path) -> None:
        """Save the table as CSV."""
        self._download(f"batches/{batch_id}/table?format=csv", path)
