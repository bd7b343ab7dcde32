"""The masked autoencoder's own numbers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from models.recipe.method import MethodRecipe, Sections, require_blocks


class Mae(MethodRecipe):
    """Restore the blocks of a crop that the network does not see (He et al., CVPR 2022).

    On a convolutional network, as nnssl's baseline has it: hidden blocks are zero. See
    docs/methods/mae.md.
    """

    TITLE: ClassVar[str] = "a masked autoencoder"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {"paint_probability": 0.0, "max_blur_sigma": 0.0},
        # nnssl's in 3D; He et al.'s in 2D, whose rate is for a batch of 256.
        "recipe": {"learning_rate": 1e-2, "momentum": 0.99, "weight_decay": 3e-5},
        "recipe_2d": {"learning_rate": 1.5e-4, "momentum": 0.9, "weight_decay": 0.05},
        "optimizer_2d": {"kind": "adamw", "beta2": 0.95},
    }

    name: Literal["mae"] = "mae"
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    """Share of blocks that are hidden."""
    block_size: PositiveInt = 16
    """Voxels or pixels of a block along each axis; a divisor of every extent of the crops."""

    @property
    def trains_decoder(self) -> bool:
        """It restores."""
        return True

    @property
    def sees_changed_input(self) -> bool:
        """Blocks are hidden."""
        return True

    def check_crops(self, size: tuple[int, ...]) -> None:
        """Blocks fill the crop."""
        require_blocks("block_size", self.block_size, size)
