"""PCRLv2: restore corrupted crops, and make the decoder's levels agree between crops.

Zhou et al., "A Unified Visual Information Preservation Framework for Self-supervised Pre-training
in Medical Image Analysis", TPAMI 2023, as its official code has it (algorithms.md 2): no momentum
encoder, no queue, no skips; SimSiam at one level of the decoder a step. See docs/methods/pcrlv2.md.

B samples, L locals of each, C channels of a level, I J K voxels; in 2D I J pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from models import recipe as recipes
from models.networks.resnet_unet2d import ResNetUNet2d
from models.networks.unet3d import UNet3d, pooled
from models.recipe import AnyPretrain, PretrainRecipe, PretrainRecipe2d
from trainer.build import build_student
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods import intensities, pcrlv2_views
from trainer.methods.losses import Losses
from trainer.methods.method import Method
from trainer.methods.pcrlv2_views import Crops
from trainer.randomness import generator


@dataclass(frozen=True, slots=True)
class Views:
    """Crops, and what was drawn for the step.

    Attributes:
        crops: Global and local ones.
        level: Of the decoder, from coarse to fine, that is contrasted in this step.
        mid_weight: beta, of restoring from that level alone.
    """

    crops: Crops
    level: int
    mid_weight: float


class PcrlV2(Method[Views, Losses]):
    """The U-Net without skips; a projection, a prediction and an output for each level."""

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, recipes.PcrlV2)
        self.spec = recipe.method
        fused = isinstance(recipe, PretrainRecipe) and recipe.fused
        student = build_student(recipe, fused=fused)
        assert isinstance(student, UNet3d | ResNetUNet2d)
        self.student: UNet3d | ResNetUNet2d = student
        widths = _widths(recipe)
        self.projections = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)
        self.predictions = nn.ModuleList(_predictor(width) for width in widths)
        make_output = _output_2d if isinstance(recipe, PretrainRecipe2d) else _output_3d
        self.mid_outputs = nn.ModuleList(make_output(width) for width in widths)

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Views:
        """Global and local crops, clean and corrupted; the level and beta of the step."""
        recipe = self.recipe
        if isinstance(volumes, ResidentImages):
            assert isinstance(recipe, PretrainRecipe2d)
            crops = pcrlv2_views.of_images(recipe, self.spec, volumes, step)
        else:
            assert isinstance(recipe, PretrainRecipe) and sampler is not None
            crops = pcrlv2_views.of_volumes(recipe, self.spec, volumes, sampler, step)
        num_levels = len(self.projections)
        level = int(torch.randint(num_levels, (), generator=generator(recipe.seed, step, "level")))
        return Views(
            crops=crops,
            level=level,
            mid_weight=0.5 * (1.0 + math.cos(math.pi * (step - 1) / recipe.num_steps)),
        )

    def losses(self, views: Views) -> Losses:
        """Restoration, agreement of globals and with locals, restoration from one level."""
        level, crops = views.level, views.crops
        decoded = [self._levels(seen) for seen in crops.seen]
        restored = _mean(
            F.mse_loss(intensities.restore(self.student.out(levels[-1]), self.recipe), clean)
            for levels, clean in zip(decoded, crops.clean, strict=True)
        )
        from_level = _mean(
            F.mse_loss(self._from_level(levels[level], level, clean), clean)
            for levels, clean in zip(decoded, crops.clean, strict=True)
        )
        (z_one, p_one), (z_other, p_other) = (self._embed(x[level], level) for x in decoded)
        agreement = agree(z_one, p_one, z_other, p_other)
        z_local, p_local = self._embed(self._levels(crops.seen_locals)[level], level)
        times = self.spec.num_locals
        local = _mean(
            agree(z_local, p_local, z.repeat(times, 1), p.repeat(times, 1))
            for z, p in ((z_one, p_one), (z_other, p_other))
        )
        # The other levels' heads get gradients of 0: torch 2.13's fused SGD fails where a parameter
        # has none in its first step and one later.
        heads = (self.projections, self.predictions, self.mid_outputs)
        idle = sum(p.sum() for modules in heads for p in modules.parameters())
        return Losses(
            restored + agreement + local + views.mid_weight * from_level + 0.0 * idle,
            {
                "reconstruction": restored,
                "agreement": agreement,
                "local_agreement": local,
                "level_reconstruction": from_level,
            },
        )

    def _levels(self, images: Tensor) -> list[Tensor]:
        """What the decoder's levels make of the bottleneck, from coarse to fine."""
        if isinstance(self.student, ResNetUNet2d):
            return self.student.decoder.levels(self.student.encoder(images))
        features, decoder = self.student.encoder(images), self.student.decoder
        at256 = decoder.up256(features.bottleneck, features.skip256)
        at128 = decoder.up128(at256, features.skip128)
        return [at256, at128, decoder.up64(at128, features.skip64)]

    def _embed(self, decoded: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Projection and prediction of a level, (B, C) each."""
        projected: Tensor = self.projections[level](pooled(decoded))
        return projected, self.predictions[level](projected)

    def _from_level(self, decoded: Tensor, level: int, like: Tensor) -> Tensor:
        """The crop, restored from one level by one convolution, at full extent."""
        small = intensities.restore(self.mid_outputs[level](decoded), self.recipe)
        mode = "trilinear" if like.ndim == 5 else "bilinear"
        return F.interpolate(small, size=list(like.shape[2:]), mode=mode, align_corners=False)


def agree(z_one: Tensor, p_one: Tensor, z_other: Tensor, p_other: Tensor) -> Tensor:
    """SimSiam (Chen and He, 2021, Eq. 2): minus the cosine of predictions and still projections.

        for each sample b:
            loss -= cos(p_one[b], z_other[b]) / 2 + cos(p_other[b], z_one[b]) / 2

    Args:
        z_one: Projections, (B, E); they carry no gradient.
        p_one: Predictions, (B, E).
        z_other: Of the other crop.
        p_other: Of the other crop.
    """
    one = F.cosine_similarity(p_one.float(), z_other.detach().float(), dim=1)
    other = F.cosine_similarity(p_other.float(), z_one.detach().float(), dim=1)
    return -0.5 * (one.mean() + other.mean())


def _widths(recipe: AnyPretrain) -> list[int]:
    """Channels of the decoder's levels, from coarse to fine: three in 3D, five in 2D."""
    if isinstance(recipe, PretrainRecipe2d):
        return [4 * recipe.network.width // 2**level for level in range(5)]
    return [8 * recipe.network.base_width // 2**level for level in range(3)]


def _output_3d(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(width, 1, kernel_size=3, padding=1), nn.BatchNorm3d(1))


def _output_2d(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, kernel_size=3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 3, kernel_size=1),
    )


def _predictor(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.BatchNorm1d(2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, width),
    )


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
