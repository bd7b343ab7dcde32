"""3D-CPC: predict the codes of patches from a context of others.

Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, section 3.1 (paper and
authors' code: docs/methods/cpc3d.md).

B samples of this rank, N patches of each, S side of a patch, I J K voxels, M columns of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models import recipe as recipes
from models.networks import unet3d
from models.networks.predictive import PatchPredictor
from models.recipe import AnyPretrain, PretrainRecipe
from trainer.build import build_student
from trainer.data import blocks, jitter
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.to_device import to_device
from trainer.methods import prediction
from trainer.methods.losses import Losses
from trainer.methods.method import Method
from trainer.methods.pairs import make_crops, shuffled_share
from trainer.randomness import generator, take


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches of all crops, (B * N, 1, S, S, S), and a wrong column for each column, (M,)."""

    voxels: Tensor
    negative: Tensor


class Cpc3d(Method[Patches, Losses]):
    """The encoder, and what reads, remembers and predicts codes."""

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe, PretrainRecipe) and isinstance(recipe.method, recipes.Cpc3d)
        self.spec = spec = recipe.method
        self.grid = blocks.grid_of(recipe.crops.input_size, spec.patch_size)
        self.student = build_student(recipe, fused=False)
        self.heads = PatchPredictor(
            recipe.network.num_features * (spec.patch_size // unet3d.STRIDE) ** 3,
            self.grid,
            code_size=spec.code_size,
            context_size=spec.context_size,
            context_rows=spec.context_rows,
            future_rows=spec.future_rows,
        )

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Patches:
        """Crops without a part of their rim, cut into patches without a part of theirs."""
        recipe, spec, side = self.recipe, self.spec, self.spec.patch_size
        assert isinstance(recipe, PretrainRecipe)
        seed, batch, size = recipe.seed, recipe.batch_size, recipe.crops.input_size
        rows = shuffled_share(recipe, step)
        crops, _ = make_crops(recipe, volumes, sampler, step)
        of_crops = jitter.draw(
            batch, size, spec.crop_share, 0.0, generator(seed, step, "crop jitter")
        )
        crops = jitter.apply(crops, take(of_crops, rows), spec.crop_share)
        patches = blocks.split(crops, side)  # (B, N, S, S, S)
        count = patches.shape[1]
        of_patches = jitter.draw(
            batch * count,
            (side, side, side),
            spec.patch_share,
            spec.patch_flip_probability,
            generator(seed, step, "patch jitter"),
        )
        ours = (rows[:, None] * count + torch.arange(count)).flatten()
        voxels = jitter.apply(
            patches.flatten(0, 1)[:, None], take(of_patches, ours), spec.patch_share
        )
        columns = len(rows) * self.grid[1] * self.grid[2]
        negative = prediction.draw_negatives(columns, generator(seed, step, "negatives"))
        return Patches(voxels, to_device(negative, voxels.device))

    def losses(self, views: Patches) -> Losses:
        """How well the codes of the rows to come were predicted."""
        predicted, truth = self.heads(self.student.encoder(views.voxels).bottleneck)
        if self.spec.contrast == "pairs":
            return Losses(prediction.pair_loss(predicted, truth, views.negative), {})
        return Losses(prediction.info_nce_loss(predicted, truth), {})
