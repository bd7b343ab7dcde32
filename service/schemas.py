"""What the REST API takes and gives, as frozen pydantic models.

Requests refuse fields they do not know. Times are RFC 3339 in UTC, sizes in voxels, spacing in mm,
arrays in (I, J, K) order of RAS+ unless the field says `source`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict, JsonValue

from models.recipe import FinetuneRecipe, PretrainRecipe
from service.formats import DEFAULT_FORMATS, DicomFormat, MaskFormat

_HEX = "0123456789abcdef" * 2
_SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_TIME = "2026-11-24T04:12:00Z"

VolumeId = Annotated[str, Field(pattern=r"^vol_[0-9a-f]{32}$", examples=[f"vol_{_HEX}"])]
UploadId = Annotated[str, Field(pattern=r"^upl_[0-9a-f]{32}$", examples=[f"upl_{_HEX}"])]
DatasetId = Annotated[str, Field(pattern=r"^ds_[0-9a-f]{32}$", examples=[f"ds_{_HEX}"])]
RunId = Annotated[str, Field(pattern=r"^(run|seg|emb)_[0-9a-f]{32}$", examples=[f"run_{_HEX}"])]
SegmentationId = Annotated[str, Field(pattern=r"^seg_[0-9a-f]{32}$", examples=[f"seg_{_HEX}"])]
EmbeddingId = Annotated[str, Field(pattern=r"^emb_[0-9a-f]{32}$", examples=[f"emb_{_HEX}"])]
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
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", examples=[_SHA])]
VolumeKind = Literal["image", "labels"]
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
Matrix = Annotated[tuple[tuple[float, float, float, float], ...], Field(min_length=4, max_length=4)]
_IDENTITY: list[JsonValue] = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


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


def _page_of(model: type[Answer]) -> JsonDict:
    """The example of a page: the example of its item."""
    extra = model.model_config["json_schema_extra"]
    assert isinstance(extra, dict)
    examples = extra["examples"]
    assert isinstance(examples, list)
    return {"examples": [{"items": [examples[0]], "next_page_token": None}]}


# Problems


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


# Volumes


class SkippedMember(Answer):
    """A member of an archive that did not become part of the volume, and why."""

    member: int
    reason: str
    sop_uid: str = Field("", description="SOP instance UID; empty where there is none.")


class Volume(Answer):
    """One scan, or one label volume."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"vol_{_HEX}",
                    "kind": "image",
                    "subject": "subject-001",
                    "modality": "CT",
                    "format": "dicom",
                    "shape": [128, 128, 60],
                    "spacing_mm": [2.5, 2.5, 5.0],
                    "affine": _IDENTITY,
                    "source_shape": [128, 128, 60],
                    "source_affine": _IDENTITY,
                    "sha256": _SHA,
                    "size_bytes": 1234567,
                    "skipped": [],
                    "num_used": 60,
                    "notes": [],
                    "created_at": _TIME,
                }
            ]
        },
    )

    id: VolumeId
    kind: VolumeKind
    subject: str
    modality: str
    format: str
    shape: Size
    spacing_mm: tuple[float, float, float]
    affine: Matrix = Field(description="Voxel to RAS+, mm.")
    source_shape: Size
    source_affine: Matrix = Field(description="Of the file as it was sent; voxel to RAS+, mm.")
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

    model_config = ConfigDict(frozen=True, json_schema_extra=_page_of(Volume))


class UploadCreate(Ask):
    """A scan that will come in pieces."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [{"size_bytes": 268435456, "sha256": _SHA, "subject": "subject-001"}]
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
                    "id": f"upl_{_HEX}",
                    "state": "open",
                    "size_bytes": 268435456,
                    "offset_bytes": 8388608,
                    "chunk_bytes": 8388608,
                    "sha256": _SHA,
                    "kind": "image",
                    "subject": "subject-001",
                    "series_uid": None,
                    "volume_id": None,
                    "created_at": _TIME,
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


# Datasets


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
                            "volume_id": f"vol_{_HEX}",
                            "labels_id": f"vol_{_HEX[::-1]}",
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
                    "id": f"ds_{_HEX}",
                    "name": "Liver CT",
                    "digest": _SHA,
                    "created_at": _TIME,
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
                    "id": f"ds_{_HEX}",
                    "name": "Liver CT",
                    "digest": _SHA,
                    "created_at": _TIME,
                    "items": [
                        {
                            "volume_id": f"vol_{_HEX}",
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

    model_config = ConfigDict(frozen=True, json_schema_extra=_page_of(DatasetSummary))


# Runs


class RunCreate(Ask):
    """A training to do. `recipe.kind` may be left out; it is `kind`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "kind": "pretrain",
                    "dataset_id": f"ds_{_HEX}",
                    "model_name": "abdomen-encoder",
                    "recipe": {"kind": "pretrain", "num_steps": 1000, "batch_size": 8},
                },
                {
                    "kind": "finetune",
                    "dataset_id": f"ds_{_HEX}",
                    "model_name": "liver-tumour",
                    "parent": "models:/abdomen-encoder@latest",
                    "recipe": {"kind": "finetune", "labels": {"liver": 1, "tumour": 2}},
                },
            ]
        },
    )

    kind: Literal["pretrain", "finetune"]
    dataset_id: DatasetId
    recipe: Annotated[PretrainRecipe | FinetuneRecipe, Field(discriminator="kind")]
    parent: ModelReference | None = Field(
        None, description="Of fine-tuning, what it starts from: an encoder, or the run of one."
    )
    model_name: ModelName = Field(description="The model that the result becomes a version of.")

    @model_validator(mode="before")
    @classmethod
    def _recipe_of_the_run(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("recipe"), dict):
            recipe = value["recipe"]
            if "kind" not in recipe and value.get("kind") in ("pretrain", "finetune"):
                return {**value, "recipe": {"kind": value["kind"], **recipe}}
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.recipe.kind != self.kind:
            raise ValueError(f"kind is {self.kind}, the recipe's kind is {self.recipe.kind}")
        if self.kind == "pretrain" and self.parent is not None:
            raise ValueError("pretraining starts from nothing: parent must be absent")
        if isinstance(self.recipe, FinetuneRecipe) and len(self.recipe.channels) > 1:
            raise ValueError(
                f"a volume here is one image, the recipe reads {len(self.recipe.channels)}; "
                "use `python -m trainer finetune`"
            )
        return self


class Progress(Answer):
    """How far a run is."""

    stage: str = ""
    step: int | None = None
    total: int | None = None
    fraction: float | None = None
    eta_s: float | None = None


class RunError(Answer):
    """Why a run failed."""

    code: str
    detail: str


class ModelPointer(Answer):
    """One version of a model, by name and by content."""

    name: str
    version: int
    digest: Sha256


class Run(Answer):
    """One execution of a recipe or of an inference."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"run_{_HEX}",
                    "kind": "pretrain",
                    "state": "running",
                    "dataset_id": f"ds_{_HEX}",
                    "volume_id": None,
                    "model_name": "abdomen-encoder",
                    "parent": None,
                    "parent_digest": None,
                    "recipe": {"kind": "pretrain", "num_steps": 1000},
                    "model": None,
                    "progress": {"stage": "train", "step": 10, "total": 1000, "fraction": 0.01},
                    "result": None,
                    "error": None,
                    "attempt": 1,
                    "created_at": _TIME,
                    "started_at": _TIME,
                    "finished_at": None,
                }
            ]
        },
    )

    id: RunId
    kind: Literal["pretrain", "finetune", "segment", "embed"]
    state: State
    dataset_id: DatasetId | None
    volume_id: VolumeId | None
    model_name: str | None = Field(description="Of training: what the result is registered as.")
    parent: str | None = Field(description="Of training: as it was asked for.")
    parent_digest: Sha256 | None = None
    recipe: dict[str, Any] | None
    model: ModelPointer | None = Field(description="Used (inference) or made (training).")
    progress: Progress | None
    result: dict[str, Any] | None
    error: RunError | None
    attempt: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class RunPage(Page[Run]):
    """Part of a listing of runs."""

    model_config = ConfigDict(frozen=True, json_schema_extra=_page_of(Run))


class MetricPoint(Answer):
    """One value of a metric."""

    name: str
    step: int
    value: float


class RunMetrics(Answer):
    """The curves of a run, by name and step."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={"examples": [{"points": [{"name": "loss", "step": 10, "value": 1.25}]}]},
    )

    points: tuple[MetricPoint, ...]


class Event(Answer):
    """Something that happened in a run."""

    id: int = Field(description="Sequence number; ask for later ones with `after`.")
    type: str = Field(description="`state`, `progress`, `metric` or `log`")
    data: dict[str, Any]
    created_at: datetime


class Events(Answer):
    """What happened in a run, in order."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {
                            "id": 7,
                            "type": "state",
                            "data": {"state": "running"},
                            "created_at": _TIME,
                        }
                    ]
                }
            ]
        },
    )

    events: tuple[Event, ...]


# Models


class Alias(Answer):
    """A movable name for a version."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [{"alias": "champion", "version": 1, "revision": 1, "updated_at": _TIME}]
        },
    )

    alias: str
    version: int
    revision: int = Field(description="Counts every move; the ETag.")
    updated_at: datetime


class AliasSet(Ask):
    """Where an alias shall point."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra={"examples": [{"version": 1}]}
    )

    version: Version


class ModelVersion(Answer):
    """One bundle under a model's name."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "name": "liver-tumour",
                    "version": 1,
                    "digest": _SHA,
                    "kind": "segmenter",
                    "run_id": f"run_{_HEX}",
                    "manifest": {"kind": "segmenter", "labels": ["liver", "tumour"]},
                    "created_at": _TIME,
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
                    "created_at": _TIME,
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
                    "created_at": _TIME,
                    "versions": [
                        {
                            "version": 1,
                            "digest": _SHA,
                            "run_id": f"run_{_HEX}",
                            "created_at": _TIME,
                        }
                    ],
                    "aliases": [
                        {"alias": "champion", "version": 1, "revision": 1, "updated_at": _TIME}
                    ],
                }
            ]
        },
    )

    versions: tuple[VersionSummary, ...]
    aliases: tuple[Alias, ...]


class ModelPage(Page[ModelSummary]):
    """Part of a listing of models."""

    model_config = ConfigDict(frozen=True, json_schema_extra=_page_of(ModelSummary))


# Inference


class InferenceCreate(Ask):
    """A model to run on a volume."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "examples": [{"volume_id": f"vol_{_HEX}", "model": "models:/liver-tumour@champion"}]
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
                {"volume_id": f"vol_{_HEX}", "model": "models:/liver-tumour@champion"},
                {
                    "volume_id": f"vol_{_HEX}",
                    "model": "models:/liver-tumour@champion",
                    "formats": ["dicom-seg", "dicom-sr", "rtstruct"],
                },
            ]
        },
    )

    formats: Annotated[tuple[DicomFormat, ...], Field(max_length=3)] = Field(
        DEFAULT_FORMATS,
        description="Made beside the NIfTI mask where the scan was sent as DICOM.",
    )

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.formats)) != len(self.formats):
            raise ValueError("a format stands there twice")
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
    "volume_id": f"vol_{_HEX}",
    "model": {"name": "liver-tumour", "version": 1, "digest": _SHA},
    "progress": None,
    "error": None,
    "created_at": _TIME,
    "started_at": _TIME,
    "finished_at": _TIME,
}


_CERTIFICATE: JsonDict = {
    "format": "nifti",
    "readers": ["imaging.geometry (NIfTI-1 header by its bytes)", "SimpleITK 2.5.7"],
    "shape": [512, 512, 78],
    "affine": _IDENTITY,
    "mapping": "identity",
    "max_corner_error_mm": 0.00001,
    "num_labelled": 46800,
    "voxels": {"liver": 46400, "tumour": 400},
    "sha256": _SHA,
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
        "`source_header_unusable`, `source_not_found` or `result_not_written`."
    )
    detail: str


class SegmentationResult(Answer):
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
    num_windows: int | None = None
    provider: str | None = Field(None, description="Of onnxruntime, as it really was.")
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
                    "id": f"seg_{_HEX}",
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
                        "provider": "CPUExecutionProvider",
                        "certificate": _CERTIFICATE,
                        "files": [
                            {
                                "format": "nifti",
                                "media_type": "application/gzip",
                                "sha256": _SHA,
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

    model_config = ConfigDict(frozen=True, json_schema_extra=_page_of(Segmentation))


class EmbeddingResult(Answer):
    """The vector, of unit length."""

    vector: tuple[float, ...]
    num_windows: int
    provider: str | None = Field(None, description="Of onnxruntime, as it really was.")
    timings_s: dict[str, float]


class Embedding(Inference):
    """A vector for a volume."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "id": f"emb_{_HEX}",
                    **_INFERENCE,
                    "result": {
                        "vector": [0.6, 0.8],
                        "num_windows": 12,
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

    model_config = ConfigDict(frozen=True, json_schema_extra=_page_of(Embedding))


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
                    "volume_id": f"vol_{_HEX}",
                    "model": "models:/abdomen-encoder@champion",
                    "limit": 5,
                    "filters": {"modality": "CT", "exclude_same_subject": True},
                },
                {"embedding_id": f"emb_{_HEX}"},
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
                    "model": {"name": "abdomen-encoder", "version": 1, "digest": _SHA},
                    "num_compared": 1200,
                    "items": [
                        {
                            "rank": 1,
                            "volume_id": f"vol_{_HEX}",
                            "embedding_id": f"emb_{_HEX}",
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


# The service itself


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
    run_kinds: tuple[str, ...]
    max_upload_bytes: int
    max_wait_s: float
    intended_use: str
