"""Datasets: volumes with labels, split by subject."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import ConfigDict, Field

from service.schemas.base import (
    HEX,
    SHA,
    TIME,
    Answer,
    Ask,
    DatasetId,
    Page,
    Sha256,
    Split,
    Title,
    VolumeId,
    page_of,
)


class DatasetItemCreate(Ask):
    """A volume of a new dataset."""

    volume_id: VolumeId
    labels_id: VolumeId | None = None
    split: Split | None = Field(None, description="Of its subject; drawn by `split` if absent.")


class SplitCreate(Ask):
    """How subjects are drawn into splits: shares of the number of subjects, scaled to sum to 1."""

    train: Annotated[float, Field(ge=0.0, le=1.0)] = 0.7
    val: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    test: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class DatasetCreate(Ask):
    """A new dataset: immutable once made."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "Liver CT",
                    "items": [
                        {
                            "volume_id": f"vol_{HEX}",
                            "labels_id": f"vol_{HEX[::-1]}",
                            "split": "train",
                        }
                    ],
                }
            ]
        },
    )

    name: Title
    items: Annotated[tuple[DatasetItemCreate, ...], Field(min_length=1, max_length=10_000)]
    split: SplitCreate | None = None


class DatasetItem(Answer):
    """A volume of a dataset."""

    volume_id: VolumeId
    labels_id: VolumeId | None
    subject: str
    split: Split


class DatasetSummary(Answer):
    """A dataset without its items."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"ds_{HEX}",
                    "name": "Liver CT",
                    "digest": SHA,
                    "created_at": TIME,
                }
            ]
        },
    )

    id: DatasetId
    name: str
    digest: Sha256 = Field(description="Of the volumes, labels, subjects and splits.")
    created_at: datetime


class Dataset(DatasetSummary):
    """An immutable list of volumes with labels and a split by subject."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"ds_{HEX}",
                    "name": "Liver CT",
                    "digest": SHA,
                    "created_at": TIME,
                    "items": [
                        {
                            "volume_id": f"vol_{HEX}",
                            "labels_id": None,
                            "subject": "subject-001",
                            "split": "train",
                        }
                    ],
                }
            ]
        },
    )

    items: tuple[DatasetItem, ...]


class DatasetPage(Page[DatasetSummary]):
    """Part of a listing of datasets."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(DatasetSummary))
