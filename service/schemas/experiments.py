"""Experiments: what is compared, how far it is, and what has become of each training."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from models.experiment.plan import MAX_CELLS, Budget, Finetune, Method, Plan, Ratio, Seed
from service.schemas.base import (
    HEX,
    TIME,
    Answer,
    Ask,
    DatasetId,
    ExperimentId,
    Page,
    RunId,
    State,
    Title,
    page_of,
)
from service.schemas.runs import Progress, RunError, require_trained_here

CellState = State | Literal["waiting"]
_METHODS: list[JsonValue] = [
    {"name": "pcrl", "pretrain": {"kind": "pretrain", "network": {"kind": "unet3d"}}},
    {"name": "scratch", "pretrain": None},
]
_FINETUNE: dict[str, JsonValue] = {"kind": "finetune", "labels": {"liver": 1}, "num_steps": 5000}
_NETWORK_2D: dict[str, JsonValue] = {"kind": "resnet18_unet2d"}
MAX_METHODS = 32


class ExperimentCreate(Ask):
    """A comparison of pretrainings by what is fine-tuned from them."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "What PCRL buys for the liver",
                    "source_dataset_id": f"ds_{HEX}",
                    "target_dataset_id": f"ds_{HEX}",
                    "methods": _METHODS,
                    "finetune": _FINETUNE,
                    "ratios": [0.1, 0.2, 0.5, 1.0],
                    "seeds": [0, 1, 2],
                    "budget": {"pretrain_steps": 20000, "finetune_steps": 5000},
                },
                {
                    "name": "What PCRL buys for chest films",
                    "source_dataset_id": f"ds_{HEX}",
                    "target_dataset_id": f"ds_{HEX}",
                    "methods": [
                        {"name": "pcrl", "pretrain": {"kind": "pretrain", "network": _NETWORK_2D}},
                        {"name": "scratch", "pretrain": None},
                    ],
                    "finetune": {
                        "kind": "classify",
                        "network": _NETWORK_2D,
                        "labels": ["nodule", "effusion"],
                    },
                },
            ]
        },
    )

    name: Title
    source_dataset_id: DatasetId = Field(description="Its train split is pretrained on.")
    target_dataset_id: DatasetId = Field(
        description="Its labelled train split is fine-tuned on, its test split judges."
    )
    methods: Annotated[tuple[Method, ...], Field(min_length=1, max_length=MAX_METHODS)] = Field(
        description="The first is the one in question, compared with every other."
    )
    finetune: Finetune = Field(description="Segmentation (`finetune`) or `classify`.")
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=32)] = (0.1, 0.2, 0.5, 1.0)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=32)] = (0, 1, 2)
    pretrain_per: Literal["seed", "method"] = "seed"
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _served_here(self) -> Self:
        _require_trained_here(self.methods)
        require_trained_here(self.finetune)
        self.plan()
        return self

    def plan(self) -> Plan:
        """The plan of it."""
        fields = ("methods", "finetune", "ratios", "seeds", "pretrain_per", "budget")
        return Plan.model_validate({name: getattr(self, name) for name in fields})


class ExperimentExtend(Ask):
    """More of an experiment; what is done stays."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={"examples": [{"seeds": [3, 4], "retry": False}]},
    )

    methods: Annotated[tuple[Method, ...], Field(max_length=MAX_METHODS)] = ()
    ratios: Annotated[tuple[Ratio, ...], Field(max_length=32)] = ()
    seeds: Annotated[tuple[Seed, ...], Field(max_length=32)] = ()
    retry: bool = Field(
        False, description="Do what failed or was canceled again; a canceled experiment goes on."
    )

    @model_validator(mode="after")
    def _served_here(self) -> Self:
        _require_trained_here(self.methods)
        return self


class Experiment(Answer):
    """An experiment; its state is that of its trainings."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"exp_{HEX}",
                    "name": "What PCRL buys for the liver",
                    "source_dataset_id": f"ds_{HEX}",
                    "target_dataset_id": f"ds_{HEX}",
                    "plan": {"methods": _METHODS, "finetune": _FINETUNE, "ratios": [0.1]},
                    "state": "running",
                    "num_trainings": 9,
                    "counts": {"waiting": 3, "queued": 4, "running": 1, "succeeded": 1},
                    "fraction": 0.1111,
                    "canceled_at": None,
                    "created_at": TIME,
                    "finished_at": None,
                }
            ]
        },
    )

    id: ExperimentId
    name: str
    source_dataset_id: DatasetId
    target_dataset_id: DatasetId
    plan: dict[str, Any] = Field(description="Every field, also those that were not given.")
    state: Literal["running", "succeeded", "failed", "canceled"] = Field(
        description="Once all trainings have ended: `canceled` if any was, else `failed` if any "
        "failed. The report is of those that succeeded."
    )
    num_trainings: int = Field(description=f"At most {MAX_CELLS}.")
    counts: dict[CellState, int] = Field(
        description="Trainings in each state; `waiting` for a pretraining to end."
    )
    fraction: float = Field(description="Of the trainings that have ended.")
    canceled_at: datetime | None
    created_at: datetime
    finished_at: datetime | None


class ExperimentPage(Page[Experiment]):
    """Part of a listing of experiments."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(Experiment))


class ExperimentCell(Answer):
    """One training of an experiment."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "key": "finetune/pcrl/10%/0",
                    "kind": "finetune",
                    "method": "pcrl",
                    "ratio": 0.1,
                    "seed": 0,
                    "state": "queued",
                    "run_id": f"run_{HEX}",
                    "tries": 1,
                    "progress": None,
                    "error": None,
                }
            ]
        },
    )

    key: str
    kind: Literal["pretrain", "finetune"]
    method: str
    ratio: float | None
    seed: int | None
    state: CellState
    run_id: RunId | None
    tries: int
    progress: Progress | None
    error: RunError | None


class ExperimentCells(Answer):
    """Every training of an experiment, in the order in which they are queued."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(ExperimentCell))

    items: tuple[ExperimentCell, ...]


def _require_trained_here(methods: tuple[Method, ...]) -> None:
    for method in methods:
        if method.pretrain is not None:
            require_trained_here(method.pretrain)
