"""PCRLv2's own numbers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from models.recipe.method import MethodRecipe, Sections
from models.recipe.parts import Size


class PcrlV2(MethodRecipe):
    """PCRLv2 (Zhou et al., TPAMI 2023), in 3D: pixels, several levels, and local crops.

    The defaults are the official code's. See docs/methods/pcrlv2.md.
    """

    TITLE: ClassVar[str] = "PCRLv2"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {
            "crop_sizes": ((96, 96, 64), (96, 96, 96), (112, 112, 64), (64, 64, 32)),
            "equal_sizes": False,
            "min_iou": 0.3,
        },
    }

    name: Literal["pcrlv2"] = "pcrlv2"
    num_locals: PositiveInt = 6
    """Local crops a sample, inside the box around both global ones."""
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
        """Three dimensions."""
        if dims == 2:
            raise ValueError("pcrlv2 is for unet3d alone, in 3D; this is 2D")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if any(size % 8 for size in self.local_input_size):
            raise ValueError(f"local_input_size {self.local_input_size} must be multiples of 8")
        if any(8 % size for size in self.swap_patch):
            raise ValueError(f"swap_patch {self.swap_patch} must divide 8 along every axis")
        return self
