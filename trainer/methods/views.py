"""A batch of PCRL's views, and what was drawn for it.

Everything follows from the recipe's seed and the step, each purpose with its own generator. Numbers
are drawn for the whole batch and shuffled, for the momentum encoder's groups; views are made for
this rank's share of it.

B batch, I J K voxels of the input size. In 2D views are (B, 3, I, J) and indicators 6 long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.recipe import AnyPretrain, Pcrl
from trainer.data import augment
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.to_device import to_device
from trainer.methods.mixing import draw_mix
from trainer.methods.pairs import make_pairs
from trainer.randomness import generator


@dataclass(frozen=True, slots=True)
class Views:
    """Two views of each sample, in shuffled order; o is the ordinary, m the momentum encoder's.

    Attributes:
        clean_o: X_o^1, cropped, flipped and rotated, (B, 1, I, J, K) in network intensities.
        clean_m: X_m^1.
        input_o: X_o^2, painted and blurred.
        input_m: X_m^2.
        scan: Index of each sample's scan, int64 (B,).
        indicators: vec(T) of the ordinary, momentum and hybrid encoder, (3, B, 7); the hybrid's is
            there only if it has a T of its own.
        mix: lambda of CrossMix, scalar, one for features and target.
        turns: Quarter turns of RotNet's task, int64 (B,).
        mixup: lambda with which the batch is mixed with itself, scalar.
        partner: Sample of the same rank that each is mixed with, (B,).
    """

    clean_o: Tensor
    clean_m: Tensor
    input_o: Tensor
    input_m: Tensor
    scan: Tensor
    indicators: Tensor
    mix: Tensor
    mixup: Tensor
    partner: Tensor
    turns: Tensor


def make_views(
    recipe: AnyPretrain,
    volumes: Resident | ResidentImages,
    sampler: PairSampler | None,
    step: int,
) -> Views:
    """Draw and make the batch of a step; depends on the recipe's seed and the step alone.

    Args:
        recipe: In 3D or in 2D.
        volumes: What views are cut from: images, if the recipe is in 2D.
        sampler: Of crops of volumes; None for images.
        step: From 1.
    """
    method, seed, batch = recipe.method, recipe.seed, recipe.batch_size
    assert isinstance(method, Pcrl)
    pairs = make_pairs(recipe, volumes, sampler, step)
    rows, device = pairs.rows, pairs.clean[0].device
    codes = generator(seed, step, "indicators")
    count = 3 if method.crossmix == "before_attention" else 2
    dims = recipe.network.dims
    indicators = torch.stack(
        [augment.draw_indicators(batch, codes, dims=dims) for _ in range(count)]
    )
    indicators = kept(indicators, method.transformation, dims)
    turns = torch.randint(4, (batch,), generator=generator(seed, step, "turns"))
    partner = torch.randperm(len(rows), generator=generator(seed, step, "partner"))
    # Filled on the device, as a copy from the host would wait for it.
    mix, mixup = (
        torch.full((), draw_mix(method, generator(seed, step, purpose)), device=device)
        for purpose in ("mix", "mixup")
    )
    return Views(
        clean_o=pairs.clean[0],
        clean_m=pairs.clean[1],
        input_o=pairs.spoiled[0],
        input_m=pairs.spoiled[1],
        scan=pairs.scan,
        indicators=to_device(indicators[:, rows], device),
        mix=mix,
        mixup=mixup,
        partner=to_device(partner, device),
        turns=to_device(turns[rows], device),
    )


def kept(indicators: Tensor, transformation: str, dims: int) -> Tensor:
    """Indicator vectors (..., D + 4) of what the recipe lets T consist of; the rest is undone."""
    if transformation == "flips_and_turns":
        return indicators
    unturned = torch.zeros_like(indicators)
    unturned[..., dims] = 1.0
    if transformation == "flips":
        unturned[..., :dims] = indicators[..., :dims]
    return unturned
