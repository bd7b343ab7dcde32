"""What the steps of a run take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from service.db import (
    RunKind,
)

Outcome = Literal[
    "done", "error", "oom", "crash", "canceled", "preempted", "lost", "stalled", "fenced"
]


class Fenced(Exception):  # noqa: N818  # reads as what happened
    """The run is no longer this worker's: stop, and write nothing."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"run {run_id} is no longer held by this worker")


@dataclass(frozen=True, slots=True)
class Lease:
    """A claimed run: what to do, and the fence that every write must carry."""

    run_id: str
    project_id: str
    fence: int
    attempt: int
    kind: RunKind
    spec: dict[str, Any]
    dataset_id: str | None
    volume_id: str | None
    worker: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class Beat:
    """Answer to a heartbeat."""

    alive: bool
    """False: the run was taken back or has ended; stop at once."""
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class NewArtifact:
    """A file of the run that lies in the store and is recorded when the run finishes."""

    name: str
    sha256: str
    size: int
    media_type: str


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A bundle in the store that becomes a model version when the run finishes."""

    name: str
    kind: str
    digest: str
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of a metric."""

    name: str
    step: int
    value: float
