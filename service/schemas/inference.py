"""What segmentations and embeddings share: a model on a volume, and how it ran."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from service.schemas.base import (
    HEX,
    SHA,
    TIME,
    Answer,
    Ask,
    ModelReference,
    Sha256,
    State,
    VolumeId,
)
from service.schemas.runs import ModelPointer, Progress, RunError


class InferenceCreate(Ask):
    """A model to run on a scan: on a volume, or on a 2D image where the model reads those."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [{"volume_id": f"vol_{HEX}", "model": "models:/liver-tumour@champion"}]
        },
    )

    volume_id: VolumeId
    model: ModelReference


class Inference(Answer):
    """What a segmentation and an embedding have in common."""

    state: State
    volume_id: VolumeId
    model: ModelPointer
    progress: Progress | None
    error: RunError | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


INFERENCE: JsonDict = {
    "state": "succeeded",
    "volume_id": f"vol_{HEX}",
    "model": {"name": "liver-tumour", "version": 1, "digest": SHA},
    "progress": None,
    "error": None,
    "created_at": TIME,
    "started_at": TIME,
    "finished_at": TIME,
}


OOD: JsonDict = {
    "score": 9.4,
    "threshold": 12.7,
    "is_out": False,
    "n_reference": 92,
    "reason": None,
    "method": "mahalanobis",
}


class Preflight(Answer):
    """What the work was expected to take, before it began."""

    predicted_bytes: int = Field(description="Memory beside the loaded model; an upper bound.")
    available_bytes: int | None = Field(description="Null where nothing told.")
    predicted_s: float = Field(
        description="Of a cascade: where no organ is found and the whole scan is looked at."
    )
    degraded: tuple[Literal["smaller_batch", "smaller_windows", "column_blocks"], ...] = Field(
        (), description="What was given up so that it fits."
    )


class Ran(Answer):
    """What ran on the scan, and how."""

    bundle_digest: Sha256 | None = Field(None, description="Of the model's files.")
    provider: str | None = Field(None, description="Of onnxruntime, as it really was.")
    precision: str | None = Field(None, description="Of the network, `float32` or `float16`.")
    model_was_resident: bool | None = Field(
        None, description="False: the request waited for the model to be loaded."
    )
    fell_back_from: str | None = Field(
        None, description="The provider that was asked for, where the CPU stood in."
    )
    retried_after: str | None = Field(
        None, description="The lack of memory after which windows were done one by one."
    )
