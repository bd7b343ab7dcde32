"""Models Genesis' own numbers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from models.recipe.method import MethodRecipe, Sections
from models.recipe.parts import Share

GENESIS_CROPS = {
    "crop_sizes": ((64, 64, 32),),
    "border": (100, 100, 30),
    "max_tissue": 0.15,
    "max_rotation_deg": 0.0,
    "max_blur_sigma": 0.0,
}
"""Where Models Genesis and Semantic Genesis cut."""

WINDOWS_3D = 10_000
WINDOWS_2D = 700
"""At 224 x 224 they cover an image about as often as `WINDOWS_3D` cover a crop of 64 x 64 x 32."""


class ModelsGenesis(MethodRecipe):
    """Restore a crop whose voxels and intensities were changed (Zhou et al., MICCAI 2019).

    `crops` says where crops are cut and how they are flipped; what is done to them stands here,
    with the official code's values as defaults. See docs/methods/models_genesis.md.
    """

    TITLE: ClassVar[str] = "Models Genesis"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {**GENESIS_CROPS, "flip_probability": 0.15},
        # As many crops as P's PCRL sees: 240 epochs of 9,920.
        "recipe": {
            "batch_size": 6,
            "num_steps": 396_800,
            "learning_rate": 1.0,
            "momentum": 0.9,
            "weight_decay": 0.0,
        },
        "recipe_2d": {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0},
        # Every 40 epochs of 3,323 steps (32 crops of 623 scans).
        "optimizer": {"schedule": {"kind": "drops", "at": (0.335, 0.67), "factor": 0.5}},
    }

    name: Literal["models_genesis"] = "models_genesis"
    shuffle_probability: Share = 0.5
    """Of permuting voxels inside small windows."""
    shuffle_windows: PositiveInt | None = None
    """How many; None is the code's 10,000 for a volume and, for an image, `WINDOWS_2D`."""
    curve_probability: Share = 0.9
    """Of sending the intensities through a random Bezier curve."""
    falling_share: Share = 0.5
    """Of those curves, how many fall from 1 to 0."""
    paint_probability: Share = 0.9
    """Of painting boxes, or all but boxes, with noise."""
    inpaint_share: Share = 0.2
    """Of painted crops, how many are painted in boxes; the others outside of windows."""

    @property
    def trains_decoder(self) -> bool:
        """It restores."""
        return True

    @property
    def sees_changed_input(self) -> bool:
        """Crops are bent, shuffled and painted."""
        return True

    def num_windows(self, dims: Literal[2, 3]) -> int:
        """Windows that are shuffled in each crop or image."""
        return self.shuffle_windows or (WINDOWS_3D if dims == 3 else WINDOWS_2D)
