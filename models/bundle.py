"""A model on disk: a folder with the network, a manifest and a card.

The files are `model.onnx`, `manifest.json`, `card.md`, for models trained here
`weights.safetensors` (what fine-tuning starts from) and perhaps `model.float16.onnx`, and for a
cascade of two networks `coarse.onnx` (what finds the organ). `reference.npy` holds the training
scans' embeddings, from which a scan's distance is measured (`models.reference`).

The manifest names the SHA-256 of every other file, and the bundle's digest is the manifest's own
SHA-256, so one hash pins everything. A bundle is written to a temporary folder and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from models.recipe import (
    Part,
    Postprocess,
    Preprocessing,
    Preprocessing2d,
    Recipe,
    Size,
    Size2d,
    SpacingMm,
)

MANIFEST = "manifest.json"
MODEL = "model.onnx"
COARSE = "coarse.onnx"
MODEL_FLOAT16 = "model.float16.onnx"
"""The same network with float16 inside; its inputs and outputs stay float32."""
WEIGHTS = "weights.safetensors"
REFERENCE = "reference.npy"
CARD = "card.md"
FEATURES = "features"
"""Output of a segmenter beside its logits: its bottleneck pooled over the window, (B, E)."""
FEATURE_MAP = "feature_map"
"""Output of an encoder beside its embedding: what that is the mean of, (B, E, i, j, k)."""
FEATURE_STRIDE = 8
"""Voxels along an axis of a cell of the feature map."""


class BundleError(Exception):
    """A model that cannot be used: the operator's error, with a stable code."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class TensorSpec(Part):
    """An ONNX input or output; a string in `shape` names a free dimension."""

    name: str
    dtype: Literal["float32", "float16", "uint8", "int64"] = "float32"
    shape: tuple[int | str, ...]


class Parity(Part):
    """How far onnxruntime is from torch on the same input, per kind of input."""

    input_kind: Literal["random", "real"]
    shape: tuple[int, ...]
    provider: str
    max_abs_difference: float
    tolerance: float
    argmax_agreement: float | None = None
    embedding_cosine: float | None = None
    precision: Literal["float32", "float16"] = "float32"
    """Of the network that onnxruntime ran; torch's is float32."""
    passed: bool


class Metric(Part):
    """A measured value with the number of cases behind it."""

    value: float
    n: int
    split: Literal["train", "val", "test"] = "val"


class Lineage(Part):
    """Where a model comes from."""

    run_id: str | None = None
    dataset_digest: str
    """SHA-256 over the training scans and their split."""
    parent_digest: str | None = None
    loaded_keys: tuple[str, ...] = ()
    skipped_keys: tuple[str, ...] = ()
    """Keys of the parent that the network did not take, or took no value for."""
    seed: int
    num_steps: int
    code_version: str
    torch_version: str


class CoarseNetwork(Part):
    """The network in `coarse.onnx`, a segmenter with softmax, and how it wants a scan."""

    bundle_digest: str
    """Of the bundle that it was taken from."""
    labels: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing
    patch_size: Size
    overlap: float = Field(0.5, ge=0.0, lt=1.0)
    parity: tuple[Parity, ...]


class Cascade(Part):
    """Two passes: an organ at low resolution, then its box at full (`models.cascade`)."""

    organ: str
    """A label of the coarse network: what is looked for."""
    parts: tuple[str, ...] = ()
    """Labels that lie in the organ and count as it."""
    margin_mm: float = Field(ge=0.0, le=500.0)
    """Around the organ's box, on each side."""
    coarse_spacing_mm: SpacingMm
    min_organ_ml: float = Field(1.0, ge=0.0)
    """An organ smaller than this counts as not found."""
    fine_digest: str
    """Of the bundle whose network makes the mask."""
    coarse: CoarseNetwork | None = None
    """None: the model itself looks for the organ, at the coarse spacing."""


class Quality(Part):
    """When a result is to be reviewed, from the scans that judged the training.

    See `models.uncertainty.calibrated`.
    """

    max_foreground_entropy: float = Field(ge=0.0, le=1.0)
    """A scan whose mean entropy where a label wins is above this is to be reviewed."""
    min_dice: float = Field(ge=0.0, le=1.0)
    """Mean Dice from which on a scan counted as segmented well."""
    num_cases: int
    num_good: int
    """Scans that were looked at, and those segmented well."""
    split: Literal["train", "val"]


class Reference(Part):
    """What scans are held against to tell whether they are like those of training.

    `models.ood` has the definitions, `reference.npy` the embeddings.
    """

    num_scans: int = Field(ge=0)
    """Training scans with an embedding in the file; where too few for a threshold, those looked at,
    and there is no file."""
    dims: int = Field(ge=0)
    """E, the numbers of an embedding."""
    method: Literal["cosine", "mahalanobis"] = "cosine"
    """How distances are measured; manifests of before say nothing, and mean the cosine."""
    num_neighbours: int = Field(ge=0)
    """Of `cosine`; else 0."""
    threshold: float | None = Field(ge=0.0)
    """Distance from which on a scan is out; None: too few scans."""
    quantile: float = Field(ge=0.0, le=1.0)
    space: Literal["embedding", "features"]
    """Of an encoder: what it is served for. Of a segmenter: its output `features`."""

    @property
    def has_file(self) -> bool:
        """Whether `reference.npy` is in the bundle."""
        return self.threshold is not None


class Manifest(Part):
    """Everything a server must know about a model."""

    schema_version: Literal[1] = 1
    kind: Literal["encoder", "segmenter", "classifier"]
    labels: tuple[str, ...] = ()
    """Names in the order of the output: a classifier's labels, a segmenter's classes (after
    background where `activation` is softmax)."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """What makes probabilities of the logits: softmax where labels exclude each other, sigmoid
    where several may hold."""
    channels: tuple[str, ...] = ("image",)
    """Names of the input's channels, in order."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing | Preprocessing2d
    patch_size: Size | Size2d
    overlap: float = Field(0.5, ge=0.0, lt=1.0)
    postprocess: Postprocess = Postprocess()
    """What a segmenter's mask goes through before it leaves."""
    cascade: Cascade | None = None
    """How a segmenter finds the part of a scan that it looks at; None: it looks at all of it."""
    quality: Quality | None = None
    """Of a segmenter: when to flag its result. None where nothing was measured."""
    reference: Reference | None = None
    """The training scans' embeddings. None for a model that came without, and for a cascade."""
    recipe: Recipe
    lineage: Lineage
    metrics: dict[str, Metric] = Field(default_factory=dict)
    parity: tuple[Parity, ...]
    created_at: datetime
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every file of the bundle but the manifest; filled by `save`."""
    intended_use: Literal["research use only; not a medical device"] = (
        "research use only; not a medical device"
    )

    @model_validator(mode="after")
    def _known_labels(self) -> Self:
        self.postprocess.require(self.labels)
        if self.cascade is not None:
            if self.kind != "segmenter":
                raise ValueError(f"a model of kind {self.kind} has no cascade")
            coarse = self.cascade.coarse
            labels = self.labels if coarse is None else coarse.labels
            if unknown := {self.cascade.organ, *self.cascade.parts} - set(labels):
                raise ValueError(f"cascade names what labels does not: {sorted(unknown)}")
        return self


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, manifest: Manifest, files: dict[str, Path], card: str) -> str:
    """Publish a bundle at `folder` by rename.

    Args:
        folder: Where the bundle will be; must not exist.
        manifest: Its manifest; `files` in it is replaced.
        files: The files to put in, by name in the bundle (`model.onnx` at least); copied.
        card: Text of the model card, Markdown.

    Returns:
        The bundle's digest.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".bundle-", dir=folder.parent))
    try:
        for name, source in files.items():
            shutil.copyfile(source, draft / name)
        (draft / CARD).write_text(card, encoding="utf-8")
        digests = {path.name: sha256_of(path) for path in sorted(draft.iterdir())}
        complete = manifest.model_copy(update={"files": digests})
        (draft / MANIFEST).write_text(complete.model_dump_json(indent=2), encoding="utf-8")
        for path in draft.iterdir():
            _fsync(path)
        draft.chmod(0o755)
        draft.rename(folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return sha256_of(folder / MANIFEST)


def load(folder: Path, *, verify: bool = True) -> Manifest:
    """Read a bundle's manifest and, unless told otherwise, check every file's digest.

    Raises:
        BundleError: `bundle_invalid` (no or unknown manifest), `bundle_corrupt` (a file is
            missing or differs from its digest).
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise BundleError("bundle_invalid", f"no {MANIFEST} in the bundle") from None
    except ValidationError as error:
        raise BundleError("bundle_invalid", f"{MANIFEST}: {error.error_count()} errors") from error
    if MODEL not in manifest.files or any(Path(name).name != name for name in manifest.files):
        raise BundleError("bundle_invalid", f"{MANIFEST}: files must be plain names, {MODEL} too")
    has_coarse = manifest.cascade is not None and manifest.cascade.coarse is not None
    if has_coarse != (COARSE in manifest.files):
        raise BundleError("bundle_invalid", f"{MANIFEST}: cascade and {COARSE} do not go together")
    has_reference = manifest.reference is not None and manifest.reference.has_file
    if has_reference != (REFERENCE in manifest.files):
        raise BundleError(
            "bundle_invalid", f"{MANIFEST}: reference and {REFERENCE} do not go together"
        )
    if verify:
        for name, expected in manifest.files.items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != expected:
                raise BundleError("bundle_corrupt", f"{name} is missing or not what was saved")
    return manifest


def digest_of(folder: Path) -> str:
    """The bundle's digest: SHA-256 of its manifest."""
    return sha256_of(folder / MANIFEST)


def onnx_metadata(manifest: Manifest) -> dict[str, str]:
    """The manifest's facts that serving depends on, as they stand in the ONNX file's metadata.

    The exporter writes them; a session refuses a file whose statements differ.
    """
    spec = manifest.preprocessing
    facts = {
        "kind": manifest.kind,
        "labels": ",".join(manifest.labels),
        "activation": manifest.activation,
        "channels": ",".join(manifest.channels),
        "intensity": spec.intensity.model_dump_json(),
        "patch_size": ",".join(str(size) for size in manifest.patch_size),
    }
    if manifest.postprocess != Postprocess():
        facts["postprocess"] = manifest.postprocess.model_dump_json()
    if manifest.cascade is not None:
        facts["cascade"] = manifest.cascade.model_dump_json(exclude={"coarse"})
    if manifest.quality is not None:
        facts["quality"] = manifest.quality.model_dump_json()
    if isinstance(spec, Preprocessing2d):
        normalisation = "" if spec.normalisation is None else spec.normalisation.model_dump_json()
        return {**facts, "size": str(spec.size), "normalisation": normalisation}
    spacing = ",".join(f"{size:g}" for size in spec.spacing_mm)
    return {**facts, "orientation": spec.orientation, "spacing_mm": spacing}


def coarse_manifest(manifest: Manifest) -> Manifest:
    """How the coarse pass of a cascade wants a scan, as the manifest of a model of its own.

    Raises:
        BundleError: `wrong_model_kind`, the model is no cascade.
    """
    cascade = manifest.cascade
    if cascade is None:
        raise BundleError("wrong_model_kind", "the model is no cascade")
    update: dict[str, object] = {"cascade": None, "quality": None, "postprocess": Postprocess()}
    update["reference"] = None  # of whole scans at another spacing
    if cascade.coarse is None:
        spec, _ = volume_input(manifest)
        update["preprocessing"] = spec.model_copy(update={"spacing_mm": cascade.coarse_spacing_mm})
    else:
        shared = CoarseNetwork.model_fields.keys() & Manifest.model_fields.keys()
        update |= {name: getattr(cascade.coarse, name) for name in shared}
    return manifest.model_copy(update=update)


def volume_input(manifest: Manifest) -> tuple[Preprocessing, Size]:
    """How a model that reads volumes wants them: preprocessing, and extent of a window.

    Raises:
        BundleError: `wrong_model_kind`, the model reads 2D images.
    """
    spec, patch = manifest.preprocessing, manifest.patch_size
    if isinstance(spec, Preprocessing2d) or len(patch) == 2:
        raise BundleError("wrong_model_kind", "the model reads 2D images, and a scan is a volume")
    return spec, patch


def image_input(manifest: Manifest) -> Preprocessing2d:
    """How a model that reads 2D images wants them.

    Raises:
        BundleError: `wrong_model_kind`, the model reads volumes.
    """
    if not isinstance(manifest.preprocessing, Preprocessing2d):
        raise BundleError("wrong_model_kind", "the model reads volumes, and this is a 2D image")
    return manifest.preprocessing


def features_of(manifest: Manifest) -> TensorSpec | None:
    """The output with a segmenter's features; None where it has none, or is another model."""
    if manifest.kind != "segmenter":
        return None
    found = [one for one in manifest.outputs[1:] if one.name == FEATURES and len(one.shape) == 2]
    return found[0] if found else None


def feature_map_of(manifest: Manifest) -> TensorSpec | None:
    """The output with an encoder's feature map; None where it has none, or is another model."""
    if manifest.kind != "encoder":
        return None
    found = [one for one in manifest.outputs[1:] if one.name == FEATURE_MAP and len(one.shape) == 5]
    return found[0] if found else None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
