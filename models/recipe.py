"""What a training job asks for.

Every number of the method is a field whose default is the paper's (Zhou et al., ICCV 2021; "P").
A recipe is frozen, refuses unknown fields, and its `digest` names it in manifests and caches.

Axes are (I, J, K) in RAS+; sizes in voxels of the resampled grid, spacing in mm.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Size = tuple[PositiveInt, PositiveInt, PositiveInt]
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


class ResNetUNet2d(Part):
    """The U-Net on a ResNet-18 that P uses on radiographs."""

    kind: Literal["resnet18_unet2d"] = "resnet18_unet2d"
    in_channels: Literal[3] = 3
    """Grey images are repeated, so that ImageNet's weights fit."""
    width: Annotated[int, Field(ge=4, le=128, multiple_of=4)] = 64
    """Channels of the first convolution; P: 64. The bottleneck has 8 times as many."""


class Pcrl(Part):
    """PCRL's own numbers, preset `paper` (P sections 3 and 7; algorithms.md 1.2)."""

    name: Literal["pcrl"] = "pcrl"
    preset: Literal["paper"] = "paper"
    embedding_size: PositiveInt = 128
    queue_size: PositiveInt = 16384
    temperature: PositiveFloat = 0.2
    ema_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    mix_alpha: PositiveFloat = 1.0
    """CrossMix draws lambda from Beta(alpha, alpha), one a step."""
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
    momentum_groups: PositiveInt = 4
    """Shuffled groups in which the momentum encoder normalises a batch (row 22; P had 4 GPUs).
    Fewer where a group would hold a single sample."""


class CropPairs(Part):
    """Two overlapping crops of a scan, resized to the input size (P section 7; rows 24-33)."""

    crop_sizes: Annotated[tuple[Size, ...], Field(min_length=1)] = (
        (64, 64, 32), (96, 96, 48), (96, 96, 96), (32, 32, 16), (112, 112, 56),
    )  # fmt: skip
    input_size: Size = (64, 64, 32)
    min_iou: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    max_tissue: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Reject crops with a larger share of soft tissue (> -150 HU); P's LUNA rule is 0.15."""
    flip_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    max_rotation_deg: Annotated[float, Field(ge=0.0, le=45.0)] = 10.0
    max_blur_sigma: Annotated[float, Field(ge=0.0)] = 2.0
    paint_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    inpaint_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2

    @model_validator(mode="after")
    def _fits_the_network(self) -> Self:
        if any(size % 8 for size in self.input_size):
            raise ValueError(f"input_size {self.input_size} must be multiples of 8")
        if self.input_size[0] != self.input_size[1]:
            raise ValueError(f"input_size {self.input_size} needs I == J for quarter turns")
        return self


class ImageViews(Part):
    """Two views of a 2D image (P section 7; algorithms.md 1.2, row 34).

    A clean view is cropped, rotated and flipped; the corrupted one is painted and changed in colour
    and sharpness besides.
    """

    kind: Literal["image_views"] = "image_views"
    input_size: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = 224
    crop_area: tuple[Annotated[float, Field(gt=0.0)], Share] = (0.2, 1.0)
    """Least and greatest share of the image that a crop has."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Least and greatest ratio of a crop's columns to its rows."""
    max_rotation_deg: Annotated[float, Field(ge=0.0, le=45.0)] = 10.0
    flip_probability: Share = 0.5
    """Of left and right changing places; radiographs are not turned upside down."""
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
    def _ordered(self) -> Self:
        for name in ("crop_area", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name} {low} to {high} must not fall")
        return self


class PretrainRecipe(Part):
    """Self-supervised pretraining; the defaults are P's."""

    kind: Literal["pretrain"] = "pretrain"
    method: Pcrl = Pcrl()
    network: UNet3d = UNet3d()
    preprocessing: Preprocessing = Preprocessing()
    crops: CropPairs = CropPairs()
    num_steps: PositiveInt = 74_400
    """240 epochs of 310 steps (P on LUNA)."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    learning_rate: PositiveFloat = 1e-3
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    fused: bool = True
    """Compute the decoder's up-convolutions fused: the same function, a third fewer operations."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        pushed = 3 * self.batch_size
        if self.method.queue_size < pushed:
            raise ValueError(
                f"queue_size {self.method.queue_size} is below the {pushed} vectors of one step"
            )
        if self.crops.max_tissue is not None:
            window = self.preprocessing.intensity
            if not isinstance(window, Window) or not window.low_hu < TISSUE_HU < window.high_hu:
                raise ValueError(f"max_tissue needs a window that contains {TISSUE_HU} HU")
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
    network: UNet3d = UNet3d()
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


class ClassifyRecipe(_Finetuning):
    """Classification fine-tuning: an encoder, its features pooled, one linear layer.

    The defaults are P's for LUNA nodules: cubes of 64 x 64 x 32 mm, batches of 32, batch norm.
    """

    kind: Literal["classify"] = "classify"
    labels: Annotated[tuple[LabelName, ...], Field(min_length=1)]
    """Names as they head the columns of the list of examples; one logit each."""
    exclusive: bool = False
    """Whether exactly one label holds for each example (softmax); else each may (sigmoid)."""
    crop: Literal["centre", "whole"] = "centre"
    """`centre`: a cube of `input_size` voxels around each example's centre; `whole`: the scan,
    resized to `input_size`."""
    input_size: Size = (64, 64, 32)
    preprocessing: Preprocessing = Preprocessing()
    norm: Literal["batch", "group"] = "batch"
    """P keeps batch norm where batches are large."""
    batch_size: PositiveInt = 32
    balanced: bool = True
    """Draw examples with and without each label equally often, the labels taking turns;
    validation and test keep the examples as they are."""
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
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"a label is named twice: {', '.join(self.labels)}")
        if self.exclusive and len(self.labels) < 2:
            raise ValueError("exclusive labels are at least two")
        if self.norm == "batch" and self.batch_size < 2:
            raise ValueError("batch norm needs a batch_size of at least 2")
        return self


AnyRecipe = PretrainRecipe | FinetuneRecipe | ClassifyRecipe
Recipe = Annotated[AnyRecipe, Field(discriminator="kind")]
