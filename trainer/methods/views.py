"""A batch of PCRL's views, and what was drawn for it.

Everything follows from the recipe's seed and the step, each purpose with its own generator. Numbers
are drawn for the whole batch and shuffled, for the momentum encoder's groups; views are made for
this rank's share of it.

B batch, I J K voxels of the input size. In 2D views are (B, 3, I, J) and indicators 6 long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.recipe import AnyPretrain, Pcrl, PretrainRecipe, PretrainRecipe2d
from trainer import distributed
from trainer.data import augment, augment2d, shuffle
from trainer.data.images2d import ResidentImages, as_channels, draw_batch
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.to_device import to_device
from trainer.randomness import generator, take


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
    rows = distributed.share(torch.randperm(batch, generator=generator(seed, step, "order")))
    if isinstance(volumes, ResidentImages):
        assert isinstance(recipe, PretrainRecipe2d)
        device = volumes.pixels.device
        clean, spoiled, scan = _pairs_of_images(recipe, volumes, step, rows)
    else:
        assert isinstance(recipe, PretrainRecipe) and sampler is not None
        device = volumes.device
        clean, spoiled, scan = _pairs_of_crops(recipe, volumes, sampler, step, rows)
    codes = generator(seed, step, "indicators")
    count = 3 if method.crossmix == "before_attention" else 2
    dims = recipe.network.dims
    indicators = torch.stack(
        [augment.draw_indicators(batch, codes, dims=dims) for _ in range(count)]
    )
    partner = torch.randperm(len(rows), generator=generator(seed, step, "partner"))
    # Filled on the device, as a copy from the host would wait for it.
    mix, mixup = (
        torch.full((), draw_mix(method, generator(seed, step, purpose)), device=device)
        for purpose in ("mix", "mixup")
    )
    return Views(
        clean_o=clean[0],
        clean_m=clean[1],
        input_o=spoiled[0],
        input_m=spoiled[1],
        scan=to_device(scan, device),
        indicators=to_device(indicators[:, rows], device),
        mix=mix,
        mixup=mixup,
        partner=to_device(partner, device),
    )


Pair = tuple[list[Tensor], list[Tensor], Tensor]
"""Two clean views of every sample, the same corrupted, and each sample's scan."""


def _pairs_of_crops(
    recipe: PretrainRecipe, volumes: Resident, sampler: PairSampler, step: int, rows: Tensor
) -> Pair:
    crops, seed, batch = recipe.crops, recipe.seed, recipe.batch_size
    device = volumes.device
    pairs = take(sampler.draw(batch, generator(seed, step, "pairs")), rows)
    shapes = generator(seed, step, "geometry")
    geometries = [take(augment.draw_geometry(crops, batch, shapes), rows) for _ in range(2)]
    clean = [
        augment.make_clean(volumes, crops, pairs, view, geometry)
        for view, geometry in enumerate(geometries)
    ]
    skip = distributed.num_before(batch)
    sharp = clean
    if crops.shuffle_probability > 0:
        chosen = torch.rand(2, batch, generator=generator(seed, step, "shuffling"))[:, rows]
        sharp = shuffle.shuffle_some(
            clean,
            chosen < crops.shuffle_probability,
            on_host=generator(seed, step, f"extents {skip}"),
            on_device=generator(seed, step, f"windows {skip}", device),
        )
    painting = generator(seed, step, "painting")
    kind = augment.draw_painting(crops, batch, painting)
    corruptions = [take(augment.draw_corruption(crops, kind, painting), rows) for _ in range(2)]
    spoiled = [
        augment.corrupt(
            view,
            corruption,
            generator(seed, step, f"noise {which}", device),
            skip=skip,
            in_place=sharp is not clean,
        )
        for which, (view, corruption) in enumerate(zip(sharp, corruptions, strict=True))
    ]
    return clean, spoiled, pairs.volume


def _pairs_of_images(
    recipe: PretrainRecipe2d, images: ResidentImages, step: int, rows: Tensor
) -> Pair:
    """Clean views are normalised as the input is: the 2D network's output has no activation."""
    crops, seed, batch = recipe.crops, recipe.seed, recipe.batch_size
    normalisation = recipe.preprocessing.normalisation
    num_images, _, side, _ = images.pixels.shape
    device = images.pixels.device
    index = draw_batch(num_images, batch, seed=seed, step=step)[rows]
    shapes = generator(seed, step, "geometry")
    geometries = [take(augment2d.draw_geometry(crops, side, batch, shapes), rows) for _ in range(2)]
    sharp = [augment2d.make_clean(images, crops, index, geometry) for geometry in geometries]
    painting = generator(seed, step, "painting")
    outpainted = augment2d.draw_outpainting(crops, batch, painting)
    corruptions = [augment2d.draw_corruption(crops, outpainted, painting) for _ in range(2)]
    skip = distributed.num_before(batch)
    spoiled = [
        augment2d.corrupt(
            view,
            corruption.of(rows),
            normalisation,
            generator(seed, step, f"noise {which}", device),
            skip=skip,
        )
        for which, (view, corruption) in enumerate(zip(sharp, corruptions, strict=True))
    ]
    return [as_channels(view, normalisation) for view in sharp], spoiled, index


def draw_mix(method: Pcrl, random: torch.Generator) -> float:
    """Lambda of a step, from Beta(alpha, alpha), folded if the recipe says so."""
    seed = int(torch.randint(2**62, (1,), generator=random))
    drawn = float(np.random.default_rng(seed).beta(method.mix_alpha, method.mix_alpha))
    return max(drawn, 1.0 - drawn) if method.mix_fold else drawn
