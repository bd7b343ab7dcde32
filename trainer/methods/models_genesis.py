"""Models Genesis: restore a crop whose voxels and intensities were changed.

Zhou et al., "Models Genesis: Generic Autodidactic Models for 3D Medical Image Analysis", MICCAI
2019; the numbers are the official code's (docs/methods/models_genesis.md).

B samples of this rank, I J K voxels, in 2D I J pixels of C colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models import recipe as recipes
from models.recipe import AnyPretrain, PretrainRecipe, PretrainRecipe2d
from trainer import distributed
from trainer.build import build_student
from trainer.data import augment, bezier, shuffle
from trainer.data.images2d import ResidentImages, as_channels
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods import intensities
from trainer.methods.losses import Losses
from trainer.methods.method import Method
from trainer.methods.pairs import make_crops, sharp_images, shuffled_share
from trainer.randomness import generator, take


@dataclass(frozen=True, slots=True)
class Restored:
    """What the network sees and what it shall give back: (B, 1, I, J, K), in 2D (B, 3, I, J)."""

    spoiled: Tensor
    clean: Tensor


class ModelsGenesis(Method[Restored, Losses]):
    """The U-Net, and nothing besides."""

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        fused = isinstance(recipe, PretrainRecipe) and recipe.fused
        self.student = build_student(recipe, fused=fused)

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Restored:
        """Crops or images as they are and transformed."""
        if isinstance(volumes, ResidentImages):
            assert isinstance(self.recipe, PretrainRecipe2d)
            return _of_images(self.recipe, volumes, step)
        clean, _ = make_crops(self.recipe, volumes, sampler, step)
        return Restored(transformed(self.recipe, clean, step), clean)

    def losses(self, views: Restored) -> Losses:
        """Mean squared error over all voxels."""
        restored = intensities.restore(self.student(views.spoiled), self.recipe)
        return Losses(F.mse_loss(restored, views.clean), {})


def _of_images(recipe: PretrainRecipe2d, images: ResidentImages, step: int) -> Restored:
    """Images in [0, 1] transformed as volumes whose third axis is the colour, then normalised."""
    sharp, _ = sharp_images(recipe, images, step, shuffled_share(recipe, step))
    deep = sharp.movedim(1, -1)[:, None]  # (B, 1, I, J, C)
    spoiled = transformed(recipe, deep, step)[:, 0].movedim(-1, 1)
    normalisation = recipe.preprocessing.normalisation
    return Restored(as_channels(spoiled, normalisation), as_channels(sharp, normalisation))


def transformed(recipe: AnyPretrain, clean: Tensor, step: int) -> Tensor:
    """Shuffle voxels in windows, bend intensities, paint: in the official code's order.

    Each follows from the seed and the step with a generator of its own.

    Args:
        recipe: Of Models Genesis.
        clean: This rank's crops, (B, 1, I, J, K), or images, (B, 1, I, J, C); not changed.
        step: From 1.
    """
    method, seed, batch = recipe.method, recipe.seed, recipe.batch_size
    assert isinstance(method, recipes.ModelsGenesis)
    rows, skip, device = shuffled_share(recipe, step), distributed.num_before(batch), clean.device
    views = clean
    if method.shuffle_probability > 0:
        drawn = torch.rand(batch, generator=generator(seed, step, "shuffling"))[rows]
        (views,) = shuffle.shuffle_some(
            [clean],
            drawn[None] < method.shuffle_probability,
            on_host=generator(seed, step, f"extents {skip}"),
            on_device=generator(seed, step, f"windows {skip}", device),
            num_windows=method.num_windows(recipe.network.dims),
        )
    curves = bezier.draw(
        batch, method.curve_probability, method.falling_share, generator(seed, step, "curves")
    )
    limits = intensities.limits(views, recipe)
    views = bezier.apply(views, take(curves, rows), limits)
    corruption = take(draw_corruption(recipe, clean.shape[2:], step), rows)
    noise = generator(seed, step, "noise", device)
    return augment.corrupt(views, corruption, noise, skip=skip, in_place=True)


def draw_corruption(recipe: AnyPretrain, shape: torch.Size, step: int) -> augment.Corruption:
    """Boxes of the whole batch, without blur; in 2D they go through all colours."""
    method, batch = recipe.method, recipe.batch_size
    assert isinstance(method, recipes.ModelsGenesis)
    random = generator(recipe.seed, step, "painting")
    painting = augment.draw_painting(method, batch, random)
    start, size = augment.draw_boxes(tuple(shape[: recipe.network.dims]), painting, random)
    if recipe.network.dims == 2:
        start = F.pad(start, (0, 1))
        colours = shape[2] * (size[:, :, :1] > 0)
        size = torch.cat([size, colours], dim=2)
    return augment.Corruption(painting, start, size, torch.zeros(batch, 3))
