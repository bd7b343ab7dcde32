"""Where the intensities of network input lie, and what makes a network's output lie there too.

B batch, I J K voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.recipe import AnyPretrain, PretrainRecipe, PretrainRecipe2d, Window


def is_bounded(recipe: AnyPretrain) -> bool:
    """Whether network input lies in [0, 1]: a window's does, z-scores (MR) and images do not."""
    return isinstance(recipe, PretrainRecipe) and isinstance(recipe.preprocessing.intensity, Window)


def restore(out: Tensor, recipe: AnyPretrain) -> Tensor:
    """A network's output as intensities, float32: through a sigmoid where they are bounded."""
    return torch.sigmoid(out.float()) if is_bounded(recipe) else out.float()


def limits(views: Tensor, recipe: AnyPretrain) -> tuple[Tensor, Tensor] | None:
    """Least and greatest intensity of each view, (B,) each; None where these are 0 and 1.

    Images are in [0, 1] until they are normalised.
    """
    if is_bounded(recipe) or isinstance(recipe, PretrainRecipe2d):
        return None
    flat = views.flatten(1)
    return flat.amin(dim=1), flat.amax(dim=1)
