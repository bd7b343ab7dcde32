"""What a run is and where it can be."""

from __future__ import annotations

import uuid
from enum import StrEnum


class RunState(StrEnum):
    """Where a run is."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    CANCELING = "canceling"
    INTERRUPTED = "interrupted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELED})
CLAIMABLE = frozenset({RunState.QUEUED, RunState.INTERRUPTED})
HELD = frozenset({RunState.STARTING, RunState.RUNNING, RunState.CANCELING})


class RunKind(StrEnum):
    """What a run does."""

    PRETRAIN = "pretrain"
    FINETUNE = "finetune"
    SEGMENT = "segment"
    EMBED = "embed"
    CHECK = "check"
    IMPORT = "import"


QUEUE_OF = {
    RunKind.PRETRAIN: "train",
    RunKind.FINETUNE: "train",
    RunKind.SEGMENT: "inference",
    RunKind.EMBED: "inference",
    RunKind.CHECK: "inference",
    RunKind.IMPORT: "inference",
}
ID_PREFIX_OF = {
    RunKind.PRETRAIN: "run",
    RunKind.FINETUNE: "run",
    RunKind.SEGMENT: "seg",
    RunKind.EMBED: "emb",
    RunKind.CHECK: "chk",
    RunKind.IMPORT: "imp",
}


def new_id(prefix: str) -> str:
    """An opaque id such as ``vol_1f0c...``."""
    return f"{prefix}_{uuid.uuid4().hex}"
