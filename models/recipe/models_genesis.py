"""Models Genesis' own numbers."""

from __future__ import annotations

from typing import ClassVar, Literal

from models.recipe.method import MethodRecipe, Sections, require_volumes
from models.recipe.parts import Share

GENESIS_CROPS = {
    "crop_sizes": ((64, 64, 32),),
    "border": (100, 100, 30),
    "max_tissue": 0.15,
    "max_rotation_deg": 0.0,
    "max_blur_sigma": 0.0,
}
"""Where Models Genesis and Semantic Genesis cut."""


class ModelsGenesis(MethodRecipe):
    """Restore a crop whose voxels and intensities were changed (Zhou et al., MICCAI 2019).

    Shuffling and painting are fields of the recipe's `crops`, with the official code's values as
    defaults. See docs/methods/models_genesis.md.
    """

    TITLE: ClassVar[str] = "Models Genesis"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {
            **GENESIS_CROPS,
            "flip_probability": 0.15,
            "shuffle_probability": 0.5,
            "paint_probability": 0.9,
            "inpaint_share": 0.2,
        },
        # As many crops as P's PCRL sees: 240 epochs of 9,920.
        "recipe": {
            "batch_size": 6,
            "num_steps": 396_800,
            "learning_rate": 1.0,
            "momentum": 0.9,
            "weight_decay": 0.0,
        },
        # Every 40 epochs of 3,323 steps (32 crops of 623 scans).
        "optimizer": {"schedule": {"kind": "drops", "at": (0.335, 0.67), "factor": 0.5}},
    }

    name: Literal["models_genesis"] = "models_genesis"
    curve_probability: Share = 0.9
    """Of sending the intensities through a random Bezier curve."""
    falling_share: Share = 0.5
    """Of those curves, how many fall from 1 to 0."""

    @property
    def trains_decoder(self) -> bool:
        """It restores."""
        return True

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """In 3D alone."""
        require_volumes(self.TITLE, dims)
