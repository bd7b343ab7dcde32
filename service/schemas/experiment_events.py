"""Following an experiment: its trainings' changes of state, and how far the whole is."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict, Field, JsonValue

from service.schemas.base import HEX, TIME, Answer, RunId, State
from service.schemas.experiments import CellState
from service.schemas.runs import Progress, RunError

StageName = Literal["pretrain", "finetune"]
_TRAINING: dict[str, JsonValue] = {
    "id": 7,
    "key": "pretrain/pcrl/0",
    "run_id": f"run_{HEX}",
    "state": "running",
    "attempt": 1,
    "error": None,
    "created_at": TIME,
}
_PROGRESS: dict[str, JsonValue] = {
    "state": "running",
    "stage": "pretrain",
    "stages": {
        "pretrain": {"num_trainings": 3, "num_ended": 1},
        "finetune": {"num_trainings": 6, "num_ended": 0},
    },
    "num_trainings": 9,
    "num_ended": 1,
    "fraction": 0.1111,
    "counts": {"waiting": 3, "queued": 4, "running": 1, "succeeded": 1},
    "running": [
        {
            "key": "pretrain/pcrl/0",
            "run_id": f"run_{HEX}",
            "state": "running",
            "progress": {"stage": "pretrain", "step": 10, "total": 1000, "fraction": 0.01},
        }
    ],
    "finished_at": None,
}


class ExperimentTraining(Answer):
    """A training of an experiment changed its state."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [_TRAINING]})

    id: int = Field(description="The event's number among all runs; told again, it is the same.")
    key: str
    run_id: RunId
    state: State
    attempt: int
    error: RunError | None
    created_at: datetime


class StageProgress(Answer):
    """How far one stage of an experiment is."""

    num_trainings: int
    num_ended: int


class RunningTraining(Answer):
    """A training that a worker holds."""

    key: str
    run_id: RunId
    state: State
    progress: Progress | None


class ExperimentProgress(Answer):
    """How far an experiment is, as a whole."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [_PROGRESS]})

    state: Literal["running", "succeeded", "failed", "canceled"]
    stage: StageName | None = Field(
        description="The first stage that has not ended; trainings of a later one may run already."
    )
    stages: dict[StageName, StageProgress]
    num_trainings: int
    num_ended: int
    fraction: float = Field(description="Of the trainings that have ended.")
    counts: dict[CellState, int]
    running: tuple[RunningTraining, ...] = Field(description="What workers hold, by key.")
    finished_at: datetime | None


class ExperimentEvents(Answer):
    """What happened in an experiment, and how far it is."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [{"id": 7, "trainings": [_TRAINING], "progress": _PROGRESS}]
        },
    )

    id: int = Field(description="Ask with it as `after` for what is new.")
    trainings: tuple[ExperimentTraining, ...] = Field(
        description="Those of each training's newest run, in order. One that could not begin has "
        "none, and is told by `progress` alone."
    )
    progress: ExperimentProgress
