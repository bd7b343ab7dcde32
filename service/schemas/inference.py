"""Segmentations, embeddings, and the search for similar cases."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, StrictBool, model_validator
from pydantic.config import JsonDict

from service.formats import DEFAULT_FORMATS, DicomFormat, MaskFormat
from service.schemas.base import (
    HEX,
    IDENTITY,
    SHA,
    TIME,
    Answer,
    Ask,
    EmbeddingId,
    Matrix,
    ModelReference,
    Page,
    SegmentationId,
    Sha256,
    Size,
    State,
    VolumeId,
    VolumeKind,
    page_of,
)
from service.schemas.certainty import (
    Axis,
    CascadePasses,
    OutOfDistribution,
    QualityFlag,
    Uncertainty,
)
from service.schemas.runs import ModelPointer, Progress, RunError

AXES: tuple[Axis, ...] = ("i", "j", "k")


class InferenceCreate(Ask):
    """A model to run on a volume."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [{"volume_id": f"vol_{HEX}", "model": "models:/liver-tumour@champion"}]
        },
    )

    volume_id: VolumeId
    model: ModelReference


class SegmentationCreate(InferenceCreate):
    """A segmenter to run on a volume, and what shall be made of the mask."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"volume_id": f"vol_{HEX}", "model": "models:/liver-tumour@champion"},
                {
                    "volume_id": f"vol_{HEX}",
                    "model": "models:/liver-tumour@champion",
                    "formats": ["dicom-seg", "dicom-sr", "rtstruct"],
                },
                {
                    "volume_id": f"vol_{HEX}",
                    "model": "models:/liver-tumour@champion",
                    "flips": ["i"],
                    "uncertainty": True,
                },
            ]
        },
    )

    formats: Annotated[tuple[DicomFormat, ...], Field(max_length=3)] = Field(
        DEFAULT_FORMATS,
        description="Made beside the NIfTI mask where the scan was sent as DICOM.",
    )
    flips: StrictBool | Annotated[tuple[Axis, ...], Field(max_length=3)] = Field(
        False,
        description="Mean of the probabilities over the scan's mirror images along these axes of "
        "RAS+, and all combinations of them: 2, 4 or 8 times the work. `true` is all three.",
    )
    uncertainty: bool = Field(
        False, description="Also make a map of the entropy, `GET .../uncertainty`."
    )

    @property
    def flip_axes(self) -> tuple[Axis, ...]:
        """The axes, in order."""
        if isinstance(self.flips, bool):
            return AXES if self.flips else ()
        return tuple(axis for axis in AXES if axis in self.flips)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.formats)) != len(self.formats):
            raise ValueError("a format stands there twice")
        if not isinstance(self.flips, bool) and len(set(self.flips)) != len(self.flips):
            raise ValueError("an axis stands there twice")
        return self


class Inference(Answer):
    """What a segmentation and an embedding have in common."""

    state: State
    volume_id: VolumeId
    model: ModelPointer
    progress: Progress | None
    error: RunError | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


_INFERENCE: JsonDict = {
    "state": "succeeded",
    "volume_id": f"vol_{HEX}",
    "model": {"name": "liver-tumour", "version": 1, "digest": SHA},
    "progress": None,
    "error": None,
    "created_at": TIME,
    "started_at": TIME,
    "finished_at": TIME,
}


_OOD: JsonDict = {
    "score": 0.021,
    "threshold": 0.034,
    "is_out": False,
    "n_reference": 92,
    "reason": None,
}
_CERTIFICATE: JsonDict = {
    "format": "nifti",
    "readers": ["imaging.geometry (NIfTI-1 header by its bytes)", "SimpleITK 2.5.7"],
    "shape": [512, 512, 78],
    "affine": IDENTITY,
    "mapping": "identity",
    "max_corner_error_mm": 0.00001,
    "num_labelled": 46800,
    "voxels": {"liver": 46400, "tumour": 400},
    "sha256": SHA,
}


class LabelFound(Answer):
    """How much of a label was found."""

    name: str
    value: int = Field(description="In the mask.")
    voxels: int
    volume_ml: float


class Lesion(Answer):
    """One connected component of a label."""

    voxels: int
    volume_ml: float
    longest_mm: float = Field(
        description="Greatest distance between two points of its voxels, in any direction."
    )
    centroid_mm: tuple[float, float, float] = Field(description="RAS+, in mm.")


class Lesions(Answer):
    """The connected components of a label."""

    num: int
    largest: tuple[Lesion, ...] = Field(description="At most 100, the largest first.")


class Certificate(Answer):
    """What was measured when the file was read back by readers that did not write it."""

    format: MaskFormat = "nifti"
    readers: tuple[str, ...] = Field((), description="Names and versions.")
    shape: Size = Field(description="Of the grid of the scan as sent.")
    affine: Matrix | None = Field(None, description="Of that grid; voxel to RAS+, mm.")
    mapping: Literal["identity", "nearest"] = Field(
        "identity",
        description="`nearest` where the scan was resampled: each pixel of a source slice has the "
        "label of the nearest voxel.",
    )
    max_corner_error_mm: float = Field(description="Below 0.001, or there is no result.")
    num_labelled: int | None = Field(None, description="Voxels that are not background.")
    voxels: dict[str, int] = Field(
        default_factory=dict, description="Found in the file for each label."
    )
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _sum_up(self) -> Self:
        if self.num_labelled is None:
            object.__setattr__(self, "num_labelled", sum(self.voxels.values()))
        return self


class ResultFile(Answer):
    """A file of the result; download it with `format`."""

    format: MaskFormat
    media_type: str
    sha256: Sha256
    size_bytes: int
    certificate: Certificate | None = Field(
        None, description="Null for the report: it has no mask."
    )
    notes: tuple[str, ...] = Field(
        (), description="What it states otherwise than the source, and why."
    )


class NotMade(Answer):
    """A format that was asked for and that there is not."""

    format: MaskFormat
    code: str = Field(
        description="`source_not_dicom`, `nothing_found` (no label has a voxel), "
        "`source_header_unusable`, `source_not_found`, `source_not_kept` or `result_not_written`."
    )
    detail: str


class Preflight(Answer):
    """What the segmentation was expected to take, before it began."""

    predicted_bytes: int = Field(description="Memory beside the loaded model; an upper bound.")
    available_bytes: int | None = Field(description="Null where nothing told.")
    predicted_s: float
    degraded: tuple[Literal["smaller_batch", "smaller_windows", "column_blocks"], ...] = Field(
        (), description="What was given up so that it fits."
    )


class Ran(Answer):
    """What ran on the scan, and how."""

    bundle_digest: Sha256 | None = Field(None, description="Of the model's files.")
    provider: str | None = Field(None, description="Of onnxruntime, as it really was.")
    precision: str | None = Field(None, description="Of the network, `float32` or `float16`.")
    model_was_resident: bool | None = Field(
        None, description="False: the request waited for the model to be loaded."
    )
    fell_back_from: str | None = Field(
        None, description="The provider that was asked for, where the CPU stood in."
    )
    retried_after: str | None = Field(
        None, description="The lack of memory after which windows were done one by one."
    )


class SegmentationResult(Ran):
    """What was found; the mask and the preview are files of their own."""

    labels: tuple[LabelFound, ...] = ()
    volumes_ml: dict[str, float]
    voxels: dict[str, int]
    lesions: dict[str, Lesions] = Field(
        default_factory=dict,
        description="Of each label that the model's `postprocess` wants counted.",
    )
    removed_voxels: dict[str, int] = Field(
        default_factory=dict,
        description="Of each label: outside of the largest component, now background. Empty "
        "where the model asks for no clean-up.",
    )
    filled_voxels: dict[str, int] = Field(
        default_factory=dict, description="Of each label: holes, which were background."
    )
    num_windows: int | None = Field(
        None, description="Of all passes; a window counts once for each of its mirror images."
    )
    flips: tuple[Axis, ...] = Field((), description="Axes of the mirror images.")
    cascade: CascadePasses | None = Field(
        None, description="Null for a model that looks at a scan in one pass."
    )
    uncertainty: Uncertainty | None = None
    quality: QualityFlag | None = None
    ood: OutOfDistribution | None = Field(None, description="Null in results of before there was.")
    preflight: Preflight | None = None
    certificate: Certificate | None = Field(None, description="Of the NIfTI mask.")
    files: tuple[ResultFile, ...] = ()
    not_made: tuple[NotMade, ...] = ()
    timings_s: dict[str, float]


class Segmentation(Inference):
    """A mask for a volume."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"seg_{HEX}",
                    **_INFERENCE,
                    "result": {
                        "labels": [
                            {"name": "liver", "value": 1, "voxels": 46400, "volume_ml": 1450.2}
                        ],
                        "volumes_ml": {"liver": 1450.2, "tumour": 12.5},
                        "voxels": {"liver": 46400, "tumour": 400},
                        "lesions": {
                            "tumour": {
                                "num": 1,
                                "largest": [
                                    {
                                        "voxels": 400,
                                        "volume_ml": 12.5,
                                        "longest_mm": 31.4,
                                        "centroid_mm": [61.2, -14.0, 1033.5],
                                    }
                                ],
                            }
                        },
                        "removed_voxels": {"liver": 211, "tumour": 12},
                        "filled_voxels": {"liver": 8, "tumour": 0},
                        "num_windows": 24,
                        "flips": [],
                        "cascade": {
                            "organ": "liver",
                            "coarse_voxels": [90, 90, 75],
                            "organ_ml": 1502.7,
                            "box_voxels": [152, 131, 118],
                            "num_windows": {"coarse": 4, "fine": 20},
                            "fallback": None,
                            "is_cut": False,
                        },
                        "uncertainty": {
                            "mean_foreground_entropy": 0.061,
                            "label_entropies": {"liver": 0.058, "tumour": 0.34},
                            "map": None,
                        },
                        "quality": {
                            "flag": "ok",
                            "reasons": [],
                            "max_foreground_entropy": 0.11,
                        },
                        "bundle_digest": SHA,
                        "ood": _OOD,
                        "provider": "CPUExecutionProvider",
                        "precision": "float32",
                        "model_was_resident": True,
                        "certificate": _CERTIFICATE,
                        "files": [
                            {
                                "format": "nifti",
                                "media_type": "application/gzip",
                                "sha256": SHA,
                                "size_bytes": 52142,
                                "certificate": _CERTIFICATE,
                                "notes": [],
                            }
                        ],
                        "not_made": [
                            {
                                "format": "dicom-seg",
                                "code": "source_not_dicom",
                                "detail": "the scan was sent as nifti",
                            }
                        ],
                        "timings_s": {"model": 1.5},
                    },
                }
            ]
        },
    )

    id: SegmentationId
    result: SegmentationResult | None


class SegmentationPage(Page[Segmentation]):
    """Part of a listing of segmentations."""

    model_config = ConfigDict(frozen=True, json_schema_extra=page_of(Segmentation))


class EmbeddingResult(Ran):
    """The vector, of unit length."""

    vector: tuple[float, ...]
    num_windows: int
    ood: OutOfDistribution | None = Field(None, description="Null in results of before there was.")
    timings_s: dict[str, float]


class Embedding(Inference):
    """A vector for a volume."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"emb_{HEX}",
                    **_INFERENCE,
                    "result": {
                        "vector": [0.6, 0.8],
                        "num_windows": 12,
                        "ood": _OOD,
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
    num_compared: int = Field(description="Vectors that passed the filters.")
    items: tuple[SimilarCase, ...]
