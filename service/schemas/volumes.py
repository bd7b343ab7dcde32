"""Volumes, and uploads in pieces that become one."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from service.schemas.base import (
    HEX,
    IDENTITY,
    SHA,
    TIME,
    Answer,
    Ask,
    Matrix,
    Page,
    SeriesUid,
    Sha256,
    Size,
    Size2d,
    Subject,
    UploadId,
    VolumeId,
    VolumeKind,
    page_of,
)


class SkippedMember(Answer):
    """A member of an archive that did not become part of the volume, and why."""

    member: int
    reason: str
    sop_uid: str = Field("", description="SOP instance UID; empty where there is none.")


class Volume(Answer):
    """One scan, one label volume, or one 2D image (`kind`)."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"vol_{HEX}",
                    "kind": "image",
                    "subject": "subject-001",
                    "modality": "CT",
                    "format": "dicom",
                    "shape": [128, 128, 60],
                    "spacing_mm": [2.5, 2.5, 5.0],
                    "affine": IDENTITY,
                    "source_shape": [128, 128, 60],
                    "source_affine": IDENTITY,
                    "sha256": SHA,
                    "size_bytes": 1234567,
                    "skipped": [],
                    "num_used": 60,
                    "notes": [],
                    "created_at": TIME,
                },
                {
                    "id": f"vol_{HEX[::-1]}",
                    "kind": "image_2d",
                    "subject": "subject-002",
                    "modality": "DX",
                    "format": "dicom",
                    "shape": [2500, 2048],
                    "spacing_mm": None,
                    "affine": None,
                    "source_shape": [2500, 2048],
                    "source_affine": None,
                    "sha256": SHA,
                    "size_bytes": 5123456,
                    "skipped": [],
                    "num_used": 1,
                    "notes": ["windowed (LINEAR, centre 2048, width 4096)"],
                    "created_at": TIME,
                },
            ]
        },
    )

    id: VolumeId
    kind: VolumeKind = Field(
        description="`image` and `labels` are volumes; `image_2d` is one 2D image, without a "
        "geometry in mm."
    )
    subject: str
    modality: str
    format: str
    shape: Size | Size2d = Field(description="Along I, J and K; of a 2D image rows and columns.")
    spacing_mm: tuple[float, float, float] | None
    affine: Matrix | None = Field(description="Voxel to RAS+, mm.")
    source_shape: Size | Size2d
    source_affine: Matrix | None = Field(
        description="Of the file as it was sent; voxel to RAS+, mm."
    )
    sha256: Sha256 = Field(description="Of the kept file: what was sent, without identities.")
    size_bytes: int
    skipped: tuple[SkippedMember, ...] = Field(
        (), description="Archive members that were not read, by index."
    )
    num_used: int = Field(0, description="Members that the volume is made of: all the others.")
    notes: tuple[str, ...] = Field(
        (),
        description="What was decided or done: which of two affines was used, that a tilted series "
        "was resampled.",
    )
    created_at: datetime


class VolumePage(Page[Volume]):
    """Part of a listing of volumes."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(Volume))


class UploadCreate(Ask):
    """A file that will come in pieces."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [{"size_bytes": 268435456, "sha256": SHA, "subject": "subject-001"}]
        },
    )

    size_bytes: Annotated[int, Field(ge=1, lt=2**53, description="Of the whole file.")]
    sha256: Sha256 = Field(description="Of the whole file.")
    kind: VolumeKind = "image"
    subject: Subject | None = None
    series_uid: SeriesUid | None = Field(None, description="Which series of an archive.")


class Upload(Answer):
    """A scan that comes in pieces, and how far it has got."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"upl_{HEX}",
                    "state": "open",
                    "size_bytes": 268435456,
                    "offset_bytes": 8388608,
                    "chunk_bytes": 8388608,
                    "sha256": SHA,
                    "kind": "image",
                    "subject": "subject-001",
                    "series_uid": None,
                    "volume_id": None,
                    "created_at": TIME,
                    "expires_at": "2026-11-25T04:12:00Z",
                }
            ]
        },
    )

    id: UploadId
    state: Literal["open", "complete"]
    size_bytes: int
    offset_bytes: int = Field(description="Where the next piece begins: so much is on the disk.")
    chunk_bytes: int = Field(description="The most that one piece may hold.")
    sha256: Sha256
    kind: VolumeKind
    subject: str | None
    series_uid: str | None
    volume_id: VolumeId | None = Field(description="What it became.")
    created_at: datetime
    expires_at: datetime = Field(description="When it is forgotten, unless a piece comes before.")
