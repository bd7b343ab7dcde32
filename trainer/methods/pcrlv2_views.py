"""What PCRLv2 looks at: two global crops of each sample and several local ones, spoiled.

In 3D local crops lie in the box around the global ones; in 2D they are cut from the whole image, as
the official code does in each (algorithms.md 2).

B samples, L locals of each; crops are (B, 1, I, J, K) in 3D, (B, 3, I, J) in 2D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.recipe import ImageViews, PcrlV2, PretrainRecipe, PretrainRecipe2d
from trainer.data import augment, augment2d, degrade
from trainer.data.images2d import ResidentImages
from trainer.data.local_boxes import draw_locals
from trainer.data.resident import Resident
from trainer.data.sampling import Pairs, PairSampler
from trainer.errors import DataError
from trainer.methods.pairs import make_pairs, shuffled_share
from trainer.randomness import generator, take


@dataclass(frozen=True, slots=True)
class Crops:
    """Global and local crops of a batch.

    Attributes:
        clean: The global crops, (B, ...) each, in network intensities.
        seen: The same, spoiled.
        seen_locals: Spoiled local crops, local after local, (L * B, ...).
    """

    clean: tuple[Tensor, Tensor]
    seen: tuple[Tensor, Tensor]
    seen_locals: Tensor


def of_volumes(
    recipe: PretrainRecipe, spec: PcrlV2, volumes: Resident, sampler: PairSampler, step: int
) -> Crops:
    """Boxes of the sampler, and small ones near them.

    Raises:
        DataError: `small_scan`.
    """
    seed = recipe.seed
    drawn = sampler.draw(recipe.batch_size, generator(seed, step, "pairs"))
    pairs = take(drawn, shuffled_share(recipe, step))
    one, other = (_spoiled(volumes, recipe, spec, pairs, step, view=view) for view in (0, 1))
    crops = recipe.crops.model_copy(
        update={"input_size": spec.local_input_size, "crop_sizes": spec.local_sizes}
    )
    if (volumes.shapes.amin(dim=0) < torch.tensor(crops.crop_sizes).amax(dim=0)).any():
        raise DataError("small_scan", "a local crop is larger than a padded scan")
    boxes = draw_locals(
        pairs,
        recipe.crops.crop_sizes,
        crops.crop_sizes,
        volumes.shapes,
        num_locals=spec.num_locals,
        margin=spec.local_margin,
        random=generator(seed, step, "locals"),
    )
    local = recipe.model_copy(update={"crops": crops})
    _, seen_locals = _spoiled(volumes, local, spec, boxes, step, purpose="local")
    return Crops((one[0], other[0]), (one[1], other[1]), seen_locals)


def of_images(recipe: PretrainRecipe2d, spec: PcrlV2, images: ResidentImages, step: int) -> Crops:
    """Two views of each image, and small crops of it, without holes and painting."""
    pairs = make_pairs(recipe, images, None, step)
    crops = local_crops(recipe.crops, spec)
    index = pairs.scan.repeat(spec.num_locals)
    count, seed, device = len(index), recipe.seed, images.pixels.device
    side = images.pixels.shape[-1]
    geometry = augment2d.draw_geometry(crops, side, count, generator(seed, step, "local geometry"))
    corruption = augment2d.draw_corruption(
        crops, torch.zeros(count, dtype=torch.bool), generator(seed, step, "local corruption")
    )
    seen_locals = augment2d.corrupt(
        augment2d.make_clean(images, crops, index, geometry),
        corruption,
        recipe.preprocessing.normalisation,
        generator(seed, step, "local noise", device),
    )
    (clean_one, clean_other), (seen_one, seen_other) = pairs.clean, pairs.spoiled
    return Crops((clean_one, clean_other), (seen_one, seen_other), seen_locals)


def local_crops(crops: ImageViews, spec: PcrlV2) -> ImageViews:
    """How local crops of images are made, where that of global ones is `crops`."""
    changed = {"input_size": spec.local_side, "crop_area": spec.local_area, "cutout_holes": 0}
    return crops.model_copy(update=changed)


def _spoiled(
    volumes: Resident,
    recipe: PretrainRecipe,
    spec: PcrlV2,
    pairs: Pairs,
    step: int,
    *,
    view: int = 0,
    purpose: str = "global",
) -> tuple[Tensor, Tensor]:
    """A clean crop of each box, and the same spoiled."""
    crops, seed, count = recipe.crops, recipe.seed, len(pairs.volume)
    shapes = generator(seed, step, f"{purpose} geometry {view}")
    geometry = augment.draw_geometry(crops, count, shapes)
    clean = augment.make_clean(volumes, crops, pairs, view, geometry)
    drawn = degrade.draw(
        spec,
        crops.max_blur_sigma,
        crops.input_size,
        count,
        generator(seed, step, f"{purpose} corruption {view}"),
    )
    noise = generator(seed, step, f"{purpose} noise {view}", clean.device)
    return clean, degrade.degrade(clean, drawn, spec.swap_patch, noise)
