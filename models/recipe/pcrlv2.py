"""PCRLv2's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from models.recipe.method import MethodRecipe, Sections
from models.recipe.parts import Share, Size


class PcrlV2(MethodRecipe):
    """PCRLv2 (Zhou et al., TPAMI 2023): pixels, several levels, and local crops.

    The defaults are the official code's. In 2D `crops` says how globals and locals are spoiled, and
    two fields of its own how locals are cut. See docs/methods/pcrlv2.md.
    """

    TITLE: ClassVar[str] = "PCRLv2"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {
            "crop_sizes": ((96, 96, 64), (96, 96, 96), (112, 112, 64), (64, 64, 32)),
            "equal_sizes": False,
            "min_iou": 0.3,
        },
        # 240 epochs of P's 78,468 images of Chest14.
        "recipe_2d": {"batch_size": 64, "learning_rate": 0.01, "num_steps": 294_255},
        "crops_2d": {"crop_area": (0.3, 1.0), "outpaint_probability": 0.0},
    }
    ADDED: ClassVar[Mapping[str, object]] = {"local_area": (0.05, 0.3), "local_side": 96}
    OF_3D: ClassVar[tuple[str, ...]] = (
        "local_sizes", "local_input_size", "local_margin",
        "max_noise_std", "max_log_gamma", "swap_patch", "num_swaps",
    )  # fmt: skip
    """Fields that mean nothing in 2D, as those of `ADDED` do in 3D."""

    name: Literal["pcrlv2"] = "pcrlv2"
    num_locals: PositiveInt = 6
    """Local crops a sample: in 3D inside the box around both global ones, in 2D anywhere."""
    local_sizes: Annotated[tuple[Size, ...], Field(min_length=1)] = (
        (32, 32, 16), (16, 16, 16), (32, 32, 32), (8, 8, 8),
    )  # fmt: skip
    local_input_size: Size = (16, 16, 16)
    local_margin: NonNegativeInt = 3
    """Voxels by which a local crop may leave that box."""
    max_noise_std: Annotated[float, Field(ge=0.0)] = 0.25
    max_log_gamma: Annotated[float, Field(ge=0.0)] = 0.3
    swap_patch: Size = (8, 4, 4)
    num_swaps: NonNegativeInt = 100
    """Pairs of patches that change places."""
    local_area: tuple[Annotated[float, Field(gt=0.0)], Share] = (0.05, 0.3)
    """In 2D: least and greatest share of the image that a local crop has."""
    local_side: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = 96
    """In 2D: rows and columns that it is resized to."""

    @property
    def trains_decoder(self) -> bool:
        """Its levels are what is contrasted."""
        return True

    @property
    def has_skips(self) -> bool:
        """Skips are a shortcut for restoration."""
        return False

    def num_groups(self, batch_size: int) -> int:
        """One process: the batch norms of its heads see the samples of one alone."""
        return 1

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """Fields of the other dimensions stay as they are."""
        for name in self.OF_3D if dims == 2 else self.ADDED:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"pcrlv2's {name} is for {5 - dims}D; this is {dims}D")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if any(size % 8 for size in self.local_input_size):
            raise ValueError(f"local_input_size {self.local_input_size} must be multiples of 8")
        if any(8 % size for size in self.swap_patch):
            raise ValueError(f"swap_patch {self.swap_patch} must divide 8 along every axis")
        if self.local_area[0] > self.local_area[1]:
            raise ValueError(f"local_area {self.local_area} must not fall")
        return self
