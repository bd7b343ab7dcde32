"""Blend a network's windows over a volume, and bring the blend to another grid, in slabs along K.

Windows are taken in layers along K. Logits are summed in a slab one window thick that rolls along
K; planes that no later window touches are normalised and handed on at once. So memory does not
grow with the number of classes times the volume's resolution.

B batch, C classes, I J K voxels; a prime (I' J' K') is the network's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from imaging.resample import argmax_on_grid
from imaging.volume import Grid, Shape
from models.bundle import BundleError, Manifest, volume_input
from models.preprocess import Prepared
from models.tiling import gaussian_weights, margins, pad, window_starts

Float32Array = NDArray[np.float32]
Starts = tuple[int, int, int]
T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with the number of windows done and of windows in all."""

BATCH_VOXELS = 1 << 20
"""Input voxels in a batch; a patch of 96 cubed goes alone, small ones together."""


class Stopped(Exception):  # noqa: N818 - an outcome that the caller asked for, no error
    """`should_stop` turned true."""


class Network(Protocol):
    """What windows go through: a `models.session.OnnxSession`, or something around one."""

    @property
    def manifest(self) -> Manifest:
        """How it wants its input, and what it gives."""

    def run(self, batch: Float32Array, *, release_memory: bool = False) -> Float32Array:
        """Logits (B, C, I, J, K) of windows (B, 1, I, J, K)."""


@dataclass(frozen=True, slots=True)
class Slab:
    """Finished planes of blended logits."""

    first: int
    """Their first plane along K'."""
    logits: Float32Array
    """(C, I', J', planes)."""


def blended_slabs(session: Network, prepared: Prepared, counter: Counter) -> Iterator[Slab]:
    """Blended logits of a prepared volume, in ascending slabs that cover it without gap or overlap.

    blend = sum over windows of weight * logits / sum over windows of weight
    """
    manifest = session.manifest
    _, patch = volume_input(manifest)
    num_classes = 1 + len(manifest.labels)
    padded = pad(prepared.array, patch, prepared.background)
    inside_i, inside_j, inside_k = (
        slice(before, before + size)
        for (before, _), size in zip(
            margins(shape_of(prepared.array), patch), prepared.array.shape, strict=True
        )
    )
    weights = gaussian_weights(patch)
    layers = [
        (k, list(windows))
        for k, windows in groupby(
            window_starts(shape_of(padded), patch, manifest.overlap), key=lambda start: start[2]
        )
    ]
    counter.total = sum(len(windows) for _, windows in layers)
    runner = _WindowRunner(session, padded, prepared.background, counter)
    runner.look_for_air([start for _, windows in layers for start in windows])

    thickness = patch[2]
    sums = np.zeros((num_classes, *padded.shape[:2], thickness), dtype=np.float32)
    norm = np.zeros((*padded.shape[:2], thickness), dtype=np.float32)
    next_layers = [k for k, _ in layers[1:]] + [padded.shape[2]]
    for (first, windows), next_first in zip(layers, next_layers, strict=True):
        for (i, j, _), logits in runner.layer(windows):
            here = (slice(i, i + patch[0]), slice(j, j + patch[1]))
            sums[:, *here] += logits * weights
            norm[here] += weights
        num_done = next_first - first
        wanted = slice(max(inside_k.start - first, 0), min(inside_k.stop - first, num_done))
        if wanted.start < wanted.stop:
            finished = np.divide(
                sums[:, inside_i, inside_j, wanted],
                norm[inside_i, inside_j, wanted],
                dtype=np.float32,
            )
            yield Slab(first + wanted.start - inside_k.start, finished)
        _roll(sums, num_done)
        _roll(norm, num_done)


class _WindowRunner:
    """Logits of windows, in batches; windows of air alone share one run."""

    def __init__(
        self, session: Network, padded: Float32Array, background: float, counter: Counter
    ) -> None:
        self._session = session
        self._padded = padded
        self._background = np.float32(background)
        self._counter = counter
        _, self._patch = volume_input(session.manifest)
        self._logits_of_air: Float32Array | None = None
        self._occupied: set[Starts] = set()
        self._num_left = 0

    def look_for_air(self, starts: list[Starts]) -> None:
        """Find out which windows hold anything but air."""
        self._occupied = {
            start
            for start in starts
            if (window(self._padded, start, self._patch) != self._background).any()
        }
        self._num_left = len(self._occupied)

    def layer(self, windows: list[Starts]) -> Iterator[tuple[Starts, Float32Array]]:
        """Every window with its logits (C, *patch), those of air first."""
        air = [start for start in windows if start not in self._occupied]
        if air:
            yield from ((start, self._air()) for start in air)
            self._counter.after_batch(len(air))
        occupied = [start for start in windows if start in self._occupied]
        for chunk in chunks(occupied, batch_size(self._patch)):
            self._counter.before_batch()
            batch = np.stack([window(self._padded, start, self._patch)[None] for start in chunk])
            self._num_left -= len(chunk)
            logits = self._run(batch, is_last=self._num_left == 0)
            yield from zip(chunk, logits, strict=True)
            self._counter.after_batch(len(chunk))

    def _air(self) -> Float32Array:
        if self._logits_of_air is None:
            self._counter.before_batch()
            batch = np.full((1, 1, *self._patch), self._background, dtype=np.float32)
            (self._logits_of_air,) = self._run(batch, is_last=False)
        return self._logits_of_air

    def _run(self, batch: Float32Array, *, is_last: bool) -> Float32Array:
        logits = self._session.run(batch, release_memory=is_last)  # (B, C, *patch)
        expected = (len(batch), 1 + len(self._session.manifest.labels), *self._patch)
        if logits.shape != expected:
            raise BundleError("bundle_inconsistent", f"logits are {logits.shape}, not {expected}")
        return logits


class PlaneResampler:
    """Turns slabs of logits into labels on another grid, plane by plane as they become known.

    Keeps only the planes of logits that target planes still to come will look at.
    """

    def __init__(self, source: Grid, target: Grid, labels: NDArray[np.uint8]) -> None:
        step = np.linalg.inv(source.affine) @ target.affine
        centres = step[2, 3] + step[2, 2] * np.arange(target.shape[2])
        centres = np.clip(centres, 0, source.shape[2] - 1)
        # Linear interpolation looks one plane far; averaging to larger voxels looks further.
        reach = 1 + math.sqrt(max(step[2, 2] ** 2 - 1, 0)) / 2
        self._lowest = np.maximum(np.floor(centres - reach), 0).astype(int)
        self._highest = np.minimum(np.ceil(centres + reach), source.shape[2] - 1).astype(int)
        self._source, self._target, self._labels = source, target, labels
        self._num_done = 0  # target planes
        self._first = 0  # source plane at which the kept ones begin
        self._kept: Float32Array | None = None

    def add(self, slab: Slab) -> None:
        """Take the next slab; label the target planes that it makes known."""
        if self._kept is None:
            self._kept = slab.logits
        else:
            self._kept = np.concatenate([self._kept, slab.logits], axis=-1)
        known = self._first + self._kept.shape[-1]
        begin = self._num_done
        end = int(np.searchsorted(self._highest, known))  # highest < known
        if end > begin:
            first = self._first
            low, high = self._lowest[begin] - first, self._highest[end - 1] + 1 - first
            self._labels[:, :, begin:end] = argmax_on_grid(
                self._kept[..., low:high],
                _planes(self._source, low + first, high + first),
                _planes(self._target, begin, end),
            )
            self._num_done = end
        if end < len(self._lowest):
            drop = min(int(self._lowest[end]), known) - self._first
            self._kept = self._kept[..., drop:].copy()
            self._first += drop


class Counter:
    """Windows done of windows in all, told to the caller, who may ask to stop."""

    def __init__(
        self,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
        total: int = 0,
    ) -> None:
        self.done = 0
        self.total = total
        self._progress = progress
        self._should_stop = should_stop

    def before_batch(self) -> None:
        """Raise `Stopped` if the caller wants to stop."""
        if self._should_stop is not None and self._should_stop():
            raise Stopped

    def after_batch(self, num_windows: int) -> None:
        """Count windows and tell the caller."""
        self.done += num_windows
        if self._progress is not None:
            self._progress(self.done, self.total)


def batch_size(patch: Shape) -> int:
    """Windows that go through the network together."""
    return max(1, BATCH_VOXELS // math.prod(patch))


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """The items in lists of this size; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def window(padded: Float32Array, start: Starts, patch: Shape) -> Float32Array:
    """A view of one window."""
    (i, j, k), (size_i, size_j, size_k) = start, patch
    return padded[i : i + size_i, j : j + size_j, k : k + size_k]


def _roll(slab: Float32Array, num_planes: int) -> None:
    """Move the slab forward along its last axis; new planes are zero."""
    left = slab.shape[-1] - num_planes
    if left > 0:
        slab[..., :left] = slab[..., num_planes:]  # NumPy guards overlapping moves
    slab[..., max(left, 0) :] = 0.0


def _planes(grid: Grid, first: int, stop: int) -> Grid:
    """The part of a grid between two planes along K."""
    shift = np.eye(4)
    shift[2, 3] = first
    return Grid((*grid.shape[:2], int(stop - first)), grid.affine @ shift)


def shape_of(array: Float32Array) -> Shape:
    """Voxels along I, J, K."""
    i, j, k = array.shape
    return i, j, k
