"""What a classifier learns from: places in scans, or whole scans, with what is known of them.

N examples, B samples, C channels, L labels, I J K voxels of the input size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaging.volume import Grid
from models.recipe import ClassifyRecipe
from trainer.data.cache import Case, VolumeCache
from trainer.data.cases import check_extents
from trainer.data.filters import along_axes, resize_matrix
from trainer.data.patches import cut, flipped, resident_channels, turned
from trainer.data.resident import Resident, Size
from trainer.data.scan_set import Example, Point, ScanFile
from trainer.errors import DataError
from trainer.randomness import generator
from trainer.report import Report

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""From a step to the examples of its batch (B,) and their network input (B, C, ...)."""


@dataclass(frozen=True, slots=True)
class ExampleCase:
    """A preprocessed scan with its examples."""

    id: str
    channels: tuple[Case, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of one split, ready to be cut.

    Attributes:
        images: Voxels, one layout a channel.
        volume: Each example's scan, int64 (N,).
        start: First voxel of its input, int64 (N, 3).
        truth: 1 or 0, NaN where it is not known, float32 (N, L).
        size: Extent of an input.
    """

    images: list[Resident]
    volume: Tensor
    start: Tensor
    truth: Tensor
    size: Size

    @classmethod
    def of(
        cls, cases: Sequence[ExampleCase], recipe: ClassifyRecipe, device: torch.device
    ) -> Examples:
        """Lay out the scans.

        Around a centre, a scan is padded by half an input on every side, so that a nodule at the
        border lies in the middle of its cube as every other does.
        """
        make = _padded if recipe.crop == "centre" else _resized
        fitted = [tuple(make(c, recipe.input_size) for c in case.channels) for case in cases]
        pairs = [(at, e) for at, case in enumerate(cases) for e in case.examples]
        start = [[0, 0, 0]] * len(pairs)
        if recipe.crop == "centre":
            # Half an input before the centre, counted from half an input before the scan.
            start = [
                voxel_of(example.centre_mm, cases[at].channels[0].grid, cases[at].id)
                for at, example in pairs
            ]
        return cls(
            images=resident_channels(fitted, recipe.input_size, device),
            volume=torch.tensor([at for at, _ in pairs]),
            start=torch.tensor(start),
            truth=truth_of([example for _, example in pairs], recipe.labels),
            size=recipe.input_size,
        )

    def inputs(self, index: Tensor) -> Tensor:
        """Network input of the examples `index` (B,), float32 (B, C, I, J, K)."""
        return cut(self.images, self.volume[index], self.start[index], self.size)


@dataclass(frozen=True, slots=True)
class Draw:
    """One batch: examples (B,), flips bool (B, 3), quarter turns (B,)."""

    index: Tensor
    flips: Tensor
    turns: Tensor


class IndexSampler:
    """Draws examples.

    Args:
        truth: (N, L) as in `Examples`; balanced, every label holds for some example, not for
            another.
        is_balanced: Whether with and without each label are drawn equally often.
    """

    def __init__(self, truth: Tensor, *, is_balanced: bool) -> None:
        self._num_examples, self._num_labels = truth.shape
        self._is_balanced = is_balanced
        groups = [(truth[:, label] == value).nonzero()[:, 0]
                  for label in range(self._num_labels) for value in (0, 1)]  # fmt: skip
        self._members = torch.cat(groups)
        self._sizes = torch.tensor([len(group) for group in groups])
        self._first = self._sizes.cumsum(0) - self._sizes

    def draw_index(self, batch_size: int, step: int, random: torch.Generator) -> Tensor:
        """Draw the examples of one batch, (B,).

        balanced, for each sample: its label in turn; with or without it by a coin;
        then one of those examples, each as likely
        """
        u = torch.rand(batch_size, generator=random, dtype=torch.float64)
        coin = torch.randint(2, (batch_size,), generator=random)
        if not self._is_balanced:
            return (u * self._num_examples).long()
        label = (step * batch_size + torch.arange(batch_size)) % self._num_labels
        group = 2 * label + coin
        return self._members[self._first[group] + (u * self._sizes[group]).long()]


class ExampleSampler:
    """Draws examples, and how to move them; the moves know nothing of the classes (bug B19).

    Args:
        truth: As of `IndexSampler`.
        recipe: Balance and moves.
    """

    def __init__(self, truth: Tensor, recipe: ClassifyRecipe) -> None:
        self._index = IndexSampler(truth, is_balanced=recipe.balanced)
        self._recipe = recipe

    def draw(self, batch_size: int, step: int, random: torch.Generator) -> Draw:
        """Draw one batch."""
        index = self._index.draw_index(batch_size, step, random)
        flips = torch.rand(batch_size, 3, generator=random) < self._recipe.flip_probability
        turns = torch.randint(4, (batch_size,), generator=random)
        return Draw(index, flips, turns if self._recipe.quarter_turns else torch.zeros_like(turns))


class VolumeSource:
    """How examples in volumes are read, laid out and drawn; see `trainer.classification.Source`."""

    def __init__(self, recipe: ClassifyRecipe, cache: Path, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._store = VolumeCache(cache)

    def read(self, scan: ScanFile) -> ExampleCase:
        """The scan's images, preprocessed, with its examples."""
        recipe = self._recipe
        channels = self._store.channels(scan, recipe.preprocessing, recipe.channels)
        return ExampleCase(scan.id, channels, scan.examples)

    def check(self, cases: Sequence[ExampleCase], report: Report) -> None:
        """Every place lies in its scan, in the splits that are laid out later too."""
        if self._recipe.crop == "whole":
            return
        check_extents([case.channels[0] for case in cases], self._recipe.input_size, report)
        for case in cases:
            for example in case.examples:
                voxel_of(example.centre_mm, case.channels[0].grid, case.id)

    def lay_out(self, cases: Sequence[ExampleCase]) -> Examples:
        """The examples of one split, on the device."""
        return Examples.of(cases, self._recipe, self._device)

    def batches(self, examples: Examples) -> Batches:
        """What makes the batch of a step, flipped and turned as drawn."""
        recipe = self._recipe
        sampler = ExampleSampler(examples.truth, recipe)

        def batch(step: int) -> tuple[Tensor, Tensor]:
            random = generator(recipe.seed, step, "examples")
            draw = sampler.draw(recipe.batch_size, step, random)
            return draw.index, turned(flipped(examples.inputs(draw.index), draw.flips), draw.turns)

        return batch


def truth_of(examples: Sequence[Example], labels: Sequence[str]) -> Tensor:
    """What is known of each example as numbers, NaN where nothing is, float32 (N, L)."""
    rows = [[example.classes.get(label, np.nan) for label in labels] for example in examples]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(examples), len(labels))


def voxel_of(centre_mm: Point | None, grid: Grid, scan: str) -> list[int]:
    """The voxel that holds a place.

    Raises:
        DataError: `unusable_labels`, no place, or one outside the scan.
    """
    if centre_mm is None:
        raise DataError(
            "unusable_labels",
            f"scan {scan}: an example has no x_mm, y_mm, z_mm, which crop = centre needs",
        )
    at = np.linalg.inv(grid.affine) @ np.array([*centre_mm, 1.0])
    voxel = np.rint(at[:3]).astype(int)
    if not all(0 <= v < n for v, n in zip(voxel, grid.shape, strict=True)):
        shown = ", ".join(f"{value:g}" for value in centre_mm)
        raise DataError(
            "unusable_labels",
            f"scan {scan}: the place ({shown}) mm is voxel {tuple(voxel.tolist())} of "
            f"{grid.shape}; places are RAS+, LPS lists need x and y negated",
        )
    return [int(v) for v in voxel]


def _padded(case: Case, size: Size) -> Case:
    pads = [(n // 2, n // 2) for n in size]
    image = np.pad(case.image, pads, constant_values=np.float16(case.background))
    return Case(case.id, image, case.background, case.grid)


def _resized(case: Case, size: Size) -> Case:
    matrices = [
        resize_matrix(have, want)[None] for have, want in zip(case.image.shape, size, strict=True)
    ]
    whole = torch.from_numpy(case.image.astype(np.float32))[None]
    resized: NDArray[np.float16] = along_axes(whole, matrices)[0].numpy().astype(np.float16)
    return Case(case.id, resized, case.background, case.grid)
