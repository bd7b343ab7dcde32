"""Where crops are cut, drawn as numbers before any voxel moves.

Pretraining: pairs of equal size that overlap by more than `min_iou` (paper section 7). Fine-tuning:
patches of which a share is centred on a labelled voxel, the classes taking turns.

B samples, V volumes, I J K voxels of the padded grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.recipe import CropPairs
from trainer.data.resident import Resident, Size
from trainer.errors import DataError
from trainer.randomness import generator

_TRIES = 256
"""Candidates drawn at once; the first that passes is taken, so there is no loop to wait for."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two boxes of one size in one volume, for each sample.

    Attributes:
        volume: Index of the volume, int64 (B,).
        size: Index into the recipe's crop sizes, int64 (B,).
        start: First voxel of both boxes on the padded grid, int64 (B, 2, 3).
    """

    volume: Tensor
    size: Tensor
    start: Tensor


class PairSampler:
    """Draws pairs; with `max_tissue`, only boxes that hold less soft tissue than that.

    The tissue rule is LUNA's with its bug fixed (B5): the official code divides the tissue of the
    resized crop by the voxels of the original one, so its limit was 2 to 101 % by crop size.

    Args:
        recipe: Sizes, overlap, tissue share.
        shapes: Padded extents, int64 (V, 3).
        tissue: For each volume which voxels are soft tissue, bool (I, J, K); None without the rule.
    """

    def __init__(
        self,
        recipe: CropPairs,
        shapes: Tensor,
        tissue: Sequence[NDArray[np.bool_]] | None = None,
    ) -> None:
        self._recipe = recipe
        self._shapes = shapes
        self._sizes = torch.tensor(recipe.crop_sizes)  # (S, 3)
        self._sums = [_integral(mask) for mask in tissue] if tissue is not None else None
        self._usable, self._known = self._find_usable()

    def draw(self, batch_size: int, random: torch.Generator) -> Pairs:
        """Draw one batch; every pair keeps the rules."""
        choice = torch.randint(len(self._usable), (batch_size,), generator=random)
        volume, size = self._usable[choice].unbind(dim=1)
        known = self._known[choice]
        extent = self._sizes[size]  # (B, 3)
        room = self._shapes[volume] - extent  # (B, 3)
        first = self._first(volume, extent, room, known, random)
        second = self._second(volume, extent, room, first, random)
        return Pairs(volume, size, torch.stack([first, second], dim=1))

    def tissue_share(self, volume: Tensor, start: Tensor, extent: Tensor) -> Tensor:
        """Share of soft tissue of boxes, (B, ...) for `start` (B, ..., 3)."""
        assert self._sums is not None
        share = torch.empty(start.shape[:-1])
        for at in range(len(volume)):
            sums = self._sums[int(volume[at])]
            low = start[at].reshape(-1, 3).numpy()
            high = low + extent[at].numpy()
            total = _box_sum(sums, low, high)
            share[at] = torch.from_numpy(total).reshape(share[at].shape) / extent[at].prod()
        return share

    def _first(
        self, volume: Tensor, extent: Tensor, room: Tensor, known: Tensor, random: torch.Generator
    ) -> Tensor:
        low = torch.zeros_like(room)
        if self._sums is None:
            return _integers(low, room, 1, random)[:, 0]
        drawn = _integers(low, room, _TRIES, random)
        return _first_that_passes(drawn, self._passes(volume, drawn, extent), otherwise=known)

    def _second(
        self, volume: Tensor, extent: Tensor, room: Tensor, first: Tensor, random: torch.Generator
    ) -> Tensor:
        """Uniform over the boxes that overlap `first` enough.

        IoU = f / (2 - f) with f the shared fraction, so f > 2 t / (1 + t); no axis may shift by
        more than (1 - f) of its extent.
        """
        least = 2 * self._recipe.min_iou / (1 + self._recipe.min_iou)
        reach = ((1 - least) * extent).floor().long()
        drawn = _integers((first - reach).clamp(min=0), torch.minimum(room, first + reach), _TRIES, random)
        shift = (drawn - first[:, None]).abs() / extent[:, None]
        shared = (1 - shift).clamp(min=0).double().prod(dim=2)  # (B, tries)
        passes = shared / (2 - shared) > self._recipe.min_iou
        if self._sums is not None:
            passes &= self._passes(volume, drawn, extent)
        return _first_that_passes(drawn, passes, otherwise=first)

    def _passes(self, volume: Tensor, start: Tensor, extent: Tensor) -> Tensor:
        assert self._recipe.max_tissue is not None
        return self.tissue_share(volume, start, extent) < self._recipe.max_tissue

    def _find_usable(self) -> tuple[Tensor, Tensor]:
        """(volume, size) pairs that can be drawn, (N, 2), and a start that passes for each."""
        pairs = torch.cartesian_prod(torch.arange(len(self._shapes)), torch.arange(len(self._sizes)))
        volume, size = pairs.unbind(dim=1)
        extent = self._sizes[size]
        room = self._shapes[volume] - extent
        assert (room >= 0).all()
        if self._sums is None:
            return pairs, torch.zeros_like(room)
        drawn = _integers(torch.zeros_like(room), room, 4 * _TRIES, generator(0, 0, "tissue"))
        passes = self._passes(volume, drawn, extent)
        keep = passes.any(dim=1)
        if not keep.any():
            raise DataError(
                "too_much_tissue",
                f"no crop of any scan has less than {self._recipe.max_tissue:.0%} soft tissue",
            )
        return pairs[keep], _first_that_passes(drawn, passes, otherwise=drawn[:, 0])[keep]


@dataclass(frozen=True, slots=True)
class Patches:
    """One patch a sample: volume (B,), first voxel on the padded grid (B, 3), flips (B, 3)."""

    volume: Tensor
    start: Tensor
    flips: Tensor


class PatchSampler:
    """Draws patches; the voxels of each class are indexed once.

    Args:
        labels: The padded class volumes.
        num_labels: Classes without background.
        patch: Extent of a patch.
        foreground_share: Share of patches centred on a labelled voxel.
        flip_probability: Of each axis.
        voxels_kept: Most voxels indexed for each class and volume.
    """

    def __init__(
        self,
        labels: Resident,
        num_labels: int,
        patch: Size,
        *,
        foreground_share: float,
        flip_probability: float,
        voxels_kept: int = 20_000,
    ) -> None:
        self._patch = torch.tensor(patch)
        self._shapes = labels.shapes
        self._share = foreground_share
        self._flip = flip_probability
        self._of_class = [
            _voxels_of(labels, value, voxels_kept) for value in range(1, num_labels + 1)
        ]

    def draw(self, batch_size: int, step: int, random: torch.Generator) -> Patches:
        """Draw one batch; `step` decides whose turn it is."""
        volume = torch.randint(len(self._shapes), (batch_size,), generator=random)
        centred = torch.rand(batch_size, generator=random) < self._share
        pick = torch.rand(batch_size, 2, generator=random, dtype=torch.float64)
        anywhere = torch.rand(batch_size, 3, generator=random, dtype=torch.float64)
        flips = torch.rand(batch_size, 3, generator=random) < self._flip
        start = torch.empty(batch_size, 3, dtype=torch.long)
        present = [voxels for voxels in self._of_class if voxels]
        for at in range(batch_size):
            room = self._shapes[volume[at]] - self._patch
            start[at] = (anywhere[at] * (room + 1)).long()
            if centred[at] and present:
                voxels = present[(step * batch_size + at) % len(present)]
                owner, coordinates = voxels[int(pick[at, 0] * len(voxels))]
                centre = coordinates[int(pick[at, 1] * len(coordinates))]
                volume[at] = owner
                room = self._shapes[owner] - self._patch
                start[at] = torch.minimum((centre - self._patch // 2).clamp(min=0), room)
        return Patches(volume, start, flips)


def _voxels_of(labels: Resident, value: int, kept: int) -> list[tuple[int, Tensor]]:
    """(volume, coordinates (n, 3)) of every volume that holds the class."""
    found = []
    for at, volume in enumerate(labels.on_host()):
        where = torch.from_numpy(np.flatnonzero(volume == value))
        if len(where) == 0:
            continue
        if len(where) > kept:
            order = torch.randperm(len(where), generator=generator(0, at, f"class {value}"))
            where = where[order[:kept]]
        i, j, k = np.unravel_index(where.numpy(), volume.shape)
        found.append((at, torch.from_numpy(np.stack([i, j, k], axis=1))))
    return found


def _integers(low: Tensor, high: Tensor, tries: int, random: torch.Generator) -> Tensor:
    """Uniform whole numbers in [low, high], (B, tries, 3) for bounds (B, 3)."""
    u = torch.rand(len(low), tries, 3, generator=random, dtype=torch.float64)
    return low[:, None] + (u * (high - low + 1)[:, None]).long()


def _first_that_passes(drawn: Tensor, passes: Tensor, *, otherwise: Tensor) -> Tensor:
    """First passing candidate of each sample; (B, tries, 3), (B, tries) -> (B, 3)."""
    at = passes.int().argmax(dim=1)  # the first maximum
    chosen = drawn[torch.arange(len(drawn)), at]
    return torch.where(passes.any(dim=1)[:, None], chosen, otherwise)


def tissue_mask(image: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Voxels above the threshold in three consecutive slices (row 28), (I, J, K)."""
    above = image > threshold
    below, after = np.zeros_like(above), np.zeros_like(above)
    below[:, :, 1:] = above[:, :, :-1]
    after[:, :, :-1] = above[:, :, 1:]
    return np.asarray(above & below & after)


def _integral(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Summed volume table with a zero plane in front of each axis."""
    sums = mask.astype(np.int64)
    for axis in range(3):
        sums = sums.cumsum(axis=axis)
    return np.pad(sums, ((1, 0), (1, 0), (1, 0)))


def _box_sum(
    sums: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Sum inside boxes [low, high), (n,), by inclusion and exclusion."""
    total = np.zeros(len(low), dtype=np.int64)
    for corner in range(8):
        upper = [bool(corner >> axis & 1) for axis in range(3)]
        i, j, k = (np.where(up, high[:, a], low[:, a]) for a, up in enumerate(upper))
        total += (-1) ** (3 - sum(upper)) * sums[i, j, k]
    return total
