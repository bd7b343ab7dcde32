"""What recipes consist of: sizes, intensities, grids, networks.

Axes are (I, J, K) in RAS+; sizes in voxels of the resampled grid, spacing in mm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

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

    ADDED: ClassVar[Mapping[str, object]] = {}
    """Fields that came later, and the value that stands for how it was before them."""

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal.

        Without the `ADDED` fields that hold their old value, so that what was named before there
        were such fields keeps its name.
        """
        canonical = self.model_dump_json(exclude=_as_before(self) or None)
        return hashlib.sha256(canonical.encode()).hexdigest()


def _as_before(part: Part) -> dict[str, Any]:
    """`ADDED` fields with their old value, in a part and in its parts; pydantic's `exclude`."""
    found: dict[str, Any] = {
        name: True for name, before in part.ADDED.items() if getattr(part, name) == before
    }
    for name in type(part).model_fields:
        value = getattr(part, name)
        if name not in found and isinstance(value, Part) and (nested := _as_before(value)):
            found[name] = nested
    return found


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


Connectivity = Literal[6, 26]
"""Neighbours of a voxel: across faces, or across faces, edges and corners."""


class Postprocess(Part):
    """What is done to a mask before it leaves; the defaults change nothing.

    An organ is its own label with its parts. See `models.postprocess`.
    """

    parts: dict[LabelName, Annotated[tuple[LabelName, ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    """Labels that lie inside others and count as them: `{"liver": ["tumour"]}`."""
    keep_largest: tuple[LabelName, ...] = ()
    """Organs of which the largest component stays, with what parts lie in it."""
    fill_holes: tuple[LabelName, ...] = ()
    """Organs whose enclosed background becomes theirs, after that and in this order."""
    lesions: tuple[LabelName, ...] = ()
    """Labels whose components are counted and measured in the result."""
    connectivity: Connectivity = 26

    @model_validator(mode="after")
    def _clear(self) -> Self:
        parts = {part for listed in self.parts.values() for part in listed}
        if nested := parts & self.parts.keys():
            raise ValueError(f"a part has parts: {sorted(nested)}")
        if alone := parts & set(self.keep_largest):
            raise ValueError(f"a part stays with its organ, not by its own size: {sorted(alone)}")
        for field in ("keep_largest", "fill_holes", "lesions"):
            names: tuple[str, ...] = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"{field} names a label twice: {', '.join(names)}")
        return self

    @property
    def changes_masks(self) -> bool:
        """Whether a mask may leave otherwise than the network made it."""
        return bool(self.keep_largest or self.fill_holes)

    def require(self, labels: tuple[str, ...]) -> None:
        """Refuse names that are none of the labels.

        Raises:
            ValueError: Names them.
        """
        parts = {part for listed in self.parts.values() for part in listed}
        named = parts.union(self.parts, self.keep_largest, self.fill_holes, self.lesions)
        if unknown := named - set(labels):
            raise ValueError(f"postprocess names what labels does not: {sorted(unknown)}")


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
    width: Annotated[int, Field(ge=8, le=128, multiple_of=4)] = 64
    """Channels of the first convolution; P: 64. The bottleneck has 8 times as many. At 4, torch
    2.13's backward pass of a 1x1 convolution of stride 2 corrupts memory (CPU, channels last)."""

    @property
    def dims(self) -> Literal[2, 3]:
        """Spatial axes."""
        return 2

    @property
    def num_features(self) -> int:
        """Channels of the bottleneck."""
        return 8 * self.width
