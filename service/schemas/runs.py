"""Runs: what a job is asked for, its progress, metrics and events."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from models.recipe import AnyPretrain, AnyRecipe, ClassifyRecipe, Recipe
from service.schemas.base import (
    HEX,
    SHA,
    TIME,
    Answer,
    Ask,
    DatasetId,
    ModelName,
    ModelReference,
    Page,
    RunId,
    Sha256,
    State,
    VolumeId,
    page_of,
)


class Requires(Ask):
    """Which workers may take a run: those whose device is of this kind and has so much memory."""

    device: Literal["cpu", "cuda"] | None = None
    memory_bytes: int = Field(0, ge=0, le=2**50, description="Of one GPU, or of the host.")


class RunCreate(Ask):
    """A training to do. `recipe.kind` may be left out; it is `kind`.

    A fine-tuning's recipe is of kind `finetune` (segmentation) or `classify`. Recipes whose network
    is `resnet18_unet2d` are of 2D images.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "kind": "pretrain",
                    "dataset_id": f"ds_{HEX}",
                    "model_name": "abdomen-encoder",
                    "recipe": {"kind": "pretrain", "num_steps": 1000, "batch_size": 8},
                },
                {
                    "kind": "pretrain",
                    "dataset_id": f"ds_{HEX}",
                    "model_name": "abdomen-rotnet",
                    "recipe": {"kind": "pretrain", "method": {"name": "rotnet"}},
                },
                {
                    "kind": "finetune",
                    "dataset_id": f"ds_{HEX}",
                    "model_name": "liver-tumour",
                    "parent": "models:/abdomen-encoder@latest",
                    "recipe": {"kind": "finetune", "labels": {"liver": 1, "tumour": 2}},
                },
                {
                    "kind": "pretrain",
                    "dataset_id": f"ds_{HEX}",
                    "model_name": "chest-encoder",
                    "recipe": {"kind": "pretrain", "network": {"kind": "resnet18_unet2d"}},
                },
                {
                    "kind": "finetune",
                    "dataset_id": f"ds_{HEX}",
                    "model_name": "chest-findings",
                    "parent": "models:/chest-encoder@latest",
                    "recipe": {
                        "kind": "classify",
                        "network": {"kind": "resnet18_unet2d"},
                        "labels": ["nodule", "effusion"],
                    },
                },
            ]
        },
    )

    kind: Literal["pretrain", "finetune"]
    dataset_id: DatasetId
    recipe: Recipe
    parent: ModelReference | None = Field(
        None, description="Of fine-tuning, what it starts from: an encoder, or the run of one."
    )
    model_name: ModelName = Field(description="The model that the result becomes a version of.")
    priority: int = Field(
        0, ge=-100, le=100, description="Higher goes first; above 0 for admins alone."
    )
    requires: Requires = Requires()

    @model_validator(mode="before")
    @classmethod
    def _recipe_of_the_run(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("recipe"), dict):
            recipe = value["recipe"]
            if "kind" not in recipe and value.get("kind") in ("pretrain", "finetune"):
                return {**value, "recipe": {"kind": value["kind"], **recipe}}
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.kind == "pretrain") != isinstance(self.recipe, AnyPretrain):
            raise ValueError(f"kind is {self.kind}, the recipe's kind is {self.recipe.kind}")
        if self.kind == "pretrain" and self.parent is not None:
            raise ValueError("pretraining starts from nothing: parent must be absent")
        require_trained_here(self.recipe)
        return self


def require_trained_here(recipe: AnyRecipe) -> None:
    """Refuse a recipe of what the service does not hold.

    Raises:
        ValueError: Several channels, places in scans, weights from a file.
    """
    if isinstance(recipe, AnyPretrain):
        if recipe.method.name == "imagenet":
            raise ValueError(
                "imagenet takes its weights from a file; use `python -m trainer pretrain`"
            )
        return
    if len(recipe.channels) > 1:
        raise ValueError(
            f"a volume here is one image, the recipe reads {len(recipe.channels)}; "
            "use `python -m trainer finetune`"
        )
    if isinstance(recipe, ClassifyRecipe) and recipe.crop == "centre":
        raise ValueError(
            "classes here are of whole scans: crop must be `whole`; for places in scans use "
            "`python -m trainer finetune`"
        )


class Progress(Answer):
    """How far a run is."""

    stage: str = ""
    step: int | None = None
    total: int | None = None
    fraction: float | None = None
    eta_s: float | None = None


class RunError(Answer):
    """Why a run failed."""

    code: str
    detail: str


class ModelPointer(Answer):
    """One version of a model, by name and by content."""

    name: str
    version: int
    digest: Sha256


class Run(Answer):
    """One execution of a recipe or of an inference."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"run_{HEX}",
                    "kind": "pretrain",
                    "state": "running",
                    "dataset_id": f"ds_{HEX}",
                    "volume_id": None,
                    "model_name": "abdomen-encoder",
                    "parent": None,
                    "parent_digest": None,
                    "recipe": {"kind": "pretrain", "num_steps": 1000},
                    "model": None,
                    "progress": {"stage": "train", "step": 10, "total": 1000, "fraction": 0.01},
                    "result": None,
                    "error": None,
                    "attempt": 1,
                    "created_at": TIME,
                    "started_at": TIME,
                    "finished_at": None,
                }
            ]
        },
    )

    id: RunId
    kind: Literal["pretrain", "finetune", "segment", "embed", "check", "import"]
    state: State
    dataset_id: DatasetId | None
    volume_id: VolumeId | None
    model_name: str | None = Field(description="Of training: what the result is registered as.")
    parent: str | None = Field(description="Of training: as it was asked for.")
    parent_digest: Sha256 | None = None
    recipe: dict[str, Any] | None
    model: ModelPointer | None = Field(description="Used (inference) or made (training).")
    progress: Progress | None
    result: dict[str, Any] | None
    error: RunError | None
    attempt: int
    priority: int = 0
    requires: Requires = Requires()
    queue_position: int | None = Field(
        None, description="While one run that waits is asked for: its turn comes so many claims on."
    )
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class RunPage(Page[Run]):
    """Part of a listing of runs."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(Run))


class MetricPoint(Answer):
    """One value of a metric."""

    name: str
    step: int
    value: float


class RunMetrics(Answer):
    """The curves of a run, by name and step."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={"examples": [{"points": [{"name": "loss", "step": 10, "value": 1.25}]}]},
    )

    points: tuple[MetricPoint, ...]


class RunFile(Answer):
    """A file that a training left."""

    name: str
    media_type: str
    sha256: Sha256


class RunFiles(Answer):
    """The files of a training, by name."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {"files": [{"name": "preview-500.png", "media_type": "image/png", "sha256": SHA}]}
            ]
        },
    )

    files: tuple[RunFile, ...]


class Event(Answer):
    """Something that happened in a run."""

    id: int = Field(description="Sequence number; ask for later ones with `after`.")
    type: str = Field(description="`state`, `progress`, `metric` or `log`")
    data: dict[str, Any]
    created_at: datetime


class Events(Answer):
    """What happened in a run, in order."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {
                            "id": 7,
                            "type": "state",
                            "data": {"state": "running"},
                            "created_at": TIME,
                        }
                    ]
                }
            ]
        },
    )

    events: tuple[Event, ...]
