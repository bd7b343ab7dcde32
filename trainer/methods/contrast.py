"""Contrast with a momentum encoder and a queue: what PCRL and C2L have in common.

B batch, E embedding, N queue, M vectors pushed at once.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from models.networks.resnet_unet2d import Features2d, ResNet18Encoder
from models.networks.unet3d import Features, UNet3dEncoder
from models.recipe import AnyPretrain, Contrast, Pushed
from trainer import distributed
from trainer.losses import binary_nce_loss, mean_candidate, nce_loss
from trainer.methods.queue import Queue

AnyFeatures = Features | Features2d

CONTRASTED = {
    "views": ("query", "key"),
    "mixup": ("mixup_query", "mixup_key"),
    "mixed_key": ("mixup_query", "mixed_key"),
}
"""Embeddings of each term of the contrastive loss, by the recipe's name of it."""


class ContrastSpec(Protocol):
    """The fields of a recipe that say how to contrast; see `models.recipe.pcrl`."""

    @property
    def contrast_loss(self) -> Literal["info_nce", "nce"]: ...  # noqa: D102
    @property
    def contrasts(self) -> tuple[Contrast, ...]: ...  # noqa: D102
    @property
    def push(self) -> tuple[Pushed, ...]: ...  # noqa: D102
    @property
    def push_when(self) -> Literal["after_step", "each_term"]: ...  # noqa: D102
    @property
    def mask_same_scan(self) -> bool: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102
    @property
    def normaliser_momentum(self) -> float: ...  # noqa: D102


@torch.no_grad()
def encode_in_groups(
    encoder: UNet3dEncoder | ResNet18Encoder, images: Tensor, recipe: AnyPretrain
) -> AnyFeatures:
    """Encode in shuffled groups, so that a key's batch statistics do not give its query away.

    What shuffling over devices is in MoCo (row 22): the batch was shuffled when it was drawn, and a
    rank holds whole groups, so no image and no feature travels (docs/adr/0007).
    """
    ours = recipe.method.num_groups(recipe.batch_size) // distributed.num_ranks()
    parts = [encoder(part) for part in images.chunk(ours)]
    encoded: AnyFeatures = type(parts[0])._make(map(torch.cat, zip(*parts, strict=True)))
    return encoded


def contrast_terms(
    spec: ContrastSpec,
    queue: Queue,
    normaliser: Tensor,
    embeddings: dict[str, Tensor],
    scan: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean of the recipe's contrastive terms, and Z of the binary NCE after this step.

    Args:
        spec: Which terms, and how.
        queue: The negatives; not changed.
        normaliser: Z before this step, scalar; 0 before the first.
        embeddings: (B, E) by their names in `CONTRASTED`.
        scan: Of each sample, int64 (B,).
    """
    ignored = queue.is_of(scan) if spec.mask_same_scan else None
    negatives = queue.vectors
    if spec.contrast_loss == "nce":
        normaliser = _next_normaliser(spec, queue, normaliser, embeddings)
    terms, own = [], []
    for term in spec.contrasts:
        query, key = (embeddings[name] for name in CONTRASTED[term])
        if spec.contrast_loss == "nce":
            loss = binary_nce_loss(
                query, key, negatives, spec.temperature, normaliser, ignored=ignored
            )
        else:
            loss = nce_loss(query, key, negatives, spec.temperature, ignored=ignored)
        terms.append(loss)
        if spec.push_when == "each_term" and CONTRASTED[term][1] in spec.push:
            own.append(distributed.concatenate(key))
            negatives = queue.with_pushed(torch.cat(own))
    return torch.stack(terms).mean(), normaliser


def gathered(pushed: Tensor, num_kinds: int) -> Tensor:
    """What all ranks push, (kinds * B, ...), kind after kind as one process has it."""
    by_kind = pushed.reshape(num_kinds, -1, *pushed.shape[1:])
    return distributed.concatenate(by_kind, dim=1).flatten(0, 1)


def _next_normaliser(
    spec: ContrastSpec, queue: Queue, normaliser: Tensor, embeddings: dict[str, Tensor]
) -> Tensor:
    """Z moved towards this batch's estimate, which it starts from (bug B1)."""
    query, key = (embeddings[name] for name in CONTRASTED[spec.contrasts[0]])
    estimate = distributed.mean(mean_candidate(query, key, queue.vectors, spec.temperature))
    moved = torch.lerp(estimate, normaliser, spec.normaliser_momentum)
    return torch.where(normaliser > 0, moved, estimate)
