"""Models, their versions and aliases."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from service.schemas.base import HEX, SHA, TIME, Answer, Ask, Page, RunId, Sha256, Version, page_of


class Alias(Answer):
    """A movable name for a version."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [{"alias": "champion", "version": 1, "revision": 1, "updated_at": TIME}]
        },
    )

    alias: str
    version: int
    revision: int | None = Field(description="Counts every move; the ETag. Null of a past state.")
    updated_at: datetime


class AliasSet(Ask):
    """Where an alias shall point."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"examples": [{"version": 1}]}
    )

    version: Version
    override_reason: Annotated[str, Field(min_length=10, max_length=500)] | None = Field(
        None, description="Of an admin: why the version goes live though the gate refuses it."
    )


class ModelVersion(Answer):
    """One bundle under a model's name."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "name": "liver-tumour",
                    "version": 1,
                    "digest": SHA,
                    "kind": "segmenter",
                    "run_id": f"run_{HEX}",
                    "manifest": {"kind": "segmenter", "labels": ["liver", "tumour"]},
                    "created_at": TIME,
                }
            ]
        },
    )

    name: str
    version: int
    digest: Sha256
    kind: Literal["encoder", "segmenter", "classifier"]
    run_id: RunId | None
    manifest: dict[str, Any]
    created_at: datetime


class VersionSummary(Answer):
    """A version without its manifest."""

    version: int
    digest: Sha256
    run_id: RunId | None
    created_at: datetime


class ModelSummary(Answer):
    """A registered model without its versions."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "name": "liver-tumour",
                    "kind": "segmenter",
                    "created_at": TIME,
                }
            ]
        },
    )

    name: str
    kind: Literal["encoder", "segmenter", "classifier"]
    created_at: datetime


class Model(ModelSummary):
    """A registered model with its versions and aliases."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "name": "liver-tumour",
                    "kind": "segmenter",
                    "created_at": TIME,
                    "versions": [
                        {
                            "version": 1,
                            "digest": SHA,
                            "run_id": f"run_{HEX}",
                            "created_at": TIME,
                        }
                    ],
                    "aliases": [
                        {"alias": "champion", "version": 1, "revision": 1, "updated_at": TIME}
                    ],
                }
            ]
        },
    )

    versions: tuple[VersionSummary, ...]
    aliases: tuple[Alias, ...]


class ModelPage(Page[ModelSummary]):
    """Part of a listing of models."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(ModelSummary))
