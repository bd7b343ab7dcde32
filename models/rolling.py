"""Where windows lie over a volume, and the few planes of it that they look at.

Layers of windows pass along K. A layer needs as many planes as a window is thick, so those are
prepared when the layer comes and forgotten when it has gone by.

I J K voxels; a prime (I' J' K') is the network's grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from imaging.volume import Grid, Shape
from models.tiling import Windows, axis_starts, margins

Float32Array = NDArray[np.float32]
InPlane = tuple[int, int]
PLANES_AT_ONCE = 16
"""Planes that are prepared in one go."""


class Source(Protocol):
    """Network input of a scan: `models.preprocess.Preparation`, or all of it in `Prepared`."""

    @property
    def grid(self) -> Grid:
        """The network's grid."""
        ...

    @property
    def background(self) -> float:
        """The value of air."""
        ...

    def planes(self, first: int, stop: int, columns: slice = ...) -> Float32Array:
        """Planes along K', (stop - first, I', J'), of them the columns along J'."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """Where windows lie on a volume with its margins, of whose columns a part may be wanted."""

    shape: Shape
    """Of the volume."""
    size: Shape
    """Of a window."""
    before: Shape
    """Voxels of margin before each axis."""
    starts: tuple[list[int], list[int], list[int]]
    """First voxels of the windows along each axis, margins counted; along J those of windows that
    touch the wanted columns."""
    columns: slice
    """The wanted part of J', margins not counted."""

    @classmethod
    def of(cls, shape: Shape, windows: Windows, columns: slice | None = None) -> Layout:
        """The layout of windows over a shape; of all columns if None."""
        wanted = slice(0, shape[1]) if columns is None else columns
        i, j, k = (before for before, _ in margins(shape, windows.size))
        starts_i, starts_j, starts_k = (
            axis_starts(max(extent, size), size, windows.overlap)
            for extent, size in zip(shape, windows.size, strict=True)
        )
        first, stop = j + wanted.start, j + wanted.stop
        touching = [at for at in starts_j if at < stop and at + windows.size[1] > first]
        return cls(shape, windows.size, (i, j, k), (starts_i, touching, starts_k), wanted)

    @property
    def in_plane(self) -> list[InPlane]:
        """First voxels along I and J of a layer's windows."""
        return [(i, j) for j in self.starts[1] for i in self.starts[0]]

    @property
    def num_windows(self) -> int:
        """Windows in all layers."""
        return math.prod(len(starts) for starts in self.starts)

    @property
    def span(self) -> tuple[slice, slice]:
        """What the windows cover along I and J, margins counted."""
        i, j = self.starts[:2]
        return slice(0, i[-1] + self.size[0]), slice(j[0], j[-1] + self.size[1])

    @property
    def end_k(self) -> int:
        """Planes, margins counted."""
        return self.starts[2][-1] + self.size[2]

    def overlaps(self, place: InPlane) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Along I and along J: the wanted part of a window, and where it goes in the sums."""
        all_i = slice(self.before[0], self.before[0] + self.shape[0])
        shift = self.before[1]
        all_j = slice(shift + self.columns.start, shift + self.columns.stop)
        along_i, along_j = (
            _overlap(start, size, wanted)
            for start, size, wanted in zip(place, self.size[:2], (all_i, all_j), strict=True)
        )
        return along_i, along_j


class RollingInput:
    """Prepared planes, as many as a window is thick, moving along K'."""

    def __init__(self, source: Source, layout: Layout) -> None:
        self._source, self._layout = source, layout
        span_i, span_j = layout.span
        thickness = layout.size[2]
        extent = (thickness, span_i.stop, span_j.stop - span_j.start)
        self._held = np.full(extent, source.background, dtype=np.float32)  # (K, I', J')
        self._first = -thickness  # of the held planes, margins counted: none is known yet
        self.background = source.background

    def advance(self, first: int) -> None:
        """Hold the planes from `first` on."""
        thickness = len(self._held)
        num_new = min(first - self._first, thickness)
        for k in range(thickness - num_new):
            self._held[k] = self._held[k + num_new]
        self._first = first
        self._held[thickness - num_new :] = self._source.background
        before_k, (num_i, num_j, num_k) = self._layout.before[2], self._layout.shape
        low = max(first + thickness - num_new - before_k, 0)
        high = min(first + thickness - before_k, num_k)
        if low >= high:
            return
        before_i, before_j = self._layout.before[:2]
        begin = self._layout.span[1].start - before_j
        columns = slice(max(begin, 0), min(self._layout.span[1].stop - before_j, num_j))
        to_i = slice(before_i, before_i + num_i)
        to_j = slice(columns.start - begin, columns.stop - begin)
        for start in range(low, high, PLANES_AT_ONCE):
            stop = min(start + PLANES_AT_ONCE, high)
            to_k = slice(start + before_k - first, stop + before_k - first)
            self._held[to_k, to_i, to_j] = self._source.planes(start, stop, columns)

    def window(self, place: InPlane) -> Float32Array:
        """A view of one window, (I, J, K)."""
        (i, j), (size_i, size_j, _) = place, self._layout.size
        j -= self._layout.span[1].start
        return self._held[:, i : i + size_i, j : j + size_j].transpose(1, 2, 0)


def _overlap(start: int, size: int, wanted: slice) -> tuple[slice, slice]:
    """The part of a window inside the wanted extent: in the window, and in the extent."""
    first, stop = max(start, wanted.start), min(start + size, wanted.stop)
    return slice(first - start, stop - start), slice(first - wanted.start, stop - wanted.start)
