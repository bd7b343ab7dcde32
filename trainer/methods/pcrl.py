"""PCRL: contrast two views and reconstruct what the decoder is asked for.

Zhou et al., "Preservational Learning Improves Self-supervised Medical Image Models by
Reconstructing Diverse Contexts", ICCV 2021, section 3. What differs between the paper, the authors'
code and our recommendation are fields of the recipe (docs/methods/pcrl.md). Where the paper leaves
a choice:

- One TransAtt serves all three encoders, as the decoder does; it is trained with the decoder and
  has no momentum copy.
- g_h has no parameters of its own and is g_o.
- The decodes run one after another, so each normalises by its own batch statistics.
- The momentum encoder normalises by batch statistics too, in shuffled groups; its running
  statistics follow the ordinary encoder's by the EMA and by nothing else.

Suffixes: o ordinary, m momentum, h hybrid encoder; 1 clean, 2 corrupted view.
B batch, C channels of the bottleneck, E embedding, N queue, I J K voxels; in 2D I J pixels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from models import recipe as recipes
from models.networks.encoder_alone import EncoderAlone
from models.networks.heads import Projector, TransAttention
from models.networks.resnet_unet2d import Features2d, ResNet18Encoder
from models.networks.unet3d import Features, SkipResponses, UNet3d, UNet3dEncoder, pooled
from models.recipe import AnyPretrain, PretrainRecipe
from trainer import ema
from trainer.build import build_student
from trainer.data import augment
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods import intensities
from trainer.methods import views as batches
from trainer.methods.contrast import contrast_terms, encode_in_groups, gathered
from trainer.methods.method import Method
from trainer.methods.mixing import mix
from trainer.methods.queue import Queue
from trainer.methods.rotnet import NUM_TURNS
from trainer.methods.views import Views

AnyFeatures = Features | Features2d


@dataclass(frozen=True, slots=True)
class Losses:
    """What a step minimises, its parts, and what the step leaves behind."""

    total: Tensor
    contrast: Tensor
    reconstruction: dict[str, Tensor]
    """Mean squared error of each decode, by the recipe's name of it."""
    rotation: Tensor | None
    """Cross-entropy of RotNet's task, where the recipe has it."""
    pushed: Tensor
    """Embeddings for the queue in the recipe's order, detached, (pushes * B, E)."""
    scans: Tensor
    """The scan of each, (pushes * B,)."""
    normaliser: Tensor
    """Z of the binary NCE after this step, scalar."""

    def named(self) -> dict[str, Tensor]:
        """Detached scalars for the metrics."""
        parts = {f"reconstruction_{e}": loss for e, loss in self.reconstruction.items()}
        every = {"loss": self.total, "contrast": self.contrast, **parts}
        if self.rotation is not None:
            every["rotation"] = self.rotation
        return {name: value.detach() for name, value in every.items()}


class Pcrl(Method[Views, Losses]):
    """The networks and the queue of PCRL; its `state_dict` is all that a resume needs of them."""

    normaliser: Tensor

    def __init__(self, recipe: AnyPretrain) -> None:
        super().__init__(recipe)
        method, network = recipe.method, recipe.network
        assert isinstance(method, recipes.Pcrl)
        self.spec = method
        self.student = build_student(recipe, fused=_is_fused(recipe))
        self.attention: TransAttention | None = None
        if method.attention != "none" and method.trains_decoder:
            self.attention = TransAttention(
                network.num_features,
                kind=method.attention,
                rank=method.outer_rank,
                post_conv=method.post_conv,
                num_indicators=augment.num_indicators(network.dims),
                dims=network.dims,
            )
        self.projector = Projector(network.num_features, method.embedding_size)
        self.momentum_encoder: UNet3dEncoder | ResNet18Encoder = copy.deepcopy(self.student.encoder)
        self.momentum_projector: Projector = copy.deepcopy(self.projector)
        ema.freeze(self.momentum_encoder)
        ema.freeze(self.momentum_projector)
        self.queue = Queue(method.queue_size, method.embedding_size)
        self.register_buffer("normaliser", torch.zeros(()))
        if method.rotation_weight > 0:
            self.rotation_head = nn.Linear(network.num_features, NUM_TURNS)

    def make_views(
        self, volumes: Resident | ResidentImages, sampler: PairSampler | None, step: int
    ) -> Views:
        """Draw and make the batch of a step; depends on the recipe's seed and the step alone."""
        return batches.make_views(self.recipe, volumes, sampler, step)

    def losses(self, views: Views) -> Losses:
        """Eq. 5-8 of the paper for one batch."""
        method = self.spec
        features_o: AnyFeatures = self.student.encoder(views.input_o)
        features_m = encode_in_groups(self.momentum_encoder, views.input_m, self.recipe)
        plain = _with_hybrid(features_o.bottleneck, features_m.bottleneck, views.mix)
        attended = self._attend(plain, views)
        reconstruction = {}
        if method.trains_decoder:
            skips = self._skips(features_o, features_m, views.mix)
            reconstruction = self._reconstruct(attended, skips, self._targets(views))
        embeddings = self._embed(attended if method.projector_input == "post" else plain)
        if method.has_mixup_pass:
            more_reconstruction, more_embeddings = self._mixup_pass(views, embeddings["key"])
            reconstruction |= more_reconstruction
            embeddings |= more_embeddings
        contrast, normaliser = contrast_terms(
            method, self.queue, self.normaliser, embeddings, views.scan
        )
        total = method.contrast_weight * contrast
        if reconstruction:
            restored = torch.stack(list(reconstruction.values()))
            restored = (
                restored.sum() if method.reconstruction_reduction == "sum" else restored.mean()
            )
            total = total + method.reconstruction_weight * restored
        rotation = None
        if method.rotation_weight > 0:
            rotation = self._rotation(views)
            total = total + method.rotation_weight * rotation
        return Losses(
            total=total,
            contrast=contrast,
            reconstruction=reconstruction,
            rotation=rotation,
            pushed=torch.cat([embeddings[name].detach() for name in method.push]),
            scans=views.scan.repeat(len(method.push)),
            normaliser=normaliser,
        )

    @torch.no_grad()
    def update(self, losses: Losses) -> None:
        """After the optimizer's step: move the momentum networks (Eq. 9), push to the queue."""
        beta = self.spec.ema_momentum
        ema.update(self.momentum_encoder, self.student.encoder, beta)
        ema.update(self.momentum_projector, self.projector, beta)
        num_kinds = len(self.spec.push)
        self.queue.push(gathered(losses.pushed, num_kinds), gathered(losses.scans, num_kinds))
        self.normaliser.copy_(losses.normaliser)

    def _attend(self, plain: dict[str, Tensor], views: Views) -> dict[str, Tensor]:
        """TransAtt on each bottleneck; the hybrid is mixed before it or after it (row 6)."""
        if self.attention is None:
            return plain
        if self.spec.crossmix == "before_attention":
            pairs = zip(plain.items(), views.indicators, strict=True)
            return {encoder: self.attention(x, indicator) for (encoder, x), indicator in pairs}
        indicator_o, indicator_m = views.indicators
        attended_o = self.attention(plain["o"], indicator_o)
        attended_m = self.attention(plain["m"], indicator_m)
        return _with_hybrid(attended_o, attended_m, views.mix)

    def _targets(self, views: Views) -> dict[str, Tensor]:
        """T(X) of each encoder (Eq. 5 and 8), T_h of the mix or the mix of T_o and T_m."""
        is_clean = self.spec.target == "clean"
        view_o = views.clean_o if is_clean else views.input_o
        view_m = views.clean_m if is_clean else views.input_m
        if self.spec.crossmix == "before_attention":
            wanted = _with_hybrid(view_o, view_m, views.mix)
            pairs = zip(wanted.items(), views.indicators, strict=True)
            return {encoder: augment.apply_indicators(x, code) for (encoder, x), code in pairs}
        indicator_o, indicator_m = views.indicators
        target_o = augment.apply_indicators(view_o, indicator_o)
        target_m = augment.apply_indicators(view_m, indicator_m)
        return _with_hybrid(target_o, target_m, views.mix)

    def _skips(
        self, features_o: AnyFeatures, features_m: AnyFeatures, lam: Tensor
    ) -> dict[str, AnyFeatures] | dict[str, SkipResponses]:
        """What each decode takes from above the bottleneck.

        Fused, the hybrid's response to its mixed skips (Eq. 6) is the mix of the two responses:
        one convolution a level less (algorithms.md 6.4).
        """
        if not self.spec.skip:
            return {"o": features_o, "m": features_m, "h": features_o}  # the decoder reads none
        if not _is_fused(self.recipe):
            pairs = zip(features_o, features_m, strict=True)
            mixed = type(features_o)._make(mix(o, m, lam) for o, m in pairs)
            return {"o": features_o, "m": features_m, "h": mixed}
        assert isinstance(self.student, UNet3d)
        assert isinstance(features_o, Features) and isinstance(features_m, Features)
        response_o = self.student.decoder.skip_responses(features_o)
        response_m = self.student.decoder.skip_responses(features_m)
        responses = zip(response_o, response_m, strict=True)
        response_h = SkipResponses(*(mix(o, m, lam) for o, m in responses))
        return {"o": response_o, "m": response_m, "h": response_h}

    def _reconstruct(
        self,
        bottlenecks: dict[str, Tensor],
        skips: dict[str, AnyFeatures] | dict[str, SkipResponses],
        targets: dict[str, Tensor],
        prefix: str = "",
    ) -> dict[str, Tensor]:
        """Decode what the recipe lists; mean squared error of each, by its name there."""
        return {
            prefix + encoder: F.mse_loss(self._decode(x, skips[encoder]), targets[encoder])
            for encoder, x in bottlenecks.items()
            if prefix + encoder in self.spec.reconstructions
        }

    def _decode(self, bottleneck: Tensor, skips: AnyFeatures | SkipResponses) -> Tensor:
        """The reconstruction, float32 (B, 1, I, J, K), or (B, 3, I, J) in 2D.

        Through a sigmoid where intensities are bounded by a window; z-scores and images are not.
        """
        if isinstance(skips, SkipResponses):
            assert isinstance(self.student, UNet3d)
            decoded = self.student.decoder.decode(bottleneck, skips)
        else:
            assert not isinstance(self.student, EncoderAlone)
            decoded = self.student.decoder(skips._replace(bottleneck=bottleneck))
        return intensities.restore(self.student.out(decoded), self.recipe)

    def _embed(self, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Query, key and, if it is pushed, the hybrid's embedding, (B, E) each (Eq. 7)."""
        embeddings = {"query": self.projector(seen["o"])}
        with torch.no_grad():
            embeddings["key"] = self.momentum_projector(seen["m"])
            if "hybrid" in self.spec.push:
                embeddings["hybrid"] = self.projector(seen["h"])
        return embeddings

    def _rotation(self, views: Views) -> Tensor:
        """RotNet's task on the ordinary view (table 2), one turn a sample, not all four of each."""
        codes = F.one_hot(views.turns, NUM_TURNS)
        unflipped = codes.new_zeros(len(codes), self.recipe.network.dims)
        turned = augment.apply_indicators(views.input_o, torch.cat([unflipped, codes], dim=1))
        logits = self.rotation_head(pooled(self.student.encoder(turned).bottleneck))
        return F.cross_entropy(logits.float(), views.turns)

    def _mixup_pass(self, views: Views, key: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The official code's second pass: the batch mixed with itself, without TransAtt.

        Departs from that code in its target, which is not flipped and turned with the input there.

        Returns:
            Reconstruction losses and embeddings, by the recipe's names of them.
        """

        def mixed(x: Tensor) -> Tensor:
            return mix(x, x[views.partner], views.mixup)

        features_o: AnyFeatures = self.student.encoder(mixed(views.input_o))
        features_m = encode_in_groups(self.momentum_encoder, mixed(views.input_m), self.recipe)
        bottlenecks = _with_hybrid(features_o.bottleneck, features_m.bottleneck, views.mix)
        targets = _with_hybrid(mixed(views.clean_o), mixed(views.clean_m), views.mix)
        skips = self._skips(features_o, features_m, views.mix)
        reconstruction = self._reconstruct(bottlenecks, skips, targets, prefix="mixup_")
        embeddings = {"mixup_query": self.projector(bottlenecks["o"])}
        with torch.no_grad():
            embeddings["mixup_key"] = self.momentum_projector(bottlenecks["m"])
            embeddings["mixed_key"] = F.normalize(mixed(key), dim=1)
        return reconstruction, embeddings


def _is_fused(recipe: AnyPretrain) -> bool:
    return isinstance(recipe, PretrainRecipe) and recipe.fused


def _with_hybrid(ordinary: Tensor, momentum: Tensor, lam: Tensor) -> dict[str, Tensor]:
    """CrossMix (Eq. 5 and 6): both, and their mix."""
    return {"o": ordinary, "m": momentum, "h": mix(ordinary, momentum, lam)}
