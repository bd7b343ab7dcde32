"""What every resource of the API shares: ids, pages, problems."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict, JsonValue

HEX = "0123456789abcdef" * 2
SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
TIME = "2026-11-24T04:12:00Z"

VolumeId = Annotated[str, Field(pattern=r"^vol_[0-9a-f]{32}$", examples=[f"vol_{HEX}"])]
UploadId = Annotated[str, Field(pattern=r"^upl_[0-9a-f]{32}$", examples=[f"upl_{HEX}"])]
DatasetId = Annotated[str, Field(pattern=r"^ds_[0-9a-f]{32}$", examples=[f"ds_{HEX}"])]
RunId = Annotated[
    str, Field(pattern=r"^(run|seg|emb|chk|imp)_[0-9a-f]{32}$", examples=[f"run_{HEX}"])
]
BatchId = Annotated[str, Field(pattern=r"^bat_[0-9a-f]{32}$", examples=[f"bat_{HEX}"])]
ExperimentId = Annotated[str, Field(pattern=r"^exp_[0-9a-f]{32}$", examples=[f"exp_{HEX}"])]
SegmentationId = Annotated[str, Field(pattern=r"^seg_[0-9a-f]{32}$", examples=[f"seg_{HEX}"])]
EmbeddingId = Annotated[str, Field(pattern=r"^emb_[0-9a-f]{32}$", examples=[f"emb_{HEX}"])]
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,99}$", examples=["liver-tumour"])]
AliasName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,99}$", examples=["champion"])]
Version = Annotated[int, Field(ge=1, lt=2**31, examples=[1])]
ModelReference = Annotated[
    str,
    Field(
        pattern=r"^(models:/)?[a-z0-9][a-z0-9_.-]{0,99}"
        r"(@[a-z0-9][a-z0-9_-]{0,99}|/([1-9][0-9]{0,8}|latest))?$",
        examples=["models:/liver-tumour@champion", "liver-tumour/1"],
    ),
]
Subject = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        examples=["subject-001"],
        description="A pseudonym of the patient, never a name or a hospital number.",
    ),
]
SeriesUid = Annotated[
    str, Field(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=64, examples=["1.2.826.0.1.3680043.8.1"])
]
Title = Annotated[
    str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$", examples=["Liver CT"])
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", examples=[SHA])]
VolumeKind = Literal["image", "labels", "image_2d"]
Split = Literal["train", "val", "test"]
State = Literal[
    "queued",
    "starting",
    "running",
    "canceling",
    "interrupted",
    "succeeded",
    "failed",
    "canceled",
]
Size = tuple[int, int, int]
Size2d = tuple[int, int]
Matrix = Annotated[tuple[tuple[float, float, float, float], ...], Field(min_length=4, max_length=4)]
IDENTITY: list[JsonValue] = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


class Answer(BaseModel):
    """Something the API gives."""

    model_config = ConfigDict(frozen=True)


class Ask(BaseModel):
    """Something the API takes: no field it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Item = TypeVar("Item", bound=Answer)


class Page(Answer, Generic[Item]):
    """Part of a listing, newest first."""

    items: tuple[Item, ...]
    next_page_token: str | None = Field(
        None, description="Ask again with this `page_token`; null on the last page."
    )


def page_of(model: type[Answer]) -> JsonDict:
    """The example of a page: the example of its item."""
    extra = model.model_config["json_schema_extra"]
    assert isinstance(extra, dict)
    examples = extra["examples"]
    assert isinstance(examples, list)
    return {"examples": [{"items": [examples[0]], "next_page_token": None}]}


class Finding(Answer):
    """One thing that is wrong with a request."""

    pointer: str = Field(description="Where: RFC 6901, below `/body`, `/query`, `/path`, `/header`")
    message: str


class Problem(Answer):
    """RFC 9457 problem details; `code` is stable, see docs/errors.md."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    errors: tuple[Finding, ...] | None = None
