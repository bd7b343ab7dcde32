"""What a segmentation will take, told before it begins: memory from shapes alone, and time.

The parts are added up: the mapped scan, the mask, the rolling input and sums (`models.blend`), one
batch with its logits, what resampling holds, and the network's working memory. Only the last is
not known from shapes (`models.pace`): it is scaled by the voxels, as activations are.

Where a segmentation would not fit, it takes fewer windows at a time, then windows no larger than in
training, then columns in blocks; where not even that fits, it is refused before it has begun.
Mirror images cost time, and a few copies of a batch's logits. A cascade has a plan for each pass;
the fine one's is that of the whole scan, which it looks at where no organ is found. An embedding
holds the whole prepared scan and one batch, of which it takes fewer windows at a time.

C classes, I J K voxels; a prime (I' J' K') is the network's grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from imaging import resample
from imaging.resample import resampled_grid
from imaging.volume import Grid, Volume
from models import blend
from models.blend import blocks, windows_of
from models.bundle import BundleError, Manifest, coarse_manifest, volume_input
from models.pace import Pace, pace_of
from models.rolling import PLANES_AT_ONCE, Layout
from models.session import CPU, OnnxSession
from models.tiling import Windows, window_starts

SLAB_BYTES = 512 << 20
"""Most that the sums of a slab take; beyond, columns are taken in blocks. So many classes do not
take more memory than few."""
MAX_BLOCKS = 64
SPARE_BYTES = 24 << 20
"""For the allocators' own needs."""
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
    coarse: Preflight | None = None
    """Of a cascade's first pass. Time and windows of the whole are then those of a scan in which no
    organ is found; the memory is that of the pass that takes more."""

    @property
    def fits(self) -> bool:
        """Whether memory suffices, as far as anything tells."""
        return self.available_bytes is None or self.predicted_bytes <= self.available_bytes

    def __str__(self) -> str:
        """The sentence for a person: needs 6.1 GB, 8.0 GB available, about 40 s."""
        parts = [f"needs {_shown(self.predicted_bytes)}"]
        if self.available_bytes is not None:
            parts.append(f"{_shown(self.available_bytes)} available")
        about = "about" if self.coarse is None else "at most about"
        return ", ".join([*parts, f"{about} {max(self.predicted_s, 1):.0f} s"])


def plan(
    session: OnnxSession,
    volume: Volume,
    *,
    available_bytes: int | None = None,
    windows: Windows | None = None,
    num_views: int = 1,
    coarse: OnnxSession | None = None,
) -> Preflight:
    """Choose batch and blocks so that a segmentation fits, and tell what it will take.

    Args:
        session: An open segmenter; tried on a small window the first time.
        volume: The scan; its voxels are not looked at.
        available_bytes: What it may take; see `models.memory.available_bytes`. None is no limit.
        windows: Their size and overlap; the model's own if None.
        num_views: Mirror images of every window (`models.flips`), itself among them.
        coarse: The open coarse network, of a cascade of two.

    Raises:
        BundleError: `insufficient_memory`, or what `OnnxSession.run` raises.
    """
    manifest = session.manifest
    job = _Job.of(session, manifest, volume, available_bytes, num_views)
    fine = _fitted(job, manifest, windows)
    if manifest.cascade is None:
        return fine
    manifest = coarse_manifest(manifest)
    job = _Job.of(coarse or session, manifest, volume, available_bytes)
    # The coarse mask stays on the coarse grid, where its components are found.
    job = replace(job, target=job.source, cleans_up=True)
    first = _fitted(job, manifest, None)
    return replace(
        fine,
        num_windows=first.num_windows + fine.num_windows,
        predicted_bytes=max(first.predicted_bytes, fine.predicted_bytes),
        predicted_s=round(first.predicted_s + fine.predicted_s, 1),
        degraded=tuple(dict.fromkeys(first.degraded + fine.degraded)),
        coarse=first,
    )


def plan_embedding(
    session: OnnxSession,
    volume: Volume,
    *,
    available_bytes: int | None = None,
    overlap: float = 0.0,
    num_regions: int = 0,
) -> Preflight:
    """Choose a batch so that `models.predict.embed` fits, and tell what it will take.

    Args:
        session: An open encoder; tried on a small window the first time.
        volume: The scan; its voxels are not looked at.
        available_bytes: As of `plan`.
        overlap: Of the windows.
        num_regions: Of `models.regions.embed_regions`, whose shares of the network's voxels and
            whose labels are held too.

    Raises:
        BundleError: `insufficient_memory`, or what `OnnxSession.run` raises.
    """
    spec, patch = volume_input(session.manifest)
    pace = pace_of(session)
    shape = resampled_grid(volume.grid, spec.spacing_mm).shape
    i, j, k = (max(size, side) for size, side in zip(shape, patch, strict=True))
    padded = (i, j, k)
    kept = 4 * math.prod(shape) + (4 * math.prod(padded) if padded != shape else 0)
    if num_regions:
        kept += num_regions * 4 * math.prod(padded) + 2 * math.prod(volume.shape)
    in_plane = math.prod(volume.shape[:2]) + math.prod(shape[:2])
    making = min(2 * resample.SLAB_BYTES, 4 * in_plane * shape[2])
    mapped = _mapped_bytes(volume)
    num_windows = len(window_starts(padded, patch, overlap))

    def in_batches_of(size: int) -> Preflight:
        batch = size * math.prod(patch) * 4
        if session.provider == CPU:
            batch += round(pace.working_bytes * size * math.prod(patch))
        return Preflight(
            Windows(patch, overlap, size),
            1,
            num_windows,
            mapped + kept + max(making, batch) + SPARE_BYTES,
            available_bytes,
            round(num_windows * math.prod(patch) * (pace.seconds + SCALAR_S), 1),
        )

    found = in_batches_of(min(blend.batch_size(patch), num_windows))
    if not found.fits and found.windows.batch > 1:
        found = replace(in_batches_of(1), degraded=("smaller_batch",))
    if not found.fits:
        raise BundleError("insufficient_memory", f"the embedding {found}")
    return found


def _fitted(job: _Job, manifest: Manifest, windows: Windows | None) -> Preflight:
    """The plan of one pass; these windows, or the model's own."""
    smallest = windows
    if windows is None:
        windows = windows_of(manifest, job.source.shape)
        smallest = replace(windows_of(manifest), batch=1)
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


@dataclass(frozen=True, slots=True)
class _Job:
    """What of a segmentation does not depend on how it is done."""

    volume: Volume
    source: Grid
    """The network's."""
    target: Grid
    """Of the mask."""
    num_classes: int
    num_views: int
    pace: Pace
    on_host: bool
    cleans_up: bool
    available_bytes: int | None

    @classmethod
    def of(
        cls,
        session: OnnxSession,
        manifest: Manifest,
        volume: Volume,
        available_bytes: int | None,
        num_views: int = 1,
    ) -> _Job:
        spec, _ = volume_input(manifest)
        asked = manifest.postprocess
        return cls(
            volume,
            resampled_grid(volume.grid, spec.spacing_mm),
            volume.grid,
            1 + len(manifest.labels),
            num_views,
            pace_of(session),
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
        parts = blocks(self.source, self.target, num_blocks)
        layouts = [Layout.of(self.source.shape, windows, part.source) for part in parts]
        num_windows = self.num_views * sum(layout.num_windows for layout in layouts)
        inference = max(self._inference_bytes(windows, layout) for layout in layouts)
        num_voxels = math.prod(self.target.shape)
        kept = num_voxels + _mapped_bytes(self.volume)  # the mask, and the scan
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
        if self.num_views > 1:  # the image flipped, and three more of the logits (`Flipping.run`)
            batch += 4 * window * windows.batch * (1 + 3 * self.num_classes)
        if self.on_host:
            batch += round(self.pace.working_bytes * windows.batch * window)
        return rolling + sums + batch + self._resampling_bytes(plane, thickness)

    def _resampling_bytes(self, plane: int, thickness: int) -> int:
        """Of logits a piece with its neighbours; of the finer grid a few slabs of one class."""
        of_plane = 4 * self.num_classes * plane
        coarser = _spacing_k(self.target) / _spacing_k(self.source)
        reach = 2 + 2 * math.ceil(max(coarser, 1.0))
        piece = min(max(blend.PIECE_BYTES, of_plane), of_plane * thickness) + 2 * reach * of_plane
        widening = max(1.0, self.source.shape[0] / self.target.shape[0])
        in_plane = 4 * self.target.shape[0] * self.target.shape[1]
        slab = min(max(resample.SLAB_BYTES, in_plane), in_plane * self.target.shape[2])
        return piece + round((3 + widening) * slab)


def _mapped_bytes(volume: Volume) -> int:
    """Of a scan that lies in a file: its pages come into memory as they are read."""
    voxels = volume.voxels
    return voxels.size * voxels.itemsize if isinstance(voxels, np.memmap) else 0


def _spacing_k(grid: Grid) -> float:
    return float(np.linalg.norm(grid.affine[:3, 2]))


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
