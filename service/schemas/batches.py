"""Batches: one request over a dataset, and what came of each scan."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from service.formats import DicomFormat
from service.schemas.base import (
    HEX,
    SHA,
    TIME,
    Answer,
    Ask,
    BatchId,
    DatasetId,
    ModelReference,
    Page,
    RunId,
    Split,
    State,
    VolumeId,
    page_of,
)
from service.schemas.runs import ModelPointer, Progress, RunError


class BatchOptions(Ask):
    """How each scan is worked on."""

    formats: Annotated[tuple[DicomFormat, ...], Field(max_length=3)] = Field(
        (), description="Of segmentations of DICOM scans, made beside the NIfTI mask."
    )
    split: Split | None = Field(None, description="Only scans of this split.")


class BatchCreate(Ask):
    """A model to run on every scan of a dataset."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "dataset_id": f"ds_{HEX}",
                    "model": "models:/liver-tumour@champion",
                    "kind": "segment",
                    "options": {"formats": []},
                }
            ]
        },
    )

    dataset_id: DatasetId
    model: ModelReference
    kind: Literal["segment", "embed"]
    options: BatchOptions = BatchOptions()

    @model_validator(mode="after")
    def _formats_of_masks(self) -> Self:
        formats = self.options.formats
        if len(set(formats)) != len(formats):
            raise ValueError("a format stands there twice")
        if formats and self.kind == "embed":
            raise ValueError("an embedding has no formats")
        return self


class Batch(Answer):
    """A batch; its state is that of its scans."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"bat_{HEX}",
                    "dataset_id": f"ds_{HEX}",
                    "kind": "segment",
                    "model": {"name": "liver-tumour", "version": 1, "digest": SHA},
                    "options": {"formats": [], "split": None},
                    "state": "running",
                    "num_scans": 3,
                    "counts": {"queued": 1, "running": 1, "succeeded": 1},
                    "fraction": 0.3333,
                    "created_at": TIME,
                    "finished_at": None,
                }
            ]
        },
    )

    id: BatchId
    dataset_id: DatasetId
    kind: Literal["segment", "embed"]
    model: ModelPointer
    options: BatchOptions
    state: Literal["queued", "running", "succeeded", "failed", "canceled"] = Field(
        description="Once every scan has ended: `succeeded` if all did, `failed` if any failed, "
        "else `canceled`."
    )
    num_scans: int
    counts: dict[State, int] = Field(description="Scans in each state.")
    fraction: float = Field(description="Of the scans that have ended.")
    created_at: datetime
    finished_at: datetime | None


class BatchPage(Page[Batch]):
    """Part of a listing of batches."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(Batch))


class BatchItem(Answer):
    """A scan of a batch."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "position": 0,
                    "volume_id": f"vol_{HEX}",
                    "run_id": f"seg_{HEX}",
                    "state": "failed",
                    "tries": 1,
                    "progress": None,
                    "error": {"code": "host_out_of_memory", "detail": "..."},
                }
            ]
        },
    )

    position: int
    volume_id: VolumeId
    run_id: RunId = Field(description="The newest run: a segmentation or an embedding.")
    state: State
    tries: int
    progress: Progress | None
    error: RunError | None


class BatchItems(Page[BatchItem]):
    """Part of the scans of a batch, in the dataset's order."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(BatchItem))


class BatchRow(Answer):
    """What came of a scan."""

    position: int
    volume_id: VolumeId
    subject: str
    run_id: RunId
    state: State
    error_code: str | None
    volumes_ml: dict[str, float] | None
    num_lesions: dict[str, int] | None
    vector: tuple[float, ...] | None


class BatchTable(Answer):
    """What came of every scan."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "rows": [
                        {
                            "position": 0,
                            "volume_id": f"vol_{HEX}",
                            "subject": "subject-001",
                            "run_id": f"seg_{HEX}",
                            "state": "succeeded",
                            "error_code": None,
                            "volumes_ml": {"liver": 1480.2},
                            "num_lesions": {"tumour": 2},
                            "vector": None,
                        }
                    ]
                }
            ]
        },
    )

    rows: tuple[BatchRow, ...]
