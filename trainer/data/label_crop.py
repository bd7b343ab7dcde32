"""A labelled scan cut to the box of some labels and a margin (`crop` of a fine-tuning recipe).

P localises the liver and widens its box by 30 slices on each side; a network that follows another
one in a cascade sees no more than that when it is served. Nothing is copied: a cut is a view.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from imaging.volume import Shape
from models import box
from models.recipe import FinetuneRecipe
from trainer.data.cache import LabelledCase
from trainer.errors import DataError


def cropped(case: LabelledCase, recipe: FinetuneRecipe) -> LabelledCase:
    """The case on its labels' box, which is a patch large at least where the scan is.

    Serving does the same: a window is run anyway, so it sees the scan and not padding.

    Raises:
        DataError: `unusable_labels`, the scan holds none of the labels.
    """
    if recipe.crop is None:
        return case
    names = recipe.crop.labels or recipe.targets
    i, j, k = case.labels.shape
    shape: Shape = (i, j, k)
    found = box.around(np.isin(case.labels, sorted(_classes(recipe, names))))
    if found is None:
        raise DataError(
            "unusable_labels",
            f"scan {case.id} holds none of {', '.join(names)}, whose box it is to be cut to",
        )
    margin = recipe.crop.margin_voxels
    part = box.widened(found, (margin, margin, margin), shape)
    part = box.at_least(part, recipe.patch_size, shape)
    channels = tuple(
        replace(channel, image=channel.image[part.slices], grid=box.grid_of(channel.grid, part))
        for channel in case.channels
    )
    return LabelledCase(case.id, channels, case.labels[part.slices])


def _classes(recipe: FinetuneRecipe, names: tuple[str, ...]) -> set[int]:
    """The classes of the cached labels that some labels or regions consist of."""
    class_of = {value: number for number, value in enumerate(recipe.values.values(), start=1)}
    values: set[int] = set()
    for name in names:
        values |= {recipe.labels[name]} if recipe.labels else set(recipe.regions[name])
    return {class_of[value] for value in values}
