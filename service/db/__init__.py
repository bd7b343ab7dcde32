"""The tables. The database is the truth: a run's row is its queue entry, its lease and its record.

Times are UTC and, where they decide anything (leases, publication), the database's own clock.
Run states: queued -> starting -> running -> succeeded | failed | canceled, with `canceling` (asked
to stop) and `interrupted` (lost its worker; will resume by itself). Terminal states never change.
"""

from service.db.access import Idempotency, Token
from service.db.base import Base, UtcDateTime, db_now
from service.db.connection import Cursor, Page, Row, connect, insert_if_absent, page, sessions
from service.db.experiments import Experiment, ExperimentCell
from service.db.horizon import settled_before
from service.db.models import (
    AliasEvent,
    GoldenCase,
    Model,
    ModelAlias,
    ModelVersion,
    VersionCheck,
    WarmModel,
    WarmRequest,
)
from service.db.projects import DEFAULT_PROJECT, Project
from service.db.scans import Blob, Dataset, DatasetItem, Upload, Volume
from service.db.scope import everywhere, of_project, project_of, within
from service.db.states import (
    CLAIMABLE,
    HELD,
    ID_PREFIX_OF,
    QUEUE_OF,
    TERMINAL,
    RunKind,
    RunState,
    new_id,
)
from service.db.vectors import Embedding, EmbeddingChange, EmbeddingSpace
from service.db.work import Artifact, Batch, BatchItem, Run, RunAttempt, RunEvent, WorkerHeartbeat

__all__ = [
    "CLAIMABLE",
    "DEFAULT_PROJECT",
    "HELD",
    "ID_PREFIX_OF",
    "QUEUE_OF",
    "TERMINAL",
    "AliasEvent",
    "Artifact",
    "Base",
    "Batch",
    "BatchItem",
    "Blob",
    "Cursor",
    "Dataset",
    "DatasetItem",
    "Embedding",
    "EmbeddingChange",
    "EmbeddingSpace",
    "Experiment",
    "ExperimentCell",
    "GoldenCase",
    "Idempotency",
    "Model",
    "ModelAlias",
    "ModelVersion",
    "Page",
    "Project",
    "Row",
    "Run",
    "RunAttempt",
    "RunEvent",
    "RunKind",
    "RunState",
    "Token",
    "Upload",
    "UtcDateTime",
    "VersionCheck",
    "Volume",
    "WarmModel",
    "WarmRequest",
    "WorkerHeartbeat",
    "connect",
    "db_now",
    "everywhere",
    "insert_if_absent",
    "new_id",
    "of_project",
    "page",
    "project_of",
    "sessions",
    "settled_before",
    "within",
]
