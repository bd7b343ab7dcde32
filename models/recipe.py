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
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from models import presets

Size = tuple[PositiveInt, PositiveInt, PositiveInt]
SpacingMm = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
TISSUE_HU = -150.0
"""Soft tissue lies above (P's LUNA rule)."""

LabelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]

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
    """Self-supervised pretraining; the defaults are P's, or those of `method.preset`."""

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

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        method, crops = given.get("method", {}), given.get("crops", {})
        preset = (
            method.get("preset") if isinstance(method, Mapping) else getattr(method, "preset", None)
        )
        if isinstance(crops, Mapping):
            crops = presets.filled(crops, preset, "crops")
        return presets.filled({**given, "crops": crops}, preset, "optimizer")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        pushed = len(self.method.push) * self.batch_size
        if self.method.queue_size < pushed:
            raise ValueError(
                f"queue_size {self.method.queue_size} is below the {pushed} vectors of one step"
            )
        if self.crops.max_tissue is not None:
            window = self.preprocessing.intensity
            if not isinstance(window, Window) or not window.low_hu < TISSUE_HU < window.high_hu:
                raise ValueError(f"max_tissue needs a window that contains {TISSUE_HU} HU")
        return self


class FinetuneRecipe(Part):
    """Segmentation fine-tuning on a few labelled scans."""

    kind: Literal["finetune"] = "finetune"
    labels: Annotated[dict[LabelName, Annotated[int, Field(ge=1, le=255)]], Field(min_length=1)]
    """Name of each class and its value in the label volumes, in the order of the output."""
    unlisted_labels: Literal["refuse", "background"] = "refuse"
    """What to do with label values that `labels` does not name."""
    network: UNet3d = UNet3d()
    preprocessing: Preprocessing = Preprocessing(intensity=Window(low_hu=-200.0, high_hu=200.0))
    patch_size: Size = (256, 256, 64)
    transfer: Literal["encoder", "encoder_decoder"] = "encoder"
    """Which part of the parent's weights is taken; the rest starts random."""
    num_steps: PositiveInt = 10_000
    batch_size: PositiveInt = 4
    learning_rate: PositiveFloat = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate; P keeps it, a cosine ends better when steps are few."""
    foreground_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.66
    """Share of patches centred on a labelled voxel, the classes taking turns."""
    flip_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    overlap: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Of the sliding windows in validation and in serving."""
    validate_every: PositiveInt = 500
    fused: bool = True
    """Compute the decoder's up-convolutions fused: the same function, a third fewer operations."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(size % 8 for size in self.patch_size):
            raise ValueError(f"patch_size {self.patch_size} must be multiples of 8")
        if len(set(self.labels.values())) != len(self.labels):
            raise ValueError(f"two labels share a value: {sorted(self.labels.values())}")
        return self


Recipe = Annotated[PretrainRecipe | FinetuneRecipe, Field(discriminator="kind")]
