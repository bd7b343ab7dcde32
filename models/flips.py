"""Test-time flips: a network that looks at every window in several mirror images.

B batch, C classes, I J K voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.blend import Network
from models.bundle import Manifest

Float32Array = NDArray[np.float32]
Axis = Literal["i", "j", "k"]
AXES: tuple[Axis, ...] = ("i", "j", "k")


@dataclass(frozen=True, slots=True)
class Flipping:
    """A network whose probabilities are the mean over mirror images of its input.

        p = mean over subsets S of axes: unflip_S(softmax(network(flip_S(window))))
        logits = log p

    Logits, so that everything after it stays as it is: softmax gives p back, and a network that
    does not care about flips gives the same mask with them and without.
    """

    network: Network
    axes: tuple[Axis, ...]
    upright: Network | None = None
    """What the windows go through as they are, where that is not `network`: a
    `models.features.FeatureMeter`, which no mirror image shall reach."""

    @property
    def manifest(self) -> Manifest:
        """The network's."""
        return self.network.manifest

    @property
    def num_views(self) -> int:
        """Mirror images of a window, itself among them: how many times the work."""
        return int(2 ** len(self.axes))

    def run(self, batch: Float32Array, *, release_memory: bool = False) -> Float32Array:
        """Logits (B, C, I, J, K) of windows (B, 1, I, J, K)."""
        subsets = subsets_of(self.axes)
        total: Float32Array | None = None
        for number, axes in enumerate(subsets, start=1):
            is_last = release_memory and number == len(subsets)
            network = self.network if axes or self.upright is None else self.upright
            logits = network.run(np.ascontiguousarray(np.flip(batch, axes)), release_memory=is_last)
            own = np.flip(log_softmax(logits), axes)
            total = own if total is None else np.logaddexp(total, own)
        assert total is not None  # the empty subset is one
        return np.asarray(total - np.float32(np.log(len(subsets))), dtype=np.float32)


def with_flips(
    network: Network, axes: Sequence[Axis], *, upright: Network | None = None
) -> Network:
    """The network with these flips; where there are none, what windows go through as they are."""
    return Flipping(network, tuple(axes), upright) if axes else upright or network


def subsets_of(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    """Axes of a batch (B, C, I, J, K) that each mirror image flips, the empty set first."""
    places = [2 + AXES.index(axis) for axis in axes]
    return [some for size in range(len(places) + 1) for some in combinations(places, size)]


def log_softmax(logits: Float32Array) -> Float32Array:
    """Logarithms of probabilities, over the axis of classes of (B, C, I, J, K)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.asarray(shifted, dtype=np.float32)
