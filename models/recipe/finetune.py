"""Recipes of fine-tuning: segmentation, and classification in 3D and in 2D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from models.recipe.parts import (
    LabelName,
    LabelValue,
    Part,
    Postprocess,
    Preprocessing,
    Preprocessing2d,
    ResNetUNet2d,
    Share,
    Size,
    UNet3d,
    Window,
)
from models.recipe.views import ImageCrops


class SplitShares(Part):
    """How subjects are split where the scans themselves do not say; scaled to sum to one."""

    train: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    val: Share = 0.1
    test: Share = 0.2
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class LabelledShare(Part):
    """Which part of the labelled training patients is used: what an experiment varies.

    A smaller share lies in a larger one of the same seed. Validation and test stay as they are.
    """

    ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Of patients, rounded, at least one."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class _Finetuning(Part):
    """What every fine-tuning has; the defaults are P's."""

    channels: Annotated[tuple[LabelName, ...], Field(min_length=1)] = ("image",)
    """Images of one scan on one grid, in the order of the network's input (BraTS: modalities)."""
    split: SplitShares = SplitShares()
    labelled: LabelledShare = LabelledShare()
    num_steps: PositiveInt = 10_000
    learning_rate: PositiveFloat = 1e-4
    """Of Adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate; P keeps it, a cosine ends better when steps are few."""
    validate_every: PositiveInt = 500
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10

    ADDED: ClassVar[Mapping[str, object]] = {"labelled": LabelledShare()}

    @model_validator(mode="after")
    def _distinct_channels(self) -> Self:
        if len(set(self.channels)) != len(self.channels):
            raise ValueError(f"a channel is named twice: {', '.join(self.channels)}")
        return self


class LabelCrop(Part):
    """A scan is cut to the box of some labels and a margin (P's rule for LiTS).

    It is what a network sees that follows another one in a cascade.
    """

    labels: tuple[LabelName, ...] = ()
    """Whose box; of all labels where none is named. A scan without any of them is refused."""
    margin_voxels: Annotated[int, Field(ge=0, le=512)] = 30
    """On each side, in voxels of the recipe's spacing; P: 30."""


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
    crop: LabelCrop | None = None
    """Train, judge and test on the labels' box; None: on whole scans."""
    patch_size: Size = (256, 256, 64)
    transfer: Literal["encoder", "encoder_decoder"] = "encoder"
    """Which part of the parent's weights is taken; the rest starts random."""
    batch_size: PositiveInt = 4
    foreground_share: Share = 0.66
    """Share of patches centred on a labelled voxel, the classes taking turns."""
    flip_probability: Share = 0.0
    overlap: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Of the sliding windows in validation and in serving."""
    postprocess: Postprocess = Postprocess()
    """Of masks in serving; validation and test measure the network alone."""
    quality_min_dice: Share = 0.7
    """Mean Dice from which on a scan counts as segmented well, for the threshold of the quality
    flag (`models.uncertainty.calibrated`)."""
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
        if self.crop is not None and (unknown := set(self.crop.labels) - set(self.targets)):
            raise ValueError(f"crop names what is not segmented: {sorted(unknown)}")
        self.postprocess.require(tuple(self.labels))
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


LEAST_MEMBERS = 2
"""Scans with, and without, a label that a training needs; of one alone nothing is learnt."""


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
