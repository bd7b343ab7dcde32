"""The service itself: health, readiness, capabilities."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from service.schemas.base import Answer


class Health(Answer):
    """The process answers."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"examples": [{"status": "ok"}]})

    status: Literal["ok"] = "ok"


class Check(Answer):
    """One thing that readiness needs."""

    check: str
    result: Literal["ok", "failed"]
    detail: str = ""


class Readiness(Answer):
    """Whether the service can do its work now; 503 where it cannot."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [{"status": "ok", "checks": [{"check": "database", "result": "ok"}]}]
        },
    )

    status: Literal["ok", "failed"]
    checks: tuple[Check, ...]


class Capabilities(Answer):
    """What this service can do."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "version": "0.1.0",
                    "role": "researcher",
                    "project": "prj_default",
                    "run_kinds": ["pretrain", "finetune"],
                    "max_upload_bytes": 4294967296,
                    "max_wait_s": 30.0,
                    "intended_use": "research use only; not a medical device",
                }
            ]
        },
    )

    version: str
    role: str
    project: str = Field(description="Id of the project that the request acts in.")
    run_kinds: tuple[str, ...]
    max_upload_bytes: int
    max_wait_s: float
    intended_use: str
