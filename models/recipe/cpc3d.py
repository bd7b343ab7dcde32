"""3D-CPC's own numbers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from models.recipe.method import MethodRecipe, Sections, require_blocks, require_volumes
from models.recipe.parts import Share

Kept = Annotated[float, Field(gt=0.0, le=1.0)]


class Cpc3d(MethodRecipe):
    """Predict the codes of patches from those of others (Taleb et al., NeurIPS 2020).

    The defaults are the authors' for CT, on crops of 64 x 64 x 32 voxels in patches of 16 cubed.
    See docs/methods/cpc3d.md.
    """

    TITLE: ClassVar[str] = "3D-CPC"
    DEFAULTS: ClassVar[Sections] = {
        "crops": {
            "crop_sizes": ((64, 64, 32),),
            "max_rotation_deg": 0.0,
            "paint_probability": 0.0,
            "max_blur_sigma": 0.0,
        },
        "recipe": {"learning_rate": 1e-4, "momentum": 0.9, "weight_decay": 0.0},
        "optimizer": {"kind": "adam", "schedule": {"kind": "constant"}},
    }

    name: Literal["cpc3d"] = "cpc3d"
    patch_size: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    """Voxels of a patch along each axis; a divisor of every extent of the crops."""
    code_size: PositiveInt = 1024
    context_size: PositiveInt = 256
    """Of the recurrent layer."""
    context_rows: PositiveInt = 2
    """Rows of patches along I that a context has seen: a pyramid on its tip."""
    future_rows: PositiveInt = 2
    """Rows after them that are predicted, each by a layer of its own."""
    contrast: Literal["info_nce", "pairs"] = "info_nce"
    """Each prediction against all patches of its row in the batch (the paper), or one binary
    decision for the right column and one for a wrong one (the authors' code)."""
    crop_share: Kept = 0.95
    """Of each axis of a crop that is kept before it is cut into patches."""
    patch_share: Kept = 0.875
    """Of each axis of a patch that is kept."""
    patch_flip_probability: Share = 0.5
    """Of flipping a patch along I."""

    @property
    def num_rows(self) -> int:
        """Rows of patches that a crop must have."""
        return self.context_rows + self.future_rows

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """In 3D alone."""
        require_volumes(self.TITLE, dims)

    def check_crops(self, size: tuple[int, ...]) -> None:
        """Patches fill the crop, in rows enough."""
        require_blocks("patch_size", self.patch_size, size)
        rows = size[0] // self.patch_size
        if rows < self.num_rows:
            raise ValueError(
                f"context_rows and future_rows need {self.num_rows} rows of patches along I, "
                f"a crop has {rows}"
            )
