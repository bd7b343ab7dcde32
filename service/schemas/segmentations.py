"""Segmentations: what is asked, what was found, how it was certified."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, StrictBool, model_validator
from pydantic.config import JsonDict

from service.formats import DEFAULT_FORMATS, DicomFormat, MaskFormat
from service.schemas.base import (
    HEX,
    IDENTITY,
    SHA,
    Answer,
    Matrix,
    Page,
    SegmentationId,
    Sha256,
    Size,
    page_of,
)
from service.schemas.certainty import (
    Axis,
    CascadePasses,
    OutOfDistribution,
    QualityFlag,
    Uncertainty,
)
from service.schemas.inference import INFERENCE, OOD, Inference, InferenceCreate, Preflight, Ran

AXES: tuple[Axis, ...] = ("i", "j", "k")


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
                    **INFERENCE,
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
                        "ood": OOD,
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
