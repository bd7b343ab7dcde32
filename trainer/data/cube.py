"""Views taken apart like a Rubik's cube: sub-volumes or whole slabs turned in place.

Every move is a permutation of voxels, so the whole is one gather, and no value is interpolated.

B batch, N sub-volumes, S side of one, A slabs along an axis, I J K voxels.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data import blocks
from trainer.data.blocks import Shape
from trainer.data.to_device import to_device

NUM_ROTATIONS = 24
"""Ways to turn a cube onto itself."""


@dataclass(frozen=True, slots=True)
class Slabs:
    """Quarter turns of every slab about the axis it is a slab of, 0 to 3.

    Attributes:
        about_i: (B, A) for the slabs along I; turned first.
        about_j: The same along J.
        about_k: The same along K; turned last.
    """

    about_i: Tensor
    about_j: Tensor
    about_k: Tensor


def draw_rotations(batch_size: int, shape: Shape, side: int, random: torch.Generator) -> Tensor:
    """One of the 24 rotations for each sub-volume, I slowest, int64 (B, N)."""
    i, j, k = blocks.grid_of(shape, side)
    return torch.randint(NUM_ROTATIONS, (batch_size, i * j * k), generator=random)


def turn_subvolumes(views: Tensor, rotation: Tensor, side: int) -> Tensor:
    """Turn every sub-volume in its place (P, section 7).

        for each sub-volume n, counted with I slowest:
            out[n] = rotations()[rotation[n]] of views[n]

    Args:
        views: (B, 1, I, J, K), extents that are multiples of the side.
        rotation: (B, N).
        side: Voxels of a sub-volume along each axis.
    """
    i, j, k = views.shape[2:]
    cubes = blocks.split(views, side)
    reads = to_device(rotation_table(side)[rotation], views.device)  # (B, N, S^3)
    turned = cubes.flatten(2).gather(2, reads).reshape(cubes.shape)
    return blocks.join(turned, (i, j, k))


def draw_slabs(batch_size: int, shape: Shape, side: int, random: torch.Generator) -> Slabs:
    """A quarter turn for every slab, uniform over those that map the slab onto itself.

    These are 0 to 3 where its plane is square, and 0 and 2 where it is not.
    """
    turns = []
    for axis in range(3):
        one, other = (n for at, n in enumerate(shape) if at != axis)
        step = 1 if one == other else 2
        drawn = torch.randint(4 // step, (batch_size, shape[axis] // side), generator=random)
        turns.append(step * drawn)
    return Slabs(*turns)


def turn_slabs(views: Tensor, slabs: Slabs, side: int) -> Tensor:
    """Turn slabs of `side` voxels: all along I, then all along J, then all along K (Tao et al.).

    for each axis, each slab along it:
        slab = np.rot90(slab, turns, the two other axes in their order)
    """
    for axis, turns in enumerate((slabs.about_i, slabs.about_j, slabs.about_k)):
        views = _turn_along(views, to_device(turns, views.device), side, axis)
    return views


def _turn_along(views: Tensor, turns: Tensor, side: int, axis: int) -> Tensor:
    """All four turns of everything, of which each slab takes its own."""
    one, other = (at + 2 for at in range(3) if at != axis)
    of_voxel = turns.repeat_interleave(side, dim=1)  # (B, n)
    shape = [len(views), 1, 1, 1, 1]
    shape[axis + 2] = -1
    of_voxel = of_voxel.reshape(shape)
    out = views
    is_square = views.shape[one] == views.shape[other]
    for turn in (1, 2, 3) if is_square else (2,):
        out = torch.where(of_voxel == turn, views.rot90(turn, (one, other)), out)
    return out


@functools.cache
def rotation_table(side: int) -> Tensor:
    """For each rotation the voxel that each voxel of a cube reads, flat, int64 (24, S^3)."""
    numbers = np.arange(side**3).reshape(side, side, side)
    return torch.from_numpy(np.stack([_rotated(numbers, *r).reshape(-1) for r in rotations()]))


@functools.cache
def rotations() -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Each rotation as a transposition and the axes flipped after it; the first changes nothing.

    A transposition with flips is a rotation, and no mirror image, where both are even or both odd.
    """
    found = []
    for order in itertools.permutations(range(3)):
        swaps = sum(order[a] > order[b] for a, b in ((0, 1), (0, 2), (1, 2)))
        for flips in itertools.chain.from_iterable(
            itertools.combinations(range(3), count) for count in range(4)
        ):
            if (swaps + len(flips)) % 2 == 0:
                found.append((order, flips))
    assert len(found) == NUM_ROTATIONS
    return tuple(found)


def _rotated(
    cube: np.typing.NDArray[np.int64], order: tuple[int, ...], flips: tuple[int, ...]
) -> np.typing.NDArray[np.int64]:
    return np.ascontiguousarray(np.flip(cube.transpose(order), flips))
