"""A masked autoencoder on the U-Net: restore the blocks that it does not see.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, as the convolutional
baseline of nnssl (Wald et al., "An OpenMind for 3D Medical Vision Self-supervised Learning", ICCV
2025) has it: hidden blocks are zero, dense convolutions run over them, and the loss looks at hidden
voxels alone (docs/methods/mae.md).

B samples of this rank, I J K voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models import recipe as recipes
from models.recipe import AnyPretrain, PretrainRecipe
from trainer.build import build_student
from trainer.data import masking
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.to_device import to_device
from trainer.methods import intensities
from trainer.methods.losses import Losses
from trainer.methods.method import Method
from trainer.methods.pairs import make_crops, shuffled_share
from trainer.randomness import generator


@dataclass(frozen=True, slots=True)
class Masked:
    """Crops and which voxels of them are hidden (bool), (B, 1, I, J, K) each.

    In 2D images, (B, 3, I, J), and pixels, (B, 1, I, J).
    """

    clean: Tensor
    is_hidden: Tensor


class Mae(Method[Masked, Losses]):
    """The U-Net, and nothing besides."""

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, recipes.Mae)
        self.spec = recipe.method
        fused = isinstance(recipe, PretrainRecipe) and recipe.fused
        self.student = build_student(recipe, fused=fused)

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Masked:
        """Crops, and blocks to hide."""
        recipe, spec = self.recipe, self.spec
        clean, _ = make_crops(recipe, volumes, sampler, step)
        mask = masking.draw_mask(
            recipe.batch_size,
            tuple(clean.shape[2:]),
            spec.block_size,
            spec.mask_ratio,
            generator(recipe.seed, step, "mask"),
        )[shuffled_share(recipe, step)]
        return Masked(clean, masking.of_voxels(to_device(mask, clean.device), spec.block_size))

    def losses(self, views: Masked) -> Losses:
        """Mean squared error over the hidden voxels."""
        seen = views.clean.masked_fill(views.is_hidden, 0.0)
        restored = intensities.restore(self.student(seen), self.recipe)
        return Losses(masking.masked_error(restored, views.clean, views.is_hidden), {})
