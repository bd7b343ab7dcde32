"""Datasets: scans with labels or classes, split by subject."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from models.recipe import LabelName
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

MAX_ITEMS = 10_000
MAX_CLASSES = 100
"""Of one scan; CheXpert has 14."""


class DatasetItemCreate(Ask):
    """A volume or a 2D image of a new dataset."""

    volume_id: VolumeId
    labels_id: VolumeId | None = None
    classes: (
        Annotated[dict[LabelName, Literal[0, 1] | None], Field(max_length=MAX_CLASSES)] | None
    ) = Field(
        None,
        description="What is known of the whole scan, for classification: 1 or 0 for each class; "
        "null, or a class that is not named, is not known.",
    )
    split: Split | None = Field(None, description="Of its subject; drawn by `split` if absent.")


class SplitCreate(Ask):
    """How subjects are drawn into splits: shares of the number of subjects, scaled to sum to 1."""

    train: Annotated[float, Field(ge=0.0, le=1.0)] = 0.7
    val: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    test: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class DatasetCreate(Ask):
    """A new dataset: immutable once made; of volumes or of 2D images, as its first item is."""

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
                },
                {
                    "name": "Chest films",
                    "items": [
                        {
                            "volume_id": f"vol_{HEX}",
                            "classes": {"nodule": 1, "effusion": 0, "mass": None},
                        }
                    ],
                },
            ]
        },
    )

    name: Title
    items: Annotated[tuple[DatasetItemCreate, ...], Field(min_length=1, max_length=MAX_ITEMS)]
    split: SplitCreate | None = None


class DatasetItem(Answer):
    """A volume or a 2D image of a dataset."""

    volume_id: VolumeId
    labels_id: VolumeId | None
    classes: dict[str, int] | None = Field(None, description="1 or 0 for each class that is known.")
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
    digest: Sha256 = Field(description="Of the scans, labels, classes, subjects and splits.")
    created_at: datetime


class Dataset(DatasetSummary):
    """An immutable list of scans with labels or classes and a split by subject."""

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
                            "classes": {"nodule": 1, "effusion": 0},
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
