"""Anatomical patterns: one place in scans that look alike is one class.

Haghighi et al., MICCAI 2020, section 2.1. A place is kept as a share of the way that a crop can
move along each axis, so that it lies in every scan, whatever its extent.

C classes, N scans of each, B samples, V scans, I J K voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models import recipe as recipes
from models.recipe import PretrainRecipe
from trainer.data.sampling import Pairs, PairSampler
from trainer.errors import DataError
from trainer.randomness import generator

CANDIDATES = 4096
"""Crops among which the places of the classes are looked for."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the classes are.

    Attributes:
        reference: The scan in which each was found, int64 (C,).
        share: 0 where a crop touches the low face of a scan, 1 where it touches the high one,
            float64 (C, 3).
    """

    reference: Tensor
    share: Tensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is drawn for each sample.

    Attributes:
        label: Its class, int64 (B,).
        neighbour: Which of the class's scans, int64 (B,).
        size: Index into the crop sizes: 0 as the pattern was cut, else a version, int64 (B,).
        shift: Voxels beside the place, 0 along K, int64 (B, 3).
    """

    label: Tensor
    neighbour: Tensor
    size: Tensor
    shift: Tensor


def find_places(recipe: PretrainRecipe, shapes: Tensor, sampler: PairSampler) -> Places:
    """Random crops that keep the border and the tissue rule and lie apart, one for each class.

    Args:
        recipe: Of Semantic Genesis.
        shapes: Padded extents, (V, 3).
        sampler: Of crops that keep the rules.

    Raises:
        DataError: `too_few_places`.
    """
    method = recipe.method
    assert isinstance(method, recipes.SemanticGenesis)
    drawn = sampler.draw(CANDIDATES, generator(recipe.seed, 0, "places"))
    is_whole = drawn.size[:, 0] == 0
    volume, start = drawn.volume[is_whole], drawn.start[is_whole, 0]
    taken: list[int] = []
    for at, place in enumerate(start):
        apart = (start[taken] - place).double().norm(dim=1)
        if (apart >= method.least_distance).all():
            taken.append(at)
        if len(taken) == method.num_classes:
            break
    else:
        raise DataError(
            "too_few_places",
            f"the scans have room for {len(taken)} classes that lie {method.least_distance:g} "
            f"voxels apart, num_classes is {method.num_classes}: lessen it, crops.border, or both",
        )
    room = shapes[volume[taken]] - torch.tensor(recipe.crops.crop_sizes[0])
    return Places(volume[taken], start[taken].double() / room.clamp(min=1))


def choose(recipe: PretrainRecipe, num_neighbours: int, step: int) -> Chosen:
    """Classes, their scans, and versions of a step's whole batch."""
    method, batch, sizes = recipe.method, recipe.batch_size, len(recipe.crops.crop_sizes)
    assert isinstance(method, recipes.SemanticGenesis)
    random = generator(recipe.seed, step, "patterns")
    label = torch.randint(method.num_classes, (batch,), generator=random)
    neighbour = torch.randint(num_neighbours, (batch,), generator=random)
    is_version = torch.rand(batch, generator=random) < method.version_share
    other = torch.randint(min(1, sizes - 1), sizes, (batch,), generator=random)
    in_plane = torch.randint(-method.jitter, method.jitter + 1, (batch, 2), generator=random)
    shift = torch.cat([in_plane, torch.zeros(batch, 1, dtype=torch.long)], dim=1)
    return Chosen(label, neighbour, other * is_version, shift * is_version[:, None])


def place_crops(
    chosen: Chosen, share: Tensor, neighbours: Tensor, shapes: Tensor, crop_sizes: Tensor
) -> Pairs:
    """Boxes around the places, inside their scans; both of a pair are the same.

        for each sample:
            scan = neighbours[label][neighbour]
            start = round(share[label] * (shape of the scan - first crop size))
            centre the sample's own crop size on that box, shift it, keep it inside the scan

    Args:
        chosen: What was drawn.
        share: Of `Places`, (C, 3).
        neighbours: Scans of each class, (C, N).
        shapes: Padded extents, (V, 3).
        crop_sizes: Of the recipe, (S, 3).
    """
    volume = neighbours[chosen.label, chosen.neighbour]
    extent, first = crop_sizes[chosen.size], crop_sizes[0]
    whole = (share[chosen.label] * (shapes[volume] - first)).round().long()
    start = whole + (first - extent).div(2, rounding_mode="floor") + chosen.shift
    start = torch.minimum(start.clamp(min=0), shapes[volume] - extent)
    size = chosen.size[:, None].expand(-1, 2)
    return Pairs(volume, size, start[:, None].expand(-1, 2, -1))
