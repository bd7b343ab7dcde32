"""Where crops are cut, drawn as numbers before any voxel moves.

Pretraining: pairs that overlap by more than `min_iou`, of equal size (paper section 7) or not.
Fine-tuning: patches of which a share is centred on a labelled voxel, the classes taking turns.

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
    """Two boxes in one volume, for each sample.

    Attributes:
        volume: Index of the volume, int64 (B,).
        size: Index of each box into the recipe's crop sizes, int64 (B, 2).
        start: First voxel of both boxes on the padded grid, int64 (B, 2, 3).
    """

    volume: Tensor
    size: Tensor
    start: Tensor


class PairSampler:
    """Draws pairs; with `max_tissue`, only boxes that hold less soft tissue than that.

    Volumes and sizes are drawn alike, sizes together where they must be equal. Two sizes whose
    boxes can never overlap enough are not drawn together (row 25). The official code throws whole
    draws away instead, and so takes sizes that overlap easily more often.

    The tissue rule is LUNA's with its bug fixed (B5): the official code divides the tissue of the
    resized crop by the voxels of the original one, so its limit was 2 to 101 % by crop size.

    Args:
        recipe: Sizes, overlap, border, tissue share.
        shapes: Padded extents, int64 (V, 3).
        tissue: For each volume which voxels are soft tissue, bool (I, J, K); None without the rule.

    Raises:
        DataError: `too_much_tissue`: no pair of any scan keeps the tissue rule.
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
        self._border = torch.tensor(recipe.border)
        self._sums = [_integral(mask) for mask in tissue] if tissue is not None else None
        self._usable, self._known = self._find_usable()

    def draw(self, batch_size: int, random: torch.Generator) -> Pairs:
        """Draw one batch; every pair keeps the rules."""
        choice = torch.randint(len(self._usable), (batch_size,), generator=random)
        volume, size = self._usable[choice, 0], self._usable[choice, 1:]
        extent = self._sizes[size]  # (B, 2, 3)
        known = self._known[choice]  # (B, 2, 3)
        first = self._first(volume, extent[:, 0], known[:, 0], random)
        second, passes = self._second(volume, extent, first, random)
        start = torch.stack([first, second], dim=1)
        return Pairs(volume, size, torch.where(passes[:, None, None], start, known))

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
        self, volume: Tensor, extent: Tensor, known: Tensor, random: torch.Generator
    ) -> Tensor:
        low, high = self._reachable(volume, extent)
        if self._sums is None:
            return _integers(low, high, 1, random)[:, 0]
        drawn = _integers(low, high, _TRIES, random)
        chosen, passes = _first_that_passes(drawn, self._passes(volume, drawn, extent))
        return torch.where(passes[:, None], chosen, known)

    def _second(
        self, volume: Tensor, extents: Tensor, first: Tensor, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Uniform over the boxes that overlap `first` enough.

        IoU = s / (v1 + v2 - s) > t with s the shared voxels, so s > t (v1 + v2) / (1 + t): along no
        axis may the boxes share less than that over what they can share along the other two.

        Returns:
            Starts (B, 3), and for which samples they keep the rules, bool (B,).
        """
        one, other = extents.double().unbind(dim=1)
        volumes = one.prod(dim=1) + other.prod(dim=1)  # (B,)
        most = torch.minimum(one, other)  # (B, 3)
        needed = self._recipe.min_iou / (1 + self._recipe.min_iou) * volumes
        least = needed[:, None] / most.prod(dim=1, keepdim=True) * most  # (B, 3)
        low, high = self._reachable(volume, extents[:, 1])
        before = first - (other - least).floor().long()
        after = first + (one - least).floor().long()
        drawn = _integers(torch.maximum(low, before), torch.minimum(high, after), _TRIES, random)
        middle = self._around(volume, extents, first[:, None])  # shares as much as boxes can
        drawn = torch.cat([drawn, middle], dim=1)
        passes = iou(first[:, None], one[:, None], drawn, other[:, None]) > self._recipe.min_iou
        if self._sums is not None:
            passes &= self._passes(volume, drawn, extents[:, 1])
        return _first_that_passes(drawn, passes)

    def _around(self, volume: Tensor, extents: Tensor, first: Tensor) -> Tensor:
        """Start of the second box inside or around the first's middle, (B, n, 3) as `first`."""
        low, high = self._reachable(volume, extents[:, 1])
        shift = (extents[:, 0] - extents[:, 1]).div(2, rounding_mode="floor")
        return (first + shift[:, None]).clamp(low[:, None], high[:, None])

    def _reachable(self, volume: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest start of a box that keeps the border, as far as there is room."""
        room = self._shapes[volume] - extent
        border = torch.minimum(self._border, room // 2)
        return border, room - border

    def _passes(self, volume: Tensor, start: Tensor, extent: Tensor) -> Tensor:
        assert self._recipe.max_tissue is not None
        return self.tissue_share(volume, start, extent) < self._recipe.max_tissue

    def _find_usable(self) -> tuple[Tensor, Tensor]:
        """(volume, size, size) that can be drawn, (N, 3), and starts that pass for each."""
        every = torch.arange(len(self._sizes))
        sizes = torch.stack([every, every], dim=1)
        if not self._recipe.equal_sizes:
            sizes = torch.cartesian_prod(every, every)
            one, other = self._sizes[sizes].double().unbind(dim=1)
            origin = torch.zeros_like(one)
            sizes = sizes[iou(origin, one, origin, other) > self._recipe.min_iou]
        volume = torch.arange(len(self._shapes)).repeat_interleave(len(sizes))
        sizes = sizes.repeat(len(self._shapes), 1)
        usable = torch.cat([volume[:, None], sizes], dim=1)
        extents = self._sizes[sizes]
        low, high = self._reachable(volume, extents[:, 0])
        assert (high >= low).all()
        if self._sums is None:
            start = low[:, None]
            return usable, torch.cat([start, self._around(volume, extents, start)], dim=1)
        drawn = _integers(low, high, 4 * _TRIES, generator(0, 0, "tissue"))
        around = self._around(volume, extents, drawn)
        passes = self._passes(volume, drawn, extents[:, 0])
        passes &= self._passes(volume, around, extents[:, 1])
        keep = passes.any(dim=1)
        if not keep.any():
            raise DataError(
                "too_much_tissue",
                f"no crop of any scan has less than {self._recipe.max_tissue:.0%} soft tissue",
            )
        known = [_first_that_passes(starts, passes)[0] for starts in (drawn, around)]
        return usable[keep], torch.stack(known, dim=1)[keep]


def iou(start: Tensor, extent: Tensor, other_start: Tensor, other_extent: Tensor) -> Tensor:
    """Intersection over union of boxes, float64 (...) for starts and extents (..., 3)."""
    last = torch.minimum(start + extent, other_start + other_extent)
    shared = (last - torch.maximum(start, other_start)).clamp(min=0).double().prod(dim=-1)
    union = extent.double().prod(dim=-1) + other_extent.double().prod(dim=-1) - shared
    return shared / union


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


def _first_that_passes(drawn: Tensor, passes: Tensor) -> tuple[Tensor, Tensor]:
    """First passing candidate of each sample, (B, 3) of (B, tries, 3); and if there is one, (B,).

    The first candidate where none passes.
    """
    at = passes.int().argmax(dim=1)  # the first maximum
    return drawn[torch.arange(len(drawn)), at], passes.any(dim=1)


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
