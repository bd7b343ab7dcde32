"""What a classifier of 2D images learns from: whole images, with what is known of them.

N examples, B samples, L labels, S rows and columns of the stored square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.recipe import ClassifyRecipe2d, Preprocessing2d
from trainer.data import augment2d
from trainer.data.examples import Batches, IndexSampler, truth_of
from trainer.data.images2d import ImageCache, ResidentImages, Square, as_channels
from trainer.data.scan_set import Example, ScanFile
from trainer.randomness import generator
from trainer.report import Report


@dataclass(frozen=True, slots=True)
class ImageCase:
    """A preprocessed image with its examples."""

    id: str
    square: Square
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class ImageExamples:
    """The examples of one split on the device.

    Attributes:
        images: Pixels.
        image: Each example's image, int64 (N,).
        truth: 1 or 0, NaN where it is not known, float32 (N, L).
        spec: Says how pixels become network input.
    """

    images: ResidentImages
    image: Tensor
    truth: Tensor
    spec: Preprocessing2d

    def inputs(self, index: Tensor) -> Tensor:
        """Network input of the examples `index` (B,) as in serving, float32 (B, 3, S, S)."""
        return self.images.inputs(self.image[index], self.spec)


class ImageSource:
    """How images are read, laid out and drawn; see `trainer.classification.Source`."""

    def __init__(self, recipe: ClassifyRecipe2d, cache: Path, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._store = ImageCache(cache)

    def read(self, scan: ScanFile) -> ImageCase:
        """The image, preprocessed, with its examples."""
        return ImageCase(
            scan.id, self._store.image(scan, self._recipe.preprocessing), scan.examples
        )

    def check(self, cases: Sequence[ImageCase], report: Report) -> None:
        """An image that could be read has nothing more to be refused for."""

    def lay_out(self, cases: Sequence[ImageCase]) -> ImageExamples:
        """The examples of one split, on the device."""
        pairs = [(at, example) for at, case in enumerate(cases) for example in case.examples]
        return ImageExamples(
            images=ResidentImages.of([case.square for case in cases], device=self._device),
            image=torch.tensor([at for at, _ in pairs]),
            truth=truth_of([example for _, example in pairs], self._recipe.labels),
            spec=self._recipe.preprocessing,
        )

    def batches(self, examples: ImageExamples) -> Batches:
        """What makes the batch of a step: cropped, rotated and flipped, whatever the class."""
        recipe = self._recipe
        sampler = IndexSampler(examples.truth, is_balanced=recipe.balanced)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            random = generator(recipe.seed, step, "examples")
            index = sampler.draw_index(recipe.batch_size, step, random)
            geometry = augment2d.draw_geometry(
                recipe.crops, recipe.preprocessing.size, recipe.batch_size, random
            )
            moved = augment2d.make_clean(
                examples.images, recipe.crops, examples.image[index], geometry
            )
            return index, as_channels(moved, recipe.preprocessing.normalisation)

        return batch
