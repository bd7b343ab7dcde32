"""Blend a network's windows over a volume, and bring the blend to another grid, in slabs along K.

Windows are taken in layers along K. Input is prepared, and logits are summed, in slabs one window
thick that roll along K; planes that no later window touches are normalised and handed on at once.
So memory does not grow with the number of classes times the volume's resolution. Where even a slab
is too much, columns along J are taken one block after the other (`blocks`).

B batch, C classes, I J K voxels; a prime (I' J' K') is the network's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from imaging.resample import argmax_on_grid
from imaging.volume import Grid, Shape
from models.bundle import BundleError, Manifest
from models.rolling import InPlane, Layout, RollingInput, Source
from models.tiling import Windows, gaussian_weights
from models.windows import serving_windows

Float32Array = NDArray[np.float32]
T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with the number of windows done and of windows in all."""

BATCH_VOXELS = 1 << 20
"""Input voxels in a batch; a patch of 96 cubed goes alone, small ones together."""
PIECE_BYTES = 48 << 20
"""Logits that are resampled at a time."""


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
    """Finished planes of blended logits; theirs until the next slab is asked for."""

    first: int
    """Their first plane along K'."""
    logits: Float32Array
    """(C, I', J', planes), of J' the columns asked for."""


def blended_slabs(
    session: Network,
    source: Source,
    counter: Counter,
    *,
    windows: Windows | None = None,
    columns: slice | None = None,
    release_memory: bool = True,
) -> Iterator[Slab]:
    """Blended logits of a volume, in ascending slabs that cover it without gap or overlap.

    blend = sum over windows of weight * logits / sum over windows of weight

    Args:
        session: An open segmenter.
        source: The volume as network input.
        counter: Told of every window; its `total`, where 0, becomes the number of these windows.
        windows: Their size, overlap and batch; the model's own if None.
        columns: The part of J' that is wanted (`start` and `stop`); windows that touch it are run
            and the sums are the same as for the whole.
        release_memory: Give the network's working memory back with the last window.
    """
    windows = windows or own_windows(session)
    layout = Layout.of(source.grid.shape, windows, columns)
    counter.total = counter.total or layout.num_windows
    weights = gaussian_weights(windows.size)
    num_classes, thickness = 1 + len(session.manifest.labels), windows.size[2]
    held = RollingInput(source, layout)
    runner = _WindowRunner(session, held, weights, windows, counter)
    # The last channel is the sum of the weights.
    num_columns = layout.columns.stop - layout.columns.start
    extent = (source.grid.shape[0], num_columns, thickness)
    sums = np.zeros((num_classes + 1, *extent), dtype=np.float32)
    inside_k = slice(layout.before[2], layout.before[2] + source.grid.shape[2])
    ends = [*layout.starts[2][1:], layout.end_k]
    for first, end in zip(layout.starts[2], ends, strict=True):
        held.advance(first)
        is_last = release_memory and end == layout.end_k
        for place, logits in runner.layer(layout.in_plane, release_memory=is_last):
            (from_i, to_i), (from_j, to_j) = layout.overlaps(place)
            sums[:-1, to_i, to_j] += logits[:, from_i, from_j]
            sums[-1, to_i, to_j] += weights[from_i, from_j]
        wanted = slice(max(inside_k.start - first, 0), min(inside_k.stop, end) - first)
        if wanted.start < wanted.stop:
            finished = sums[:-1, :, :, wanted]
            for logits in finished:
                np.divide(logits, sums[-1, :, :, wanted], out=logits)
            yield Slab(first + wanted.start - inside_k.start, finished)
        _roll(sums, end - first)


class _WindowRunner:
    """Weighted logits of windows, in batches; windows of air alone share one run."""

    def __init__(
        self,
        session: Network,
        held: RollingInput,
        weights: Float32Array,
        windows: Windows,
        counter: Counter,
    ) -> None:
        self._session = session
        self._held = held
        self._weights = weights
        self._windows = windows
        self._counter = counter
        self._background = np.float32(held.background)
        self._of_air: Float32Array | None = None

    def layer(
        self, windows: list[InPlane], *, release_memory: bool
    ) -> Iterator[tuple[InPlane, Float32Array]]:
        """Every window with its weighted logits (C, *size), those of air first."""
        occupied = [
            place for place in windows if (self._held.window(place) != self._background).any()
        ]
        air = sorted(set(windows) - set(occupied))
        if air:
            ends_here = release_memory and not occupied
            weighted = self._air(release_memory=ends_here)
            yield from ((place, weighted) for place in air)
            self._counter.after_batch(len(air))
        size = self._windows.batch
        batches = list(chunks(occupied, size))
        for number, chunk in enumerate(batches, start=1):
            self._counter.before_batch()
            batch = np.empty((len(chunk), 1, *self._windows.size), dtype=np.float32)
            for image, place in zip(batch, chunk, strict=True):
                image[0] = self._held.window(place)
            is_last = release_memory and number == len(batches)
            logits = self._run(batch, release_memory=is_last)
            del batch
            for weighted, place in zip(logits, chunk, strict=True):
                np.multiply(weighted, self._weights, out=weighted)
                yield place, weighted
            self._counter.after_batch(len(chunk))

    def _air(self, *, release_memory: bool) -> Float32Array:
        """Run again only where the network must give its memory back."""
        if self._of_air is None or release_memory:
            self._counter.before_batch()
            batch = np.full((1, 1, *self._windows.size), self._background, dtype=np.float32)
            (self._of_air,) = self._run(batch, release_memory=release_memory)
            self._of_air *= self._weights
        return self._of_air

    def _run(self, batch: Float32Array, *, release_memory: bool) -> Float32Array:
        logits = self._session.run(batch, release_memory=release_memory)  # (B, C, *size)
        num_classes = 1 + len(self._session.manifest.labels)
        expected = (len(batch), num_classes, *self._windows.size)
        if logits.shape != expected:
            raise BundleError("bundle_inconsistent", f"logits are {logits.shape}, not {expected}")
        return logits


@dataclass(frozen=True, slots=True)
class Block:
    """Columns along J that are taken alone, so that slabs are narrower."""

    target: slice
    """Columns of the target, J."""
    source: slice
    """Columns along J' that their labels follow from."""


def blocks(source: Grid, target: Grid, num: int) -> list[Block]:
    """Split the target's columns evenly into at most `num` blocks."""
    lowest, highest = _support(source, target, axis=1)
    edges = np.unique(np.linspace(0, target.shape[1], num + 1).round().astype(int))
    return [
        Block(slice(int(low), int(high)), slice(int(lowest[low]), int(highest[high - 1]) + 1))
        for low, high in pairwise(edges)
    ]


def columns_of(grid: Grid, columns: slice) -> Grid:
    """The part of a grid between two columns along J."""
    return _part(grid, 1, columns.start, columns.stop)


class PlaneResampler:
    """Turns slabs of logits into labels on another grid, plane by plane as they become known.

    Keeps only the planes of logits that target planes still to come will look at.
    """

    def __init__(self, source: Grid, target: Grid, labels: NDArray[np.uint8]) -> None:
        self._lowest, self._highest = _support(source, target, axis=2)
        self._source, self._target, self._labels = source, target, labels
        self._num_done = 0  # target planes
        self._first = 0  # source plane at which the kept ones begin
        self._kept: Float32Array | None = None

    def add(self, slab: Slab) -> None:
        """Take the next slab; label the target planes that it makes known."""
        plane_bytes = slab.logits[..., :1].nbytes
        thickness = max(1, PIECE_BYTES // plane_bytes)
        for start in range(0, slab.logits.shape[-1], thickness):
            self._add(slab.logits[..., start : start + thickness])

    def _add(self, logits: Float32Array) -> None:
        if self._kept is None:
            self._kept = logits
        else:
            self._kept = np.concatenate([self._kept, logits], axis=-1)
        known = self._first + self._kept.shape[-1]
        begin = self._num_done
        end = int(np.searchsorted(self._highest, known))  # highest < known
        if end > begin:
            first = self._first
            low, high = self._lowest[begin] - first, self._highest[end - 1] + 1 - first
            self._labels[:, :, begin:end] = argmax_on_grid(
                self._kept[..., low:high],
                _part(self._source, 2, low + first, high + first),
                _part(self._target, 2, begin, end),
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


def own_windows(session: Network, shape: Shape | None = None) -> Windows:
    """The windows that a model is served with, on a volume of this shape; see `serving_windows`."""
    return windows_of(session.manifest, shape)


def windows_of(manifest: Manifest, shape: Shape | None = None) -> Windows:
    """The same of a manifest."""
    windows = serving_windows(manifest, shape)
    return replace(windows, batch=batch_size(windows.size))


def batch_size(patch: Shape) -> int:
    """Windows that go through the network together."""
    return max(1, BATCH_VOXELS // math.prod(patch))


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """The items in lists of this size; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def window(padded: Float32Array, start: tuple[int, int, int], patch: Shape) -> Float32Array:
    """A view of one window."""
    (i, j, k), (size_i, size_j, size_k) = start, patch
    return padded[i : i + size_i, j : j + size_j, k : k + size_k]


def _roll(slab: Float32Array, num_planes: int) -> None:
    """Move the slab forward along its last axis; new planes are zero."""
    left = max(slab.shape[-1] - num_planes, 0)
    for of_class in slab:
        for rows in of_class:  # NumPy copies what overlaps; a row of it is little
            rows[:, :left] = rows[:, num_planes:]
            rows[:, left:] = 0.0


def _support(source: Grid, target: Grid, axis: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Lowest and highest source index that each target index looks at along an axis."""
    step = np.linalg.inv(source.affine) @ target.affine
    scale, last = step[axis, axis], source.shape[axis] - 1
    centres = np.clip(step[axis, 3] + scale * np.arange(target.shape[axis]), 0, last)
    # Linear interpolation looks one voxel far; averaging to larger voxels looks further.
    reach = 1 + math.sqrt(max(scale**2 - 1, 0)) / 2
    lowest = np.maximum(np.floor(centres - reach), 0).astype(np.intp)
    return lowest, np.minimum(np.ceil(centres + reach), last).astype(np.intp)


def _part(grid: Grid, axis: int, first: int, stop: int) -> Grid:
    """The part of a grid between two indices along an axis."""
    shift, shape = np.eye(4), list(grid.shape)
    shift[axis, 3] = first
    shape[axis] = int(stop - first)
    return Grid((shape[0], shape[1], shape[2]), grid.affine @ shift)


def shape_of(array: Float32Array) -> Shape:
    """Voxels along I, J, K."""
    i, j, k = array.shape
    return i, j, k
