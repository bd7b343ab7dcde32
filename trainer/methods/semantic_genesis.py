"""Semantic Genesis: restore a crop, and tell which anatomical pattern it shows.

Haghighi et al., "Learning Semantics-enriched Representation via Self-discovery,
Self-classification, and Self-restoration", MICCAI 2020 (docs/methods/semantic_genesis.md). The
classes are found before the first step and kept in the method's state, so a resume has them.

B samples, C classes, N scans of a class, I J K voxels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models import recipe as recipes
from models.networks.pattern_head import PatternHead
from models.networks.unet3d import UNet3d
from models.recipe import AnyPretrain, PretrainRecipe
from trainer.build import build_student
from trainer.data import augment, bezier, elastic, shuffle
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.to_device import to_device
from trainer.methods import intensities, lookalikes, patterns
from trainer.methods.losses import Losses
from trainer.methods.method import Method
from trainer.randomness import generator
from trainer.report import Report

NOT_THERE = -1


@dataclass(frozen=True, slots=True)
class Patterns:
    """What the network sees and what it shall give back, (B, 1, I, J, K) each, and classes (B,)."""

    spoiled: Tensor
    clean: Tensor
    label: Tensor


class SemanticGenesis(Method[Patterns, Losses]):
    """The U-Net, a head of classes, and what the classes are."""

    share: Tensor
    neighbours: Tensor

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe, PretrainRecipe)
        assert isinstance(recipe.method, recipes.SemanticGenesis)
        self.spec = spec = recipe.method
        self.student = build_student(recipe, fused=recipe.fused)
        self.head = PatternHead(recipe.network.num_features, spec.head_width, spec.num_classes)
        self.register_buffer("share", torch.zeros(spec.num_classes, 3, dtype=torch.float64))
        unknown = torch.full((spec.num_classes, spec.neighbours), NOT_THERE)
        self.register_buffer("neighbours", unknown)
        self._on_host: tuple[Tensor, Tensor] | None = None

    def prepare(
        self,
        volumes: Resident | ResidentImages,
        sampler: PairSampler | None,
        report: Report,
        should_stop: Callable[[], bool],
    ) -> bool:
        """Find the classes: scans that look alike, and places in them."""
        assert isinstance(self.recipe, PretrainRecipe)
        assert isinstance(volumes, Resident) and sampler is not None
        features = lookalikes.describe(self.recipe, volumes, report, should_stop)
        places = patterns.find_places(self.recipe, volumes.shapes, sampler)
        count = min(self.spec.neighbours, len(volumes.shapes))
        found = lookalikes.nearest(features, to_device(places.reference, features.device), count)
        self._on_host = None
        self.share.copy_(places.share)
        self.neighbours[:, :count] = found
        return True

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Patterns:
        """Crops of patterns, as they are and transformed."""
        recipe = self.recipe
        assert isinstance(recipe, PretrainRecipe) and isinstance(volumes, Resident)
        share, neighbours = self._classes()
        chosen = patterns.choose(recipe, neighbours.shape[1], step)
        sizes = torch.tensor(recipe.crops.crop_sizes)
        boxes = patterns.place_crops(chosen, share, neighbours, volumes.shapes, sizes)
        geometry = augment.draw_geometry(
            recipe.crops, recipe.batch_size, generator(recipe.seed, step, "geometry")
        )
        clean = augment.make_clean(volumes, recipe.crops, boxes, 0, geometry)
        spoiled = transformed(recipe, clean, step)
        return Patterns(spoiled, clean, to_device(chosen.label, clean.device))

    def _classes(self) -> tuple[Tensor, Tensor]:
        """Places and scans of the classes, fetched from the device once: a copy waits for it."""
        if self._on_host is None:
            neighbours = self.neighbours.cpu()
            count = int((neighbours[0] != NOT_THERE).sum())
            self._on_host = self.share.cpu(), neighbours[:, :count]
        return self._on_host

    def losses(self, views: Patterns) -> Losses:
        """Mean squared error over all voxels, and cross-entropy over the classes."""
        assert isinstance(self.student, UNet3d)
        features = self.student.encoder(views.spoiled)
        restored = intensities.restore(
            self.student.out(self.student.decoder(features)), self.recipe
        )
        logits = self.head(features.bottleneck)
        restoration = F.mse_loss(restored, views.clean)
        entropy = F.cross_entropy(logits, views.label)
        total = self.spec.restoration_weight * restoration + self.spec.class_weight * entropy
        right = (logits.argmax(dim=1) == views.label).float().mean()
        parts = {"restoration": restoration, "classification": entropy, "class_accuracy": right}
        return Losses(total, parts)


def transformed(recipe: PretrainRecipe, clean: Tensor, step: int) -> Tensor:
    """Deform every crop, then shuffle it, bend its intensities, or paint one box: one of them.

    Args:
        recipe: Of Semantic Genesis.
        clean: Crops, (B, 1, I, J, K); not changed.
        step: From 1.
    """
    spec, seed, device = recipe.method, recipe.seed, clean.device
    assert isinstance(spec, recipes.SemanticGenesis)
    noise = elastic.draw_noise(clean.shape, generator(seed, step, "elastic", device))
    moved = elastic.displacement(noise, alpha=spec.elastic_alpha, sigma=spec.elastic_sigma)
    views = elastic.deform(clean, moved)
    batch, random = len(clean), generator(seed, step, "changes")
    change = torch.randint(len(spec.changes), (batch,), generator=random)
    chosen = {name: change == at for at, name in enumerate(spec.changes)}
    nowhere = torch.zeros(batch, dtype=torch.bool)
    (views,) = shuffle.shuffle_some(
        [views],
        chosen.get("shuffle", nowhere)[None],
        on_host=generator(seed, step, "extents"),
        on_device=generator(seed, step, "windows", device),
    )
    curves = bezier.draw(batch, 1.0, 0.5, random)
    applies = bezier.Curves(curves.inner, curves.falls, chosen.get("curve", nowhere))
    views = bezier.apply(views, applies, intensities.limits(views, recipe))
    painting = torch.full((batch,), augment.NONE)
    painting[chosen.get("inpaint", nowhere)] = augment.INPAINT
    painting[chosen.get("outpaint", nowhere)] = augment.OUTPAINT
    start, size = augment.draw_boxes(recipe.crops.input_size, painting, random)
    only = augment.Corruption(painting, start[:, :1], size[:, :1], torch.zeros(batch, 3))
    return augment.corrupt(views, only, generator(seed, step, "noise", device), in_place=True)
