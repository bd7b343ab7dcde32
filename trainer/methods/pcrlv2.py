"""PCRLv2: restore corrupted crops, and make the decoder's levels agree between crops.

Zhou et al., "A Unified Visual Information Preservation Framework for Self-supervised Pre-training
in Medical Image Analysis", TPAMI 2023, as its official code has it (algorithms.md 2): no momentum
encoder, no queue, no skips; SimSiam at one level of the decoder a step. See docs/methods/pcrlv2.md.

B samples, L locals of each, C channels of a level, I J K voxels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from models import recipe as recipes
from models.networks.unet3d import UNet3d, pooled
from models.recipe import AnyPretrain, PretrainRecipe
from trainer.build import build_student
from trainer.data import augment, degrade
from trainer.data.images2d import ResidentImages
from trainer.data.local_boxes import draw_locals
from trainer.data.resident import Resident
from trainer.data.sampling import Pairs, PairSampler
from trainer.errors import DataError
from trainer.methods import intensities
from trainer.methods.losses import Losses
from trainer.methods.method import Method
from trainer.methods.pairs import shuffled_share
from trainer.randomness import generator, take

NUM_LEVELS = 3


@dataclass(frozen=True, slots=True)
class Views:
    """Two global crops of each sample and local ones.

    Attributes:
        clean: The global crops, (B, 1, I, J, K) each.
        seen: The same, corrupted.
        seen_locals: Corrupted local crops, local after local, (L * B, 1, I', J', K').
        level: Of the decoder, from coarse to fine, that is contrasted in this step.
        mid_weight: beta, of restoring from that level alone.
    """

    clean: tuple[Tensor, Tensor]
    seen: tuple[Tensor, Tensor]
    seen_locals: Tensor
    level: int
    mid_weight: float


class PcrlV2(Method[Views, Losses]):
    """The U-Net without skips; a projection, a prediction and an output for each level."""

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe, PretrainRecipe) and isinstance(recipe.method, recipes.PcrlV2)
        self.spec = recipe.method
        student = build_student(recipe, fused=recipe.fused)
        assert isinstance(student, UNet3d)
        self.student: UNet3d = student
        widths = [8 * recipe.network.base_width // 2**level for level in range(NUM_LEVELS)]
        self.projections = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)
        self.predictions = nn.ModuleList(_predictor(width) for width in widths)
        self.mid_outputs = nn.ModuleList(
            nn.Sequential(nn.Conv3d(width, 1, kernel_size=3, padding=1), nn.BatchNorm3d(1))
            for width in widths
        )

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Views:
        """Global and local crops, clean and corrupted; the level and beta of the step."""
        recipe, seed = self.recipe, self.recipe.seed
        assert isinstance(recipe, PretrainRecipe) and isinstance(volumes, Resident)
        assert sampler is not None
        drawn = sampler.draw(recipe.batch_size, generator(seed, step, "pairs"))
        pairs = take(drawn, shuffled_share(recipe, step))
        globals_ = [self._views_of(volumes, recipe, pairs, step, view=view) for view in (0, 1)]
        crops = recipe.crops.model_copy(
            update={"input_size": self.spec.local_input_size, "crop_sizes": self.spec.local_sizes}
        )
        if (volumes.shapes.amin(dim=0) < torch.tensor(crops.crop_sizes).amax(dim=0)).any():
            raise DataError("small_scan", "a local crop is larger than a padded scan")
        boxes = draw_locals(
            pairs,
            recipe.crops.crop_sizes,
            crops.crop_sizes,
            volumes.shapes,
            num_locals=self.spec.num_locals,
            margin=self.spec.local_margin,
            random=generator(seed, step, "locals"),
        )
        local = recipe.model_copy(update={"crops": crops})
        level = int(torch.randint(NUM_LEVELS, (), generator=generator(seed, step, "level")))
        return Views(
            clean=(globals_[0][0], globals_[1][0]),
            seen=(globals_[0][1], globals_[1][1]),
            seen_locals=self._views_of(volumes, local, boxes, step, purpose="local")[1],
            level=level,
            mid_weight=0.5 * (1.0 + math.cos(math.pi * (step - 1) / recipe.num_steps)),
        )

    def losses(self, views: Views) -> Losses:
        """Restoration, agreement of globals and with locals, restoration from one level."""
        level = views.level
        decoded = [self._levels(seen) for seen in views.seen]
        restored = _mean(
            F.mse_loss(intensities.restore(self.student.out(levels[-1]), self.recipe), clean)
            for levels, clean in zip(decoded, views.clean, strict=True)
        )
        from_level = _mean(
            F.mse_loss(self._from_level(levels[level], level, clean), clean)
            for levels, clean in zip(decoded, views.clean, strict=True)
        )
        (z_one, p_one), (z_other, p_other) = (self._embed(x[level], level) for x in decoded)
        agreement = agree(z_one, p_one, z_other, p_other)
        z_local, p_local = self._embed(self._levels(views.seen_locals)[level], level)
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

    def _views_of(
        self,
        volumes: Resident,
        recipe: PretrainRecipe,
        pairs: Pairs,
        step: int,
        *,
        view: int = 0,
        purpose: str = "global",
    ) -> tuple[Tensor, Tensor]:
        """A clean crop of each box, and the same corrupted."""
        crops, seed, count = recipe.crops, recipe.seed, len(pairs.volume)
        shapes = generator(seed, step, f"{purpose} geometry {view}")
        geometry = augment.draw_geometry(crops, count, shapes)
        clean = augment.make_clean(volumes, crops, pairs, view, geometry)
        drawn = degrade.draw(
            self.spec,
            crops.max_blur_sigma,
            crops.input_size,
            count,
            generator(seed, step, f"{purpose} corruption {view}"),
        )
        noise = generator(seed, step, f"{purpose} noise {view}", clean.device)
        return clean, degrade.degrade(clean, drawn, self.spec.swap_patch, noise)

    def _levels(self, images: Tensor) -> list[Tensor]:
        """What the decoder's levels make of the bottleneck, from coarse to fine."""
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
        extents = list(like.shape[2:])
        return F.interpolate(small, size=extents, mode="trilinear", align_corners=False)


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


def _predictor(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.BatchNorm1d(2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, width),
    )


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
