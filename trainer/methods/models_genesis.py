"""Models Genesis: restore a crop whose voxels and intensities were changed.

Zhou et al., "Models Genesis: Generic Autodidactic Models for 3D Medical Image Analysis", MICCAI
2019; the numbers are the official code's (docs/methods/models_genesis.md).

B samples of this rank, I J K voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models import recipe as recipes
from models.recipe import AnyPretrain, PretrainRecipe
from trainer import distributed
from trainer.build import build_student
from trainer.data import augment, bezier, shuffle
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods import intensities
from trainer.methods.losses import Losses
from trainer.methods.method import Method
from trainer.methods.pairs import make_crops, shuffled_share
from trainer.randomness import generator, take


@dataclass(frozen=True, slots=True)
class Restored:
    """What the network sees and what it shall give back, (B, 1, I, J, K) each."""

    spoiled: Tensor
    clean: Tensor


class ModelsGenesis(Method[Restored, Losses]):
    """The U-Net, and nothing besides."""

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe, PretrainRecipe)
        self.student = build_student(recipe, fused=recipe.fused)

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Restored:
        """Crops as they are and transformed."""
        clean, _ = make_crops(self.recipe, volumes, sampler, step)
        assert isinstance(self.recipe, PretrainRecipe)
        return Restored(transformed(self.recipe, clean, step), clean)

    def losses(self, views: Restored) -> Losses:
        """Mean squared error over all voxels."""
        restored = intensities.restore(self.student(views.spoiled), self.recipe)
        return Losses(F.mse_loss(restored, views.clean), {})


def transformed(recipe: PretrainRecipe, clean: Tensor, step: int) -> Tensor:
    """Shuffle voxels in windows, bend intensities, paint: in the official code's order.

    Each follows from the seed and the step with a generator of its own.

    Args:
        recipe: Of Models Genesis.
        clean: This rank's crops, (B, 1, I, J, K); not changed.
        step: From 1.
    """
    method, crops, seed, batch = recipe.method, recipe.crops, recipe.seed, recipe.batch_size
    assert isinstance(method, recipes.ModelsGenesis)
    rows, skip, device = shuffled_share(recipe, step), distributed.num_before(batch), clean.device
    views = clean
    if crops.shuffle_probability > 0:
        drawn = torch.rand(batch, generator=generator(seed, step, "shuffling"))[rows]
        (views,) = shuffle.shuffle_some(
            [clean],
            drawn[None] < crops.shuffle_probability,
            on_host=generator(seed, step, f"extents {skip}"),
            on_device=generator(seed, step, f"windows {skip}", device),
        )
    curves = bezier.draw(
        batch, method.curve_probability, method.falling_share, generator(seed, step, "curves")
    )
    views = bezier.apply(views, take(curves, rows), intensities.limits(views, recipe))
    painting = generator(seed, step, "painting")
    kind = augment.draw_painting(crops, batch, painting)
    corruption = take(augment.draw_corruption(crops, kind, painting), rows)
    noise = generator(seed, step, "noise", device)
    return augment.corrupt(views, corruption, noise, skip=skip, in_place=True)
