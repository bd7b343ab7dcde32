"""Embeddings, and the search for similar cases."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from service.schemas.base import (
    HEX,
    SHA,
    Answer,
    Ask,
    EmbeddingId,
    ModelReference,
    Page,
    SegmentationId,
    VolumeId,
    VolumeKind,
    page_of,
)
from service.schemas.certainty import (
    OutOfDistribution,
)
from service.schemas.inference import INFERENCE, OOD, Inference, InferenceCreate, Preflight, Ran
from service.schemas.runs import ModelPointer

RegionName = Annotated[
    str, Field(max_length=200, description="Name of a label; empty is the whole volume.")
]


class EmbeddingCreate(InferenceCreate):
    """An encoder to run on a volume, and perhaps on regions of it: at most one source of them."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"volume_id": f"vol_{HEX}", "model": "models:/abdomen-encoder@champion"},
                {
                    "volume_id": f"vol_{HEX}",
                    "model": "abdomen-encoder/2",
                    "segmenter": "models:/liver-tumour@champion",
                },
            ]
        },
    )

    segmentation_id: SegmentationId | None = Field(
        None, description="Of the same volume: each of its labels is a region."
    )
    segmenter: ModelReference | None = Field(
        None, description="Run on the volume first: each of its labels is a region."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.segmentation_id is not None and self.segmenter is not None:
            raise ValueError("regions come from segmentation_id or from segmenter, not from both")
        return self


class RegionVector(Answer):
    """A region's vector, or why it has none."""

    region: RegionName
    vector: tuple[float, ...] | None = Field(description="Of unit length.")
    num_voxels: int = Field(description="Of the volume, with this label.")
    num_cells: float = Field(
        description="Its volume in cells of the encoder's feature map (8 voxels of the network's "
        "grid along each axis)."
    )
    reason: Literal["absent", "too_small", "nothing_seen"] | None = Field(
        description="Why there is no vector: no voxel has this label, it has less than one cell, "
        "or the encoder gives zeros wherever it lies."
    )


class EmbeddingResult(Ran):
    """The vector, of unit length."""

    vector: tuple[float, ...]
    regions: tuple[RegionVector, ...] = Field(
        (), description="One for each label, where regions were asked for."
    )
    segmentation_id: SegmentationId | None = Field(None, description="Where regions are from.")
    segmenter: ModelPointer | None = Field(None, description="What was run for the regions.")
    num_windows: int
    ood: OutOfDistribution | None = Field(None, description="Null in results of before there was.")
    preflight: Preflight | None = Field(None, description="Null in results of before there was.")
    timings_s: dict[str, float]


class Embedding(Inference):
    """A vector for a volume."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"emb_{HEX}",
                    **INFERENCE,
                    "result": {
                        "vector": [0.6, 0.8],
                        "num_windows": 12,
                        "ood": OOD,
                        "timings_s": {"model": 0.5},
                    },
                }
            ]
        },
    )

    id: EmbeddingId
    result: EmbeddingResult | None


class EmbeddingPage(Page[Embedding]):
    """Part of a listing of embeddings."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(Embedding))


class SearchFilters(Ask):
    """Which volumes are looked at."""

    modality: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Z0-9_ ]{0,16}$",
            examples=["CT"],
            description="Of DICOM; empty: of scans without one.",
        ),
    ] = None
    kind: VolumeKind | None = None
    exclude_same_subject: bool = Field(
        True,
        description="Leave out all volumes of the asked-for scan's own subject, it among them; "
        "without effect on a `vector`, which has none.",
    )


class EmbeddingSearch(Ask):
    """What shall be like what: exactly one of `volume_id`, `embedding_id` and `vector`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "volume_id": f"vol_{HEX}",
                    "model": "models:/abdomen-encoder@champion",
                    "limit": 5,
                    "filters": {"modality": "CT", "exclude_same_subject": True},
                },
                {"embedding_id": f"emb_{HEX}"},
                {"vector": [0.6, 0.8], "model": "abdomen-encoder/1", "limit": 20},
            ]
        },
    )

    volume_id: VolumeId | None = None
    embedding_id: EmbeddingId | None = None
    vector: Annotated[tuple[float, ...], Field(min_length=1, max_length=8192)] | None = Field(
        None, description="Of any length but zero."
    )
    model: ModelReference | None = Field(
        None,
        description="The encoder whose embeddings are compared; of an `embedding_id` it is its own "
        "and stays out.",
    )
    region: RegionName = Field(
        "", description="What is compared, of the asked-for scan and of all others."
    )
    limit: Annotated[int, Field(ge=1, le=100)] = 10
    filters: SearchFilters = SearchFilters()

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        given = [self.volume_id, self.embedding_id, self.vector]
        if sum(one is not None for one in given) != 1:
            raise ValueError("exactly one of volume_id, embedding_id and vector is needed")
        if (self.model is None) != (self.embedding_id is not None):
            raise ValueError("volume_id and vector need a model; embedding_id has its own")
        if self.vector is not None and not any(self.vector):
            raise ValueError("the vector is zero, which has no direction")
        return self


class SimilarCase(Answer):
    """A volume that is like the asked-for one."""

    rank: int = Field(description="From 1; of equal cosines the smaller volume id comes first.")
    volume_id: VolumeId
    embedding_id: EmbeddingId
    subject: str
    modality: str
    cosine: float = Field(ge=-1.0, le=1.0)


class SimilarCases(Answer):
    """The most alike first."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "model": {"name": "abdomen-encoder", "version": 1, "digest": SHA},
                    "region": "",
                    "num_compared": 1200,
                    "items": [
                        {
                            "rank": 1,
                            "volume_id": f"vol_{HEX}",
                            "embedding_id": f"emb_{HEX}",
                            "subject": "subject-002",
                            "modality": "CT",
                            "cosine": 0.9731,
                        }
                    ],
                }
            ]
        },
    )

    model: ModelPointer = Field(description="Whose vectors were compared, and no others.")
    region: RegionName
    num_compared: int = Field(description="Vectors that passed the filters.")
    items: tuple[SimilarCase, ...]
