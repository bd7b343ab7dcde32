"""Crops and 2D images as most methods look at them: clean views, and the same corrupted.

Numbers are drawn for the whole batch, shuffled, and made for this rank's share of it; each purpose
has its own generator, so one method's draws do not move another's.

B samples of this rank; views are (B, 1, I, J, K) in 3D, (B, 3, I, J) in 2D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.recipe import AnyPretrain, PretrainRecipe, PretrainRecipe2d
from trainer import distributed
from trainer.data import augment, augment2d, shuffle
from trainer.data.images2d import ResidentImages, as_channels, draw_batch
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.to_device import to_device
from trainer.randomness import generator, take


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two views of each sample, in shuffled order.

    Attributes:
        clean: Cropped, flipped and rotated, in network intensities.
        spoiled: The same, painted and blurred.
        scan: Index of each sample's scan, int64 (B,).
        rows: Which of the whole batch's samples these are, int64 (B,) on the host.
    """

    clean: list[Tensor]
    spoiled: list[Tensor]
    scan: Tensor
    rows: Tensor


def make_pairs(
    recipe: AnyPretrain,
    volumes: Resident | ResidentImages,
    sampler: PairSampler | None,
    step: int,
) -> Pairs:
    """P's two views of each sample; depends on the recipe's seed and the step alone.

    Args:
        recipe: In 3D or in 2D.
        volumes: What views are cut from: images, if the recipe is in 2D.
        sampler: Of crops of volumes; None for images.
        step: From 1.
    """
    rows = shuffled_share(recipe, step)
    if isinstance(volumes, ResidentImages):
        assert isinstance(recipe, PretrainRecipe2d)
        clean, spoiled, scan = _pairs_of_images(recipe, volumes, step, rows)
    else:
        assert isinstance(recipe, PretrainRecipe) and sampler is not None
        clean, spoiled, scan = _pairs_of_crops(recipe, volumes, sampler, step, rows)
    return Pairs(clean, spoiled, to_device(scan, clean[0].device), rows)


def make_crops(
    recipe: AnyPretrain,
    volumes: Resident | ResidentImages,
    sampler: PairSampler | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    """One clean view of each sample, that of `make_pairs` which is first.

    Returns:
        The views, and the scan of each, int64 (B,).
    """
    rows = shuffled_share(recipe, step)
    if isinstance(volumes, ResidentImages):
        assert isinstance(recipe, PretrainRecipe2d)
        return _crops_of_images(recipe, volumes, step, rows)
    assert isinstance(recipe, PretrainRecipe) and sampler is not None
    crops, seed, batch = recipe.crops, recipe.seed, recipe.batch_size
    pairs = take(sampler.draw(batch, generator(seed, step, "pairs")), rows)
    shapes = generator(seed, step, "geometry")
    geometry = take(augment.draw_geometry(crops, batch, shapes), rows)
    view = augment.make_clean(volumes, crops, pairs, 0, geometry)
    return view, to_device(pairs.volume, view.device)


def shuffled_share(recipe: AnyPretrain, step: int) -> Tensor:
    """This rank's samples of the step's batch, which is shuffled first, int64 (B,)."""
    order = generator(recipe.seed, step, "order")
    return distributed.share(torch.randperm(recipe.batch_size, generator=order))


_Made = tuple[list[Tensor], list[Tensor], Tensor]
"""Clean views, spoiled views, and each sample's scan on the host."""


def _pairs_of_crops(
    recipe: PretrainRecipe, volumes: Resident, sampler: PairSampler, step: int, rows: Tensor
) -> _Made:
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
) -> _Made:
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


def _crops_of_images(
    recipe: PretrainRecipe2d, images: ResidentImages, step: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    sharp, index = sharp_images(recipe, images, step, rows)
    view = as_channels(sharp, recipe.preprocessing.normalisation)
    return view, to_device(index, view.device)


def sharp_images(
    recipe: PretrainRecipe2d, images: ResidentImages, step: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """What `make_crops` normalises: cropped, flipped and rotated images in [0, 1].

    Args:
        recipe: In 2D.
        images: All.
        step: From 1.
        rows: `shuffled_share` of the step.

    Returns:
        Views (B, C, I, J), and the image of each, int64 (B,) on the host.
    """
    num_images, _, side, _ = images.pixels.shape
    index = draw_batch(num_images, recipe.batch_size, seed=recipe.seed, step=step)[rows]
    shapes = generator(recipe.seed, step, "geometry")
    drawn = augment2d.draw_geometry(recipe.crops, side, recipe.batch_size, shapes)
    return augment2d.make_clean(images, recipe.crops, index, take(drawn, rows)), index
