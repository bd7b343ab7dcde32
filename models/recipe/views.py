"""How crops and views are made of scans and of 2D images."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from models.recipe.parts import Part, Share, Size


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
