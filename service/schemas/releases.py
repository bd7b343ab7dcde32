"""What makes a version live: moves of aliases, the gate's golden cases, checks."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from service.schemas.base import (
    HEX,
    SHA,
    TIME,
    Answer,
    Ask,
    Page,
    RunId,
    Sha256,
    State,
    VolumeId,
    page_of,
)

CaseName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,99}$", examples=["case-1"])]


class AliasMove(Answer):
    """One move of an alias."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": 7,
                    "alias": "champion",
                    "version": 1,
                    "cause": "set",
                    "set_by": "tok_1",
                    "override_reason": None,
                    "unmet": [],
                    "created_at": TIME,
                }
            ]
        },
    )

    id: int
    alias: str
    version: int | None = Field(description="Null: the alias was removed.")
    cause: Literal["set", "rollback", "remove"]
    set_by: str = Field(description="Id of the token.")
    override_reason: str | None = Field(description="Why an admin moved it against the gate.")
    unmet: tuple[str, ...] = Field(description="The gate's checks that were overridden.")
    created_at: datetime


class AliasMoves(Page[AliasMove]):
    """Part of an alias' history."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(AliasMove))


class GoldenLabel(Ask):
    """A label of a golden case."""

    name: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        description="As in the model's manifest."
    )
    value: Annotated[int, Field(ge=1, le=255)] = Field(description="In the expected mask.")
    min_dice: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95


class GoldenCaseSet(Ask):
    """A scan and its answer: a label volume (segmenter), or a vector (encoder)."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "volume_id": f"vol_{HEX}",
                    "labels_id": f"vol_{HEX}",
                    "labels": [{"name": "liver", "value": 1, "min_dice": 0.95}],
                },
                {"volume_id": f"vol_{HEX}", "vector": [0.6, 0.8], "min_cosine": 0.999},
            ]
        },
    )

    volume_id: VolumeId
    labels_id: VolumeId | None = None
    labels: Annotated[tuple[GoldenLabel, ...], Field(max_length=255)] = ()
    vector: Annotated[
        tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(max_length=8192)
    ] = ()
    min_cosine: Annotated[float, Field(gt=0.0, le=1.0)] = 0.999

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if (self.labels_id is None) == (not self.vector):
            raise ValueError("give either labels_id with labels, or vector")
        if (self.labels_id is None) != (not self.labels):
            raise ValueError("labels_id and labels belong together")
        if len({label.name for label in self.labels}) != len(self.labels):
            raise ValueError("a label stands there twice")
        if self.vector and not any(self.vector):
            raise ValueError("the vector is zero, which has no direction")
        return self


class GoldenCase(Answer):
    """A golden case of a model."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "name": "case-1",
                    "volume_id": f"vol_{HEX}",
                    "labels_id": f"vol_{HEX}",
                    "expected": {"labels": [{"name": "liver", "value": 1, "min_dice": 0.95}]},
                    "updated_at": TIME,
                }
            ]
        },
    )

    name: str
    volume_id: VolumeId
    labels_id: VolumeId | None
    expected: dict[str, Any]
    updated_at: datetime


class GoldenCases(Page[GoldenCase]):
    """All golden cases of a model, by name; they fit one page."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(GoldenCase))


class VersionCheck(Answer):
    """A check of a version on the golden cases."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"chk_{HEX}",
                    "state": "succeeded",
                    "passed": True,
                    "is_current": True,
                    "golden_digest": SHA,
                    "cases": [{"name": "case-1", "dice": {"liver": 0.97}, "passed": True}],
                    "error": None,
                    "created_at": TIME,
                }
            ]
        },
    )

    id: RunId
    state: State
    passed: bool = Field(description="It ended, reproduced every case, and no case has changed.")
    is_current: bool = Field(description="Whether the cases are still those that it ran on.")
    golden_digest: Sha256
    cases: tuple[dict[str, Any], ...]
    error: dict[str, Any] | None
    created_at: datetime


class VersionChecks(Page[VersionCheck]):
    """The newest checks of a version."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(VersionCheck))
