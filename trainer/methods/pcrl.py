"""PCRL, preset `paper`: contrast two views and reconstruct what the decoder is asked for.

Zhou et al., "Preservational Learning Improves Self-supervised Medical Image Models by
Reconstructing Diverse Contexts", ICCV 2021, section 3. Where the paper leaves a choice:

- One TransAtt serves all three encoders, as the decoder does; it is trained with the decoder and
  has no momentum copy.
- g_h has no parameters of its own and is g_o.
- The three decodes run one after another, so each normalises by its own batch statistics.
- The momentum encoder normalises by batch statistics too, in shuffled groups; its running
  statistics follow the ordinary encoder's by the EMA and by nothing else.

Suffixes: o ordinary, m momentum, h hybrid encoder; 1 clean, 2 corrupted view.
B batch, C channels of the bottleneck, E embedding, N queue, I J K voxels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from models.networks.heads import Projector, TransAttention
from models.networks.unet3d import Features, SkipResponses, UNet3d, UNet3dEncoder
from models.recipe import PretrainRecipe
from trainer import ema
from trainer.data import augment
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.losses import nce_loss
from trainer.randomness import generator


@dataclass(frozen=True, slots=True)
class Views:
    """One batch, and what was drawn for it.

    Attributes:
        clean_o: X_o^1, cropped, flipped and rotated, (B, 1, I, J, K) in network intensities.
        clean_m: X_m^1.
        input_o: X_o^2, painted and blurred.
        input_m: X_m^2.
        indicators: vec(T) of the three encoders, (3, B, 7).
        mix: lambda of CrossMix, one for features and target.
        order: Shuffle of the batch before the momentum encoder, (B,).
    """

    clean_o: Tensor
    clean_m: Tensor
    input_o: Tensor
    input_m: Tensor
    indicators: Tensor
    mix: float
    order: Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """What a step minimises, its parts, and the embeddings to push."""

    total: Tensor
    contrast: Tensor
    reconstruction: dict[str, Tensor]
    """Mean squared error of each decode, by encoder."""
    pushed: Tensor
    """q, k and h, detached, (3 B, E)."""

    def named(self) -> dict[str, Tensor]:
        """Detached scalars for the metrics."""
        parts = {f"reconstruction_{e}": loss for e, loss in self.reconstruction.items()}
        every = {"loss": self.total, "contrast": self.contrast, **parts}
        return {name: value.detach() for name, value in every.items()}


class Pcrl(nn.Module):
    """The networks and the queue of PCRL; its `state_dict` is all that a resume needs of them."""

    queue: Tensor
    queue_pointer: Tensor

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        method, width = recipe.method, recipe.network.base_width
        channels = 16 * width
        self.recipe = recipe
        self.student = UNet3d(1, 1, width, "batch", fused=recipe.fused)
        self.attention = TransAttention(
            channels, kind=method.attention, rank=method.outer_rank, post_conv=method.post_conv
        )
        self.projector = Projector(channels, method.embedding_size)
        self.momentum_encoder: UNet3dEncoder = copy.deepcopy(self.student.encoder)
        self.momentum_projector: Projector = copy.deepcopy(self.projector)
        ema.freeze(self.momentum_encoder)
        ema.freeze(self.momentum_projector)
        queue = F.normalize(torch.randn(method.queue_size, method.embedding_size), dim=1)
        self.register_buffer("queue", queue)
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.long))

    def trained(self) -> list[nn.Parameter]:
        """Parameters that the optimizer moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def make_views(self, volumes: Resident, sampler: PairSampler, step: int) -> Views:
        """Draw and make the batch of a step; depends on the recipe's seed and the step alone."""
        crops, seed, batch = self.recipe.crops, self.recipe.seed, self.recipe.batch_size
        device = volumes.flat.device
        pairs = sampler.draw(batch, generator(seed, step, "pairs"))
        shapes = generator(seed, step, "geometry")
        clean = [
            augment.make_clean(
                volumes, crops, pairs, view, augment.draw_geometry(crops, batch, shapes)
            )
            for view in (0, 1)
        ]
        painting = generator(seed, step, "painting")
        noise = generator(seed, step, "noise", device)
        kind = augment.draw_painting(crops, batch, painting)
        spoiled = [
            augment.corrupt(view, augment.draw_corruption(crops, kind, painting), noise)
            for view in clean
        ]
        codes = generator(seed, step, "indicators")
        indicators = torch.stack([augment.draw_indicators(batch, codes) for _ in range(3)])
        return Views(
            clean_o=clean[0],
            clean_m=clean[1],
            input_o=spoiled[0],
            input_m=spoiled[1],
            indicators=indicators.to(device),
            mix=_draw_mix(self.recipe.method.mix_alpha, generator(seed, step, "mix")),
            order=torch.randperm(batch, generator=generator(seed, step, "order")).to(device),
        )

    def losses(self, views: Views) -> Losses:
        """Eq. 5-8 of the paper for one batch."""
        method = self.recipe.method
        lam = views.mix
        features_o: Features = self.student.encoder(views.input_o)
        features_m = self._encode_momentum(views)
        bottlenecks = {
            "o": features_o.bottleneck,
            "m": features_m.bottleneck,
            "h": _mix(features_o.bottleneck, features_m.bottleneck, lam),
        }
        skips = self._skips(features_o, features_m, lam)
        clean = {
            "o": views.clean_o,
            "m": views.clean_m,
            "h": _mix(views.clean_o, views.clean_m, lam),
        }
        seen, reconstruction = {}, {}
        for encoder, indicator in zip("omh", views.indicators, strict=True):
            attended: Tensor = self.attention(bottlenecks[encoder], indicator)
            decoded = self._reconstruct(attended, skips[encoder])
            target = augment.apply_indicators(clean[encoder], indicator)
            reconstruction[encoder] = F.mse_loss(decoded, target)
            seen[encoder] = attended if method.projector_input == "post" else bottlenecks[encoder]
        query = self.projector(seen["o"])
        with torch.no_grad():
            key = self.momentum_projector(seen["m"])
            hybrid = self.projector(seen["h"])
        contrast = nce_loss(query, key, self.queue, method.temperature)
        restored = torch.stack(list(reconstruction.values())).sum()
        total = method.contrast_weight * contrast + method.reconstruction_weight * restored
        pushed = torch.cat([query.detach(), key, hybrid])
        return Losses(total, contrast, reconstruction, pushed)

    def decode(self, features: Features, indicator: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct what the indicator asks for.

        Returns:
            The reconstruction in [0, 1], float32 (B, 1, I, J, K), and F^(l+1), the bottleneck after
            TransAtt.
        """
        attended: Tensor = self.attention(features.bottleneck, indicator)
        return self._reconstruct(attended, features), attended

    @torch.no_grad()
    def update(self, losses: Losses) -> None:
        """After the optimizer's step: move the momentum networks (Eq. 9), push to the queue."""
        beta = self.recipe.method.ema_momentum
        ema.update(self.momentum_encoder, self.student.encoder, beta)
        ema.update(self.momentum_projector, self.projector, beta)
        self.push(losses.pushed)

    @torch.no_grad()
    def push(self, vectors: Tensor) -> None:
        """Overwrite the oldest vectors of the queue; nothing waits for the device."""
        size = len(self.queue)
        at = (self.queue_pointer + torch.arange(len(vectors), device=vectors.device)) % size
        self.queue[at] = vectors
        self.queue_pointer.copy_((self.queue_pointer + len(vectors)) % size)

    def _skips(
        self, features_o: Features, features_m: Features, lam: float
    ) -> dict[str, Features] | dict[str, SkipResponses]:
        """What each decode takes from above the bottleneck.

        Fused, the hybrid's response to its mixed skips (Eq. 6) is the mix of the two responses:
        one convolution a level less (algorithms.md 6.4).
        """
        if not self.recipe.fused:
            mixed = mix_features(features_o, features_m, lam)
            return {"o": features_o, "m": features_m, "h": mixed}
        response_o = self.student.decoder.skip_responses(features_o)
        response_m = self.student.decoder.skip_responses(features_m)
        pairs = zip(response_o, response_m, strict=True)
        response_h = SkipResponses(*(_mix(o, m, lam) for o, m in pairs))
        return {"o": response_o, "m": response_m, "h": response_h}

    def _reconstruct(self, attended: Tensor, skips: Features | SkipResponses) -> Tensor:
        """Decode a bottleneck that went through TransAtt."""
        if isinstance(skips, SkipResponses):
            decoded = self.student.decoder.decode(attended, skips)
        else:
            decoded = self.student.decoder(skips._replace(bottleneck=attended))
        return torch.sigmoid(self.student.out(decoded).float())

    @torch.no_grad()
    def _encode_momentum(self, views: Views) -> Features:
        """Encode in shuffled groups, so that a key's batch statistics do not give its query away.

        On one device this is what shuffling over devices is in MoCo (row 22).
        """
        shuffled = views.input_m[views.order]
        groups = min(self.recipe.method.momentum_groups, len(shuffled) // 2)
        parts = [self.momentum_encoder(part) for part in shuffled.chunk(groups)]
        back = views.order.argsort()
        return Features(*(torch.cat(level)[back] for level in zip(*parts, strict=True)))


def mix_features(ordinary: Features, momentum: Features, lam: float) -> Features:
    """CrossMix (Eq. 6) on all four levels, before TransAtt."""
    return Features(*(_mix(o, m, lam) for o, m in zip(ordinary, momentum, strict=True)))


def _mix(ordinary: Tensor, momentum: Tensor, lam: float) -> Tensor:
    return lam * ordinary + (1.0 - lam) * momentum


def _draw_mix(alpha: float, random: torch.Generator) -> float:
    seed = int(torch.randint(2**62, (1,), generator=random))
    return float(np.random.default_rng(seed).beta(alpha, alpha))
