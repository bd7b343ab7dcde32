"""The masked autoencoder's own numbers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from models.recipe.method import MethodRecipe, Sections, require_blocks, require_volumes
from models.recipe.views import CropPairs


class Mae(MethodRecipe):
    """Restore the blocks of a crop that the network does not see (He et al., CVPR 2022).

    On a convolutional network, as nnssl's baseline has it: hidden blocks are zero. See
    docs/methods/mae.md.
    """

    TITLE: ClassVar[str] = "a masked autoencoder"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {"paint_probability": 0.0, "max_blur_sigma": 0.0},
        "recipe": {"learning_rate": 1e-2, "momentum": 0.99, "weight_decay": 3e-5},
    }

    name: Literal["mae"] = "mae"
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    """Share of blocks that are hidden."""
    block_size: PositiveInt = 16
    """Voxels of a block along each axis; a divisor of every extent of the crops."""

    @property
    def trains_decoder(self) -> bool:
        """It restores."""
        return True

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """In 3D alone."""
        require_volumes(self.TITLE, dims)

    def check_crops(self, crops: CropPairs) -> None:
        """Blocks fill the crop."""
        require_blocks("block_size", self.block_size, crops.input_size)
