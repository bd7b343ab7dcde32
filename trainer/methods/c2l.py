"""C2L: contrast two views, the same views mixed with each other, and the mix of their embeddings.

Zhou et al., "Comparing to Learn: Surpassing ImageNet Pretraining on Radiographs by Comparing Image
Representations", MICCAI 2020. PCRL grew out of it: their public codes have memory and loss in
common, and so has this one (`trainer.methods.contrast`). See docs/methods/c2l.md.

B batch, E embedding, N queue.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models import recipe as recipes
from models.networks.heads import Projector
from models.recipe import AnyPretrain
from trainer import ema
from trainer.build import build_encoder, build_student
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.to_device import to_device
from trainer.methods.contrast import contrast_terms, encode_in_groups, gathered
from trainer.methods.method import Method
from trainer.methods.mixing import draw_mix, mix
from trainer.methods.pairs import make_pairs
from trainer.methods.queue import Queue
from trainer.randomness import generator


@dataclass(frozen=True, slots=True)
class Views:
    """Two corrupted views of each sample, and how the batch is mixed with itself.

    Attributes:
        query: What the ordinary encoder sees.
        key: What the momentum encoder sees.
        scan: Index of each sample's scan, int64 (B,).
        mixup: lambda, scalar.
        partner: Sample of the same rank that each is mixed with, (B,).
    """

    query: Tensor
    key: Tensor
    scan: Tensor
    mixup: Tensor
    partner: Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """What a step minimises, and what it leaves behind.

    Attributes:
        total: Mean of the contrastive terms.
        pushed: Embeddings for the queue in the recipe's order, (pushes * B, E).
        scans: The scan of each, (pushes * B,).
        normaliser: Z of the binary NCE after this step, scalar.
    """

    total: Tensor
    pushed: Tensor
    scans: Tensor
    normaliser: Tensor

    def named(self) -> dict[str, Tensor]:
        """Detached scalars for the metrics."""
        return {"loss": self.total.detach()}


class C2l(Method[Views, Losses]):
    """An ordinary and a momentum encoder with their projectors, and a queue."""

    normaliser: Tensor

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.method, recipes.C2l)
        self.spec = recipe.method
        self.student = build_student(recipe, fused=False)
        self.projector = Projector(recipe.network.num_features, self.spec.embedding_size)
        self.momentum_encoder = build_encoder(recipe)
        self.momentum_encoder.load_state_dict(self.student.encoder.state_dict())
        self.momentum_projector: Projector = copy.deepcopy(self.projector)
        ema.freeze(self.momentum_encoder)
        ema.freeze(self.momentum_projector)
        self.queue = Queue(self.spec.queue_size, self.spec.embedding_size)
        self.register_buffer("normaliser", torch.zeros(()))

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Views:
        """PCRL's two corrupted views, a partner for each sample and a lambda."""
        pairs, seed = make_pairs(self.recipe, volumes, sampler, step), self.recipe.seed
        query, key = pairs.spoiled
        partner = torch.randperm(len(query), generator=generator(seed, step, "partner"))
        drawn = draw_mix(self.spec, generator(seed, step, "mixup"))
        return Views(
            query=query,
            key=key,
            scan=pairs.scan,
            mixup=torch.full((), drawn, device=query.device),
            partner=to_device(partner, query.device),
        )

    def losses(self, views: Views) -> Losses:
        """NCE of (q, k), of (q', k') of the mixed batches, and of (q', the mix of the k)."""
        embeddings = self._embed(views)
        total, normaliser = contrast_terms(
            self.spec, self.queue, self.normaliser, embeddings, views.scan
        )
        return Losses(
            total=total,
            pushed=torch.cat([embeddings[name].detach() for name in self.spec.push]),
            scans=views.scan.repeat(len(self.spec.push)),
            normaliser=normaliser,
        )

    @torch.no_grad()
    def update(self, losses: Losses) -> None:
        """Move the momentum networks, push to the queue."""
        ema.update(self.momentum_encoder, self.student.encoder, self.spec.ema_momentum)
        ema.update(self.momentum_projector, self.projector, self.spec.ema_momentum)
        num_kinds = len(self.spec.push)
        self.queue.push(gathered(losses.pushed, num_kinds), gathered(losses.scans, num_kinds))
        self.normaliser.copy_(losses.normaliser)

    def _embed(self, views: Views) -> dict[str, Tensor]:
        """Unit-length embeddings (B, E), by their names in the recipe."""

        def mixed(x: Tensor) -> Tensor:
            return mix(x, x[views.partner], views.mixup)

        def key_of(images: Tensor) -> Tensor:
            features = encode_in_groups(self.momentum_encoder, images, self.recipe)
            embedded: Tensor = self.momentum_projector(features.bottleneck)
            return embedded

        embeddings = {
            "query": self.projector(self.student.encoder(views.query).bottleneck),
            "mixup_query": self.projector(self.student.encoder(mixed(views.query)).bottleneck),
        }
        with torch.no_grad():
            embeddings["key"] = key_of(views.key)
            embeddings["mixup_key"] = key_of(mixed(views.key))
            embeddings["mixed_key"] = F.normalize(mixed(embeddings["key"]), dim=1)
        return embeddings
