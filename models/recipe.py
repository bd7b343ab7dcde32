"""What a training job asks for.

Every number of the method is a field whose default is the paper's (Zhou et al., ICCV 2021; "P").
`method.preset` names another set of defaults (`models.presets`): it fills in the fields that were
not given, in `method`, `crops` and the recipe itself, so a validated recipe always says all.
A recipe is frozen, refuses unknown fields, and its `digest` names it in manifests and caches.

Axes are (I, J, K) in RAS+; sizes in voxels of the resampled grid, spacing in mm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from models import presets

Size = tuple[PositiveInt, PositiveInt, PositiveInt]
Size2d = tuple[PositiveInt, PositiveInt]
SpacingMm = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
TISSUE_HU = -150.0
"""Soft tissue lies above (P's LUNA rule)."""

LabelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
LabelValue = Annotated[int, Field(ge=1, le=255)]

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """Frozen, and no field it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Window(Part):
    """Intensities between two Hounsfield values, scaled to [0, 1] and clipped."""

    kind: Literal["window"] = "window"
    low_hu: float = -1000.0
    high_hu: float = 1000.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low_hu < self.high_hu:
            raise ValueError(f"low_hu {self.low_hu} must be below high_hu {self.high_hu}")
        return self


class ZScore(Part):
    """Zero mean and unit deviation over the non-zero voxels (MR)."""

    kind: Literal["zscore"] = "zscore"


class Preprocessing(Part):
    """From a volume in RAS+ to network input; stored in the bundle and used in serving too."""

    orientation: Literal["RAS"] = "RAS"
    spacing_mm: SpacingMm = (1.0, 1.0, 1.0)
    intensity: Annotated[Window | ZScore, Field(discriminator="kind")] = Window()


class OwnRange(Part):
    """Intensities between an image's own least and greatest value, scaled to [0, 1]."""

    kind: Literal["range"] = "range"


class Percentiles(Part):
    """Intensities between two percentiles of an image, scaled to [0, 1] and clipped."""

    kind: Literal["percentiles"] = "percentiles"
    low: Annotated[float, Field(ge=0.0, le=100.0)] = 0.5
    high: Annotated[float, Field(ge=0.0, le=100.0)] = 99.5

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class Normalisation(Part):
    """(x - mean) / std of red, green and blue in [0, 1]; the defaults are ImageNet's."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)


class Preprocessing2d(Part):
    """From a 2D image to network input; the image is stretched to a square."""

    size: Annotated[int, Field(ge=32, le=2048, multiple_of=32)] = 224
    """Rows and columns of the square: of what is kept for training, and of serving's input."""
    intensity: Annotated[OwnRange | Percentiles, Field(discriminator="kind")] = OwnRange()
    normalisation: Normalisation | None = Normalisation()
    """After the intensities lie in [0, 1]; None leaves them there."""


class UNet3d(Part):
    """The 3D U-Net of Models Genesis that P uses: four levels of two 3x3x3 convolutions."""

    kind: Literal["unet3d"] = "unet3d"
    base_width: Annotated[int, Field(ge=2, le=128)] = 32
    """Channels of the first convolution; P: 32. The bottleneck has 16 times as many."""

    @property
    def dims(self) -> Literal[2, 3]:
        """Spatial axes."""
        return 3

    @property
    def num_features(self) -> int:
        """Channels of the bottleneck."""
        return 16 * self.base_width


class ResNetUNet2d(Part):
    """The U-Net on a ResNet-18 that P uses on radiographs."""

    kind: Literal["resnet18_unet2d"] = "resnet18_unet2d"
    in_channels: Literal[3] = 3
    """Grey images are repeated, so that ImageNet's weights fit."""
    width: Annotated[int, Field(ge=4, le=128, multiple_of=4)] = 64
    """Channels of the first convolution; P: 64. The bottleneck has 8 times as many."""

    @property
    def dims(self) -> Literal[2, 3]:
        """Spatial axes."""
        return 2

    @property
    def num_features(self) -> int:
        """Channels of the bottleneck."""
        return 8 * self.width


Reconstruction = Literal["o", "m", "h", "mixup_o", "mixup_h"]
"""What is decoded: the ordinary, momentum and hybrid encoder, and two of the batch mixed with
itself (the official code's second pass)."""

Contrast = Literal["views", "mixup", "mixed_key"]
"""A pair that is contrasted: query and key; those of the batch mixed with itself; the mixed query
and the mix of the keys."""

Pushed = Literal["query", "key", "hybrid", "mixup_key", "mixed_key"]
"""An embedding that may enter the queue."""


class Pcrl(Part):
    """PCRL's own numbers; the defaults are P's (sections 3 and 7).

    Rows, traps and bugs are those of algorithms.md 1.2 and 1.4; docs/methods/pcrl.md lists every
    row with its value in each preset.
    """

    name: Literal["pcrl"] = "pcrl"
    preset: Literal["paper", "official", "recommended"] = "paper"
    """Where the values of fields come from that were not given."""
    embedding_size: PositiveInt = 128
    queue_size: PositiveInt = 16384
    temperature: PositiveFloat = 0.2
    ema_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    mix_alpha: PositiveFloat = 1.0
    """CrossMix draws lambda from Beta(alpha, alpha), one a step."""
    mix_fold: bool = False
    """Take the larger of lambda and 1 - lambda (row 7)."""
    crossmix: Literal["before_attention", "after_attention"] = "before_attention"
    """Mix, then attend to a third T, the hybrid's own; or mix what was attended to T_o and T_m, the
    target being the mix of the two transformed views (rows 5 and 6)."""
    contrast_weight: Annotated[float, Field(ge=0.0)] = 0.5
    reconstruction_weight: Annotated[float, Field(ge=0.0)] = 0.5
    attention: Literal["outer", "se"] = "outer"
    """TransAtt: `outer` is P's Eq. 1-3, `se` the official code's squeeze-and-excitation."""
    outer_rank: PositiveInt | None = None
    """Low-rank form of the C x C x C bilinear map of Eq. 2; None is the full map."""
    post_conv: bool = True
    """The 3x3x3 convolution after the gate (Eq. 4)."""
    projector_input: Literal["post", "pre"] = "post"
    """What the projector pools: features after TransAtt (P) or before it."""
    skip: bool = True
    """Skip connections into the decoder (row 8); without, it sees the bottleneck alone."""
    reconstructions: Annotated[tuple[Reconstruction, ...], Field(min_length=1)] = ("o", "m", "h")
    reconstruction_reduction: Literal["sum", "mean"] = "sum"
    """Over the reconstructions (row 17)."""
    target: Literal["clean", "corrupted"] = "clean"
    """T of the view before painting and blur, or after (row 10)."""
    contrast_loss: Literal["info_nce", "nce"] = "info_nce"
    """Softmax over the queue, or one binary decision a candidate (row 11)."""
    normaliser_momentum: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99
    """Of the average that is `nce`'s normaliser Z; 1 freezes it after the first batch, as the
    official code does (bug B1)."""
    contrasts: Annotated[tuple[Contrast, ...], Field(min_length=1)] = ("views",)
    """The terms of the contrastive loss, which is their mean (row 12)."""
    push: Annotated[tuple[Pushed, ...], Field(min_length=1)] = ("query", "key", "hybrid")
    """What enters the queue after a step, in this order (row 13)."""
    push_when: Literal["after_step", "each_term"] = "after_step"
    """With `each_term` a term's key is among the negatives of the step's later terms (bug B3)."""
    mask_same_scan: bool = False
    """Whether embeddings of a query's own scan are no negatives of it (trap B4)."""
    momentum_groups: PositiveInt = 4
    """Shuffled groups in which the momentum encoder normalises a batch (row 22; P had 4 GPUs).
    Fewer where a group would hold a single sample."""

    @property
    def has_mixup_pass(self) -> bool:
        """Whether the batch mixed with itself is encoded too."""
        return any("mix" in term for term in (*self.contrasts, *self.reconstructions))

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        return presets.filled(given, given.get("preset"), "method")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("reconstructions", "contrasts", "push"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names one thing twice: {', '.join(values)}")
        if self.outer_rank is not None and self.attention != "outer":
            raise ValueError(f"outer_rank belongs to attention 'outer', not {self.attention!r}")
        if self.contrast_weight == self.reconstruction_weight == 0:
            raise ValueError("contrast_weight and reconstruction_weight are both 0")
        self._check_mixup()
        return self

    def _check_mixup(self) -> None:
        contrasts = [term for term in self.contrasts if term != "views"]
        pushed = [name for name in self.push if name in ("mixup_key", "mixed_key")]
        if contrasts and self.projector_input == "post":
            raise ValueError(
                f"contrasts {contrasts} need projector_input 'pre': the pass over the mixed batch "
                "has no TransAtt to read after"
            )
        if pushed and not self.has_mixup_pass:
            raise ValueError(
                f"push names {pushed}, which only the pass over the mixed batch makes: name "
                "'mixup' or 'mixed_key' in contrasts, or leave them out"
            )
        if self.mask_same_scan and (contrasts or pushed):
            raise ValueError(
                "mask_same_scan needs embeddings of one scan each, and those of the mixed batch "
                f"are of two: leave {sorted({*contrasts, *pushed})} out of contrasts and push"
            )


class CropPairs(Part):
    """Two overlapping crops of a scan, resized to the input size (P section 7; rows 24-33)."""

    kind: Literal["crop_pairs"] = "crop_pairs"
    crop_sizes: Annotated[tuple[Size, ...], Field(min_length=1)] = (
        (64, 64, 32), (96, 96, 48), (96, 96, 96), (32, 32, 16), (112, 112, 56),
    )  # fmt: skip
    equal_sizes: bool = True
    """Whether both crops of a pair have one size; else any two that can overlap enough (row 24)."""
    input_size: Size = (64, 64, 32)
    min_iou: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    border: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] = (0, 0, 0)
    """Voxels that crops keep from the scan's faces, as far as it is large enough (row 28)."""
    max_tissue: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Reject crops with a larger share of soft tissue (> -150 HU); P's LUNA rule is 0.15."""
    flip_axes: tuple[Literal["i", "j", "k"], ...] = ("i", "j", "k")
    """Axes that are flipped, each with `flip_probability` (row 29)."""
    flip_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    rotation: Literal["in_plane", "all"] = "in_plane"
    """In the IJ plane, or about all three axes (row 30)."""
    max_rotation_deg: Annotated[float, Field(ge=0.0, le=45.0)] = 10.0
    max_scaling: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """Each axis is scaled by a factor within 1 plus or minus this (row 30)."""
    max_blur_sigma: Annotated[float, Field(ge=0.0)] = 2.0
    shuffle_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Of shuffling the voxels of small windows (row 32)."""
    paint_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    inpaint_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2

    @model_validator(mode="after")
    def _fits_the_network(self) -> Self:
        if any(size % 8 for size in self.input_size):
            raise ValueError(f"input_size {self.input_size} must be multiples of 8")
        if self.input_size[0] != self.input_size[1]:
            raise ValueError(f"input_size {self.input_size} needs I == J for quarter turns")
        return self


class ImageCrops(Part):
    """How 2D images are cropped, rotated and flipped (algorithms.md 1.2, row 34)."""

    input_size: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = 224
    crop_area: tuple[Annotated[float, Field(gt=0.0)], Share] = (0.2, 1.0)
    """Least and greatest share of the image that a crop has."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Least and greatest ratio of a crop's columns to its rows."""
    max_rotation_deg: Annotated[float, Field(ge=0.0, le=45.0)] = 10.0
    flip_probability: Share = 0.5
    """Of left and right changing places; radiographs are not turned upside down."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("crop_area", "crop_ratio"):
            _require_order(name, getattr(self, name))
        return self


class ImageViews(ImageCrops):
    """Two views of a 2D image (P section 7; algorithms.md 1.2, row 34).

    A clean view is cropped, rotated and flipped; the corrupted one is painted and changed in colour
    and sharpness besides.
    """

    kind: Literal["image_views"] = "image_views"
    outpaint_probability: Share = 0.5
    """Noise outside a few windows; other images are cut out. P names both and gives no share."""
    cutout_holes: Annotated[int, Field(ge=0, le=16)] = 3
    cutout_size: PositiveInt = 32
    """Rows and columns of a hole at `input_size`."""
    grayscale_probability: Share = 0.2
    blur_probability: Share = 0.5
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """Least and greatest deviation, pixels."""
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.4
    """Greatest change; of hue in turns. Saturation and hue change nothing in a grey image."""

    @model_validator(mode="after")
    def _ordered_blur(self) -> Self:
        _require_order("blur_sigma", self.blur_sigma)
        return self


def _require_order(name: str, limits: tuple[float, float]) -> None:
    low, high = limits
    if not low <= high:
        raise ValueError(f"{name} {low} to {high} must not fall")


class _Pretraining(Part):
    """What pretraining has in 3D and in 2D."""

    kind: Literal["pretrain"] = "pretrain"
    method: Pcrl = Pcrl()
    batch_size: Annotated[int, Field(ge=2)] = 32
    learning_rate: PositiveFloat = 1e-3
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10

    _dims: ClassVar[Literal[2, 3]] = 3

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        method, crops = given.get("method", {}), given.get("crops", {})
        preset = (
            method.get("preset") if isinstance(method, Mapping) else getattr(method, "preset", None)
        )
        in_2d = "_2d" if cls._dims == 2 else ""
        if isinstance(crops, Mapping):
            crops = presets.filled(crops, preset, f"crops{in_2d}")
        return presets.filled({**given, "crops": crops}, preset, f"optimizer{in_2d}")

    @model_validator(mode="after")
    def _queue_holds_a_step(self) -> Self:
        pushed = len(self.method.push) * self.batch_size
        if self.method.queue_size < pushed:
            raise ValueError(
                f"queue_size {self.method.queue_size} is below the {pushed} vectors of one step"
            )
        return self


class PretrainRecipe(_Pretraining):
    """Self-supervised pretraining; the defaults are P's, or those of `method.preset`."""

    network: UNet3d = UNet3d()
    preprocessing: Preprocessing = Preprocessing()
    crops: CropPairs = CropPairs()
    num_steps: PositiveInt = 74_400
    """240 epochs of 310 steps (P on LUNA)."""
    fused: bool = True
    """Compute the decoder's up-convolutions fused: the same function, a third fewer operations."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.crops.max_tissue is not None:
            window = self.preprocessing.intensity
            if not isinstance(window, Window) or not window.low_hu < TISSUE_HU < window.high_hu:
                raise ValueError(f"max_tissue needs a window that contains {TISSUE_HU} HU")
        return self


class PretrainRecipe2d(_Pretraining):
    """Self-supervised pretraining on 2D images; `network` says that it is 2D."""

    network: ResNetUNet2d = ResNetUNet2d()
    preprocessing: Preprocessing2d = Preprocessing2d()
    crops: ImageViews = ImageViews()
    num_steps: PositiveInt = 73_564
    """240 epochs of P's 78,468 images of Chest14."""
    batch_size: Annotated[int, Field(ge=2)] = 256

    _dims: ClassVar[Literal[2, 3]] = 2

    @model_validator(mode="after")
    def _has_skips(self) -> Self:
        if not self.method.skip:
            raise ValueError(f"skip false is for unet3d alone; this is {self.network.kind}")
        return self


class SplitShares(Part):
    """How subjects are split where the scans themselves do not say; scaled to sum to one."""

    train: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    val: Share = 0.1
    test: Share = 0.2
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class _Finetuning(Part):
    """What every fine-tuning has; the defaults are P's."""

    channels: Annotated[tuple[LabelName, ...], Field(min_length=1)] = ("image",)
    """Images of one scan on one grid, in the order of the network's input (BraTS: modalities)."""
    split: SplitShares = SplitShares()
    num_steps: PositiveInt = 10_000
    learning_rate: PositiveFloat = 1e-4
    """Of Adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate; P keeps it, a cosine ends better when steps are few."""
    validate_every: PositiveInt = 500
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _distinct_channels(self) -> Self:
        if len(set(self.channels)) != len(self.channels):
            raise ValueError(f"a channel is named twice: {', '.join(self.channels)}")
        return self


class FinetuneRecipe(_Finetuning):
    """Segmentation fine-tuning on a few labelled scans; the defaults are P's for LiTS."""

    kind: Literal["finetune"] = "finetune"
    network: UNet3d = UNet3d()
    labels: dict[LabelName, LabelValue] = Field(default_factory=dict)
    """Name of each class and its value in the label volumes, in the order of the output."""
    regions: dict[LabelName, Annotated[tuple[LabelValue, ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    """Instead of `labels`: classes that may overlap, each a union of values (BraTS: whole tumour,
    core, enhancing). One sigmoid channel each, trained with Dice and binary cross-entropy."""
    unlisted_labels: Literal["refuse", "background"] = "refuse"
    """What to do with label values that neither `labels` nor `regions` names."""
    preprocessing: Preprocessing = Preprocessing(intensity=Window(low_hu=-200.0, high_hu=200.0))
    class_weights: dict[LabelName, PositiveFloat] = Field(default_factory=dict)
    """Weights of labels in the cross-entropy, 1 where not given. A rare class (tumour) that starts
    with a weight of some units is found in fewer steps."""
    patch_size: Size = (256, 256, 64)
    transfer: Literal["encoder", "encoder_decoder"] = "encoder"
    """Which part of the parent's weights is taken; the rest starts random."""
    batch_size: PositiveInt = 4
    foreground_share: Share = 0.66
    """Share of patches centred on a labelled voxel, the classes taking turns."""
    flip_probability: Share = 0.0
    overlap: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Of the sliding windows in validation and in serving."""
    fused: bool = True
    """Compute the decoder's up-convolutions fused: the same function, a third fewer operations."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(size % 8 for size in self.patch_size):
            raise ValueError(f"patch_size {self.patch_size} must be multiples of 8")
        if bool(self.labels) == bool(self.regions):
            raise ValueError("name what to segment in labels or in regions, one of the two")
        if len(set(self.labels.values())) != len(self.labels):
            raise ValueError(f"two labels share a value: {sorted(self.labels.values())}")
        if unknown := self.class_weights.keys() - self.labels.keys():
            raise ValueError(f"class_weights names what labels does not: {sorted(unknown)}")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the labels or regions, in the order of the output."""
        return tuple(self.labels or self.regions)

    @property
    def values(self) -> dict[str, int]:
        """Name and value of every class that a label volume may hold.

        Of regions these are the values in them, each a class of its own named after its value.
        """
        if self.labels:
            return dict(self.labels)
        listed = sorted({value for values in self.regions.values() for value in values})
        return {f"value {value}": value for value in listed}


class _Classifying(_Finetuning):
    """Classification in 3D and in 2D: an encoder, its features pooled, one linear layer."""

    kind: Literal["classify"] = "classify"
    labels: Annotated[tuple[LabelName, ...], Field(min_length=1)]
    """Names as they head the columns of the list of examples; one logit each."""
    exclusive: bool = False
    """Whether exactly one label holds for each example (softmax); else each may (sigmoid)."""
    norm: Literal["batch", "group"] = "batch"
    """P keeps batch norm where batches are large."""
    batch_size: PositiveInt = 32
    balanced: bool = True
    """Draw examples with and without each label equally often, the labels taking turns;
    validation and test keep the examples as they are."""

    @model_validator(mode="after")
    def _clear_labels(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"a label is named twice: {', '.join(self.labels)}")
        if self.exclusive and len(self.labels) < 2:
            raise ValueError("exclusive labels are at least two")
        if self.norm == "batch" and self.batch_size < 2:
            raise ValueError("batch norm needs a batch_size of at least 2")
        return self


class ClassifyRecipe(_Classifying):
    """Classification fine-tuning; the defaults are P's for LUNA nodules.

    Cubes of 64 x 64 x 32 mm, batches of 32, batch norm.
    """

    network: UNet3d = UNet3d()
    crop: Literal["centre", "whole"] = "centre"
    """`centre`: a cube of `input_size` voxels around each example's centre; `whole`: the scan,
    resized to `input_size`."""
    input_size: Size = (64, 64, 32)
    preprocessing: Preprocessing = Preprocessing()
    flip_probability: Share = 0.5
    """Of each axis, for examples of every class alike (bug B19)."""
    quarter_turns: bool = True
    """Turn by 0, 90, 180 or 270 degrees in the IJ plane, for examples of every class alike."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(size % 8 for size in self.input_size):
            raise ValueError(f"input_size {self.input_size} must be multiples of 8")
        if self.quarter_turns and self.input_size[0] != self.input_size[1]:
            raise ValueError(f"input_size {self.input_size} needs I == J for quarter turns")
        return self


class ClassifyRecipe2d(_Classifying):
    """Classification of 2D images; the defaults are P's for Chest14 (batches of 512, batch norm).

    Training reads crops, and `network` says that it is 2D. What is judged and served is the whole
    square of `preprocessing`.
    """

    channels: tuple[Literal["image"]] = ("image",)
    network: ResNetUNet2d = ResNetUNet2d()
    preprocessing: Preprocessing2d = Preprocessing2d()
    crops: ImageCrops = ImageCrops()
    batch_size: PositiveInt = 512


AnyPretrain = PretrainRecipe | PretrainRecipe2d
AnyClassify = ClassifyRecipe | ClassifyRecipe2d
AnyRecipe = AnyPretrain | FinetuneRecipe | AnyClassify


def _form(given: object) -> str | None:
    """Kind of a recipe, and whether its network is 2D."""

    def of(part: object, name: str) -> object:
        return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)

    kind = of(given, "kind")
    in_2d = of(of(given, "network"), "kind") == "resnet18_unet2d"
    has_2d = kind in ("pretrain", "classify")
    return f"{kind}_2d" if in_2d and has_2d else kind if isinstance(kind, str) else None


Recipe = Annotated[
    Annotated[PretrainRecipe, Tag("pretrain")]
    | Annotated[PretrainRecipe2d, Tag("pretrain_2d")]
    | Annotated[FinetuneRecipe, Tag("finetune")]
    | Annotated[ClassifyRecipe, Tag("classify")]
    | Annotated[ClassifyRecipe2d, Tag("classify_2d")],
    Discriminator(_form),
]
"""Told apart by `kind`, and by `network.kind` where there are both."""
