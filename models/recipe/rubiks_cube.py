"""Rubik's Cube++'s own numbers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from models.recipe.method import MethodRecipe, Sections, require_blocks, require_volumes


class RubiksCube(MethodRecipe):
    """Put a crop together that was turned like a Rubik's cube (Tao et al., MICCAI 2020).

    The network plays against a critic. See docs/methods/rubiks_cube.md, which says what of these
    numbers could not be verified.
    """

    TITLE: ClassVar[str] = "Rubik's Cube++"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {
            "crop_sizes": ((64, 64, 32),),
            "max_rotation_deg": 0.0,
            "flip_probability": 0.0,
            "paint_probability": 0.0,
            "max_blur_sigma": 0.0,
        },
        "recipe": {"learning_rate": 1e-4, "momentum": 0.5, "weight_decay": 0.0},
        "optimizer": {"kind": "nadam", "beta2": 0.999, "schedule": {"kind": "constant"}},
    }

    name: Literal["rubiks_cube"] = "rubiks_cube"
    turned: Literal["subvolumes", "slabs"] = "subvolumes"
    """Each sub-volume for itself (P, section 7), or whole slabs as of a real cube (Tao et al.)."""
    side: PositiveInt = 16
    """Voxels of a sub-volume along each axis, or a slab's thickness; a divisor of every extent."""
    distance: Literal["l1", "l2"] = "l1"
    """Between the crop and what was made of it: mean absolute or squared difference."""
    reconstruction_weight: PositiveFloat = 100.0
    adversarial_weight: Annotated[float, Field(ge=0.0)] = 1.0
    penalty_weight: Annotated[float, Field(ge=0.0)] = 10.0
    """Of the critic's gradient penalty."""
    critic_steps: PositiveInt = 5
    """Of the critic before each of the network, each on a batch of its own."""
    critic_width: PositiveInt = 32
    critic_norm: Literal["batch", "layer", "none"] = "layer"

    @property
    def trains_decoder(self) -> bool:
        """It restores."""
        return True

    def num_groups(self, batch_size: int) -> int:
        """One: the game is played in one process."""
        return 1

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """In 3D alone."""
        require_volumes(self.TITLE, dims)

    def check_crops(self, size: tuple[int, ...]) -> None:
        """Sub-volumes or slabs fill the crop."""
        require_blocks("side", self.side, size)
