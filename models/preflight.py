"""What a segmentation will take, told before it begins: memory from shapes alone, and time.

The parts are added up: the mapped scan, the mask, the rolling input and sums (`models.blend`), one
batch with its logits, what resampling holds, and the network's working memory. Only the last is
not known from shapes: the network is run once on a small window, and what it took is scaled by the
voxels, as activations are. Seconds are scaled from the same run until a real one has been timed.

Where a segmentation would not fit, it takes fewer windows at a time, then windows no larger than in
training, then columns in blocks; where not even that fits, it is refused before it has begun.

C classes, I J K voxels; a prime (I' J' K') is the network's grid.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from imaging import resample
from imaging.resample import resampled_grid
from imaging.volume import Grid, Shape, Volume
from models import blend
from models.blend import blocks, own_windows
from models.bundle import BundleError, volume_input
from models.memory import resident_bytes
from models.rolling import PLANES_AT_ONCE, Layout
from models.session import CPU, OnnxSession
from models.tiling import Windows

SLAB_BYTES = 512 << 20
"""Most that the sums of a slab take; beyond, columns are taken in blocks. So many classes do not
take more memory than few."""
MAX_BLOCKS = 64
SPARE_BYTES = 24 << 20
"""For the allocators' own needs."""
PROBE_SIDE = 48
"""Voxels along an axis of the window on which the network is tried."""
CLEAN_UP_BYTES = 8
"""A voxel of the mask: copies of it, and components of four bytes."""
SCALAR_S = 2e-9
"""Seconds that NumPy takes for a voxel of one class of a window or of the mask, roughly."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """How a segmentation will be done, and what that takes."""

    windows: Windows
    num_blocks: int
    num_windows: int
    predicted_bytes: int
    """More than the process holds before: an upper bound."""
    available_bytes: int | None
    """None where nothing tells."""
    predicted_s: float
    degraded: tuple[str, ...] = ()
    """What was given up so that it fits: `smaller_batch`, `smaller_windows`, `column_blocks`."""

    @property
    def fits(self) -> bool:
        """Whether memory suffices, as far as anything tells."""
        return self.available_bytes is None or self.predicted_bytes <= self.available_bytes

    def __str__(self) -> str:
        """The sentence for a person: needs 6.1 GB, 8.0 GB available, about 40 s."""
        parts = [f"needs {_shown(self.predicted_bytes)}"]
        if self.available_bytes is not None:
            parts.append(f"{_shown(self.available_bytes)} available")
        return ", ".join([*parts, f"about {max(self.predicted_s, 1):.0f} s"])


@dataclass(frozen=True, slots=True)
class Pace:
    """What a network takes for a voxel of a window."""

    working_bytes: float
    seconds: float


def plan(
    session: OnnxSession,
    volume: Volume,
    *,
    available_bytes: int | None = None,
    windows: Windows | None = None,
) -> Preflight:
    """Choose batch and blocks so that a segmentation fits, and tell what it will take.

    Args:
        session: An open segmenter; tried on a small window the first time.
        volume: The scan; its voxels are not looked at.
        available_bytes: What it may take; see `models.memory.available_bytes`. None is no limit.
        windows: Their size and overlap; the model's own if None.

    Raises:
        BundleError: `insufficient_memory`, or what `OnnxSession.run` raises.
    """
    pace = pace_of(session)
    job = _Job.of(session, volume, pace, available_bytes)
    smallest = windows
    if windows is None:
        windows = own_windows(session, job.source.shape)
        smallest = replace(own_windows(session), batch=1)
    first = job.with_sums_below(windows, SLAB_BYTES)
    found, degraded = first, []
    if not found.fits and windows.batch > 1:
        windows = replace(windows, batch=1)
        found = job.preflight(windows, first.num_blocks)
        degraded.append("smaller_batch")
    if not found.fits and smallest is not None and smallest.size != windows.size:
        windows = smallest
        found = job.preflight(windows, first.num_blocks)
        degraded.append("smaller_windows")
    if not found.fits:
        degraded.append("column_blocks")
        for num_blocks in range(first.num_blocks + 1, MAX_BLOCKS + 1):
            found = job.preflight(windows, num_blocks)
            if found.fits:
                break
    if not found.fits:
        least = min(
            (job.preflight(windows, num) for num in range(1, MAX_BLOCKS + 1)),
            key=lambda one: one.predicted_bytes,
        )
        raise BundleError("insufficient_memory", f"the segmentation {least}")
    return replace(found, degraded=tuple(degraded))


def pace_of(session: OnnxSession) -> Pace:
    """Working memory and time of a network, measured when it is first asked for."""
    with _lock:
        known = _paces.get(session)
        if known is None:
            known = _paces[session] = _measured(session)
        return known


def learn(session: OnnxSession, num_voxels: int, seconds: float) -> None:
    """Take in how long windows of so many voxels really took."""
    with _lock:
        known = _paces.get(session)
        if known is not None and num_voxels > 0:
            _paces[session] = replace(known, seconds=seconds / num_voxels)


_paces: WeakKeyDictionary[OnnxSession, Pace] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Job:
    """What of a segmentation does not depend on how it is done."""

    volume: Volume
    source: Grid
    num_classes: int
    pace: Pace
    on_host: bool
    cleans_up: bool
    available_bytes: int | None

    @classmethod
    def of(
        cls, session: OnnxSession, volume: Volume, pace: Pace, available_bytes: int | None
    ) -> _Job:
        spec, _ = volume_input(session.manifest)
        asked = session.manifest.postprocess
        return cls(
            volume,
            resampled_grid(volume.grid, spec.spacing_mm),
            1 + len(session.manifest.labels),
            pace,
            session.provider == CPU,
            asked.changes_masks or bool(asked.lesions),
            available_bytes,
        )

    def with_sums_below(self, windows: Windows, slab_bytes: int) -> Preflight:
        """In as few blocks as keep the sums of a slab that small."""
        whole = 4 * (self.num_classes + 1) * math.prod(self.source.shape[:2]) * windows.size[2]
        return self.preflight(windows, min(math.ceil(whole / slab_bytes), MAX_BLOCKS))

    def preflight(self, windows: Windows, num_blocks: int) -> Preflight:
        """What it takes in this way."""
        parts = blocks(self.source, self.volume.grid, num_blocks)
        layouts = [Layout.of(self.source.shape, windows, part.source) for part in parts]
        num_windows = sum(layout.num_windows for layout in layouts)
        inference = max(self._inference_bytes(windows, layout) for layout in layouts)
        num_voxels = math.prod(self.volume.shape)
        kept = num_voxels  # the mask
        if isinstance(self.volume.voxels, np.memmap):
            kept += num_voxels * self.volume.voxels.itemsize
        clean_up = CLEAN_UP_BYTES * num_voxels if self.cleans_up else 0
        window_voxels = num_windows * math.prod(windows.size)
        seconds = window_voxels * (self.pace.seconds + SCALAR_S * (self.num_classes + 1))
        seconds += num_voxels * SCALAR_S * 5 * self.num_classes
        return Preflight(
            windows,
            num_blocks,
            num_windows,
            kept + max(inference, clean_up) + SPARE_BYTES,
            self.available_bytes,
            round(seconds, 1),
        )

    def _inference_bytes(self, windows: Windows, layout: Layout) -> int:
        window, thickness = math.prod(windows.size), windows.size[2]
        span_i, span_j = layout.span
        span: int = span_i.stop * (span_j.stop - span_j.start)
        plane: int = layout.shape[0] * (layout.columns.stop - layout.columns.start)
        ahead = min(PLANES_AT_ONCE, layout.shape[2])
        in_plane = self.volume.shape[0] * self.volume.shape[1] + span
        rolling = 4 * span * (thickness + ahead)
        rolling += min(2 * resample.SLAB_BYTES, 4 * in_plane * ahead)
        sums = 4 * (self.num_classes + 1) * plane * thickness
        batch = 4 * window * (windows.batch * (1 + self.num_classes) + self.num_classes + 1)
        batch += window * windows.batch * self.num_classes  # of booleans: is it finite
        if self.on_host:
            batch += round(self.pace.working_bytes * windows.batch * window)
        return rolling + sums + batch + self._resampling_bytes(plane, thickness)

    def _resampling_bytes(self, plane: int, thickness: int) -> int:
        """Of logits a piece with its neighbours; of the finer grid a few slabs of one class."""
        of_plane = 4 * self.num_classes * plane
        coarser = self.volume.spacing_mm[2] / _spacing_k(self.source)
        reach = 2 + 2 * math.ceil(max(coarser, 1.0))
        piece = min(max(blend.PIECE_BYTES, of_plane), of_plane * thickness) + 2 * reach * of_plane
        widening = max(1.0, self.source.shape[0] / self.volume.shape[0])
        in_plane = 4 * self.volume.shape[0] * self.volume.shape[1]
        slab = min(max(resample.SLAB_BYTES, in_plane), in_plane * self.volume.shape[2])
        return piece + round((3 + widening) * slab)


def _measured(session: OnnxSession) -> Pace:
    """Run the network on a small window: to warm up, for its memory, and for its time."""
    _, patch = volume_input(session.manifest)
    size = _probe_size(patch, session.manifest.inputs[0].shape[2:])
    batch = np.zeros((1, 1, *size), dtype=np.float32)
    session.run(batch, release_memory=True)
    before = resident_bytes()
    session.run(batch)
    grown = max(resident_bytes() - before, 0)
    seconds = []
    for is_last in (False, True):
        began = time.perf_counter()
        session.run(batch, release_memory=is_last)
        seconds.append(time.perf_counter() - began)
    voxels = math.prod(size)
    return Pace(working_bytes=grown / voxels, seconds=min(seconds) / voxels)


def _probe_size(patch: Shape, declared: tuple[int | str, ...]) -> Shape:
    """The patch, halved where it is long and the network takes it so."""
    sides = []
    for side, extent in zip(patch, declared, strict=True):
        small = side
        while isinstance(extent, str) and small > PROBE_SIDE and small % 16 == 0:
            small //= 2
        sides.append(small)
    return sides[0], sides[1], sides[2]


def _spacing_k(grid: Grid) -> float:
    return float(np.linalg.norm(grid.affine[:3, 2]))


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
