"""Run a model on a whole volume: a mask on the volume's own grid, or one embedding.

Finished planes of logits are brought to the volume's grid and reduced to uint8 as soon as the
windows have passed them (`models.blend`); logits are never held for the whole volume.

B batch, E embedding, I J K voxels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from imaging.volume import Grid, Shape, Volume
from models import pace, reference
from models.blend import (
    Counter,
    Network,
    PlaneResampler,
    Progress,
    Stopped,
    batch_size,
    blended_slabs,
    blocks,
    chunks,
    columns_of,
    own_windows,
    shape_of,
    window,
)
from models.bundle import BundleError, Manifest, volume_input
from models.ood import OutOfDistribution
from models.postprocess import Cleaned, Lesions, clean, lesions
from models.preflight import Preflight
from models.preprocess import preparation, prepare
from models.rolling import Layout, Source
from models.session import OnnxSession
from models.tiling import Windows, pad, window_starts

__all__ = ["Embedding", "Progress", "Segmentation", "Stopped", "embed", "segment"]

Float32Array = NDArray[np.float32]
Watch = Callable[[Float32Array, int, int], None]
"""Called with logits (C, I', columns, planes), their first column along J' and plane along K'."""


class WindowWatch(Protocol):
    """Shown the feature maps of an embedding's windows (`models.regions`)."""

    def begin(self, grid: Grid, patch: Shape) -> None:
        """The network's grid, and the windows' extent."""

    def wants(self, start: Shape, patch: Shape) -> bool:
        """Whether a window without body is to be run too; it counts nothing in the embedding."""

    def add(self, starts: list[Shape], patch: Shape, features: Float32Array) -> None:
        """First voxels of windows, and their feature maps (B, E, i, j, k)."""


FOREGROUND_ABOVE = 0.05
"""A voxel this far above air (in network input) counts as body; noise in air stays below it."""


@dataclass(frozen=True, slots=True)
class Segmentation:
    """A mask with what it amounts to."""

    labels: NDArray[np.uint8]
    """(I, J, K) on the volume's grid: 0 background, then 1 to n in the order of the manifest."""
    voxels: dict[str, int]
    volumes_ml: dict[str, float]
    num_windows: int
    timings_s: dict[str, float]
    """Stages `preprocess`, `infer`, `resample`, `postprocess` if asked for, and `total`."""
    lesions: dict[str, Lesions] = field(default_factory=dict)
    """Of each label that the manifest's `postprocess` wants counted."""
    removed_voxels: dict[str, int] = field(default_factory=dict)
    filled_voxels: dict[str, int] = field(default_factory=dict)
    """What the clean-up took from and gave to each label; empty where there was none."""
    preflight: Preflight | None = None
    """The plan that it followed, if it had one."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """A scan as one point on the unit sphere."""

    vector: Float32Array
    """(E,), unit length."""
    num_windows: int
    """Windows with a body in them, over which the mean was taken; 1 for a 2D image."""
    timings_s: dict[str, float]
    """Stages `preprocess`, `infer`, and `total`."""
    ood: OutOfDistribution
    """Its distance from the training scans, or why there is none."""


def segment(
    session: OnnxSession,
    volume: Volume,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    windows: Windows | None = None,
    num_blocks: int = 1,
    plan: Preflight | None = None,
) -> Segmentation:
    """Label every voxel of a volume.

    Equals MONAI's Gaussian sliding window on the prepared volume, linear resampling of the blended
    logits to the volume's grid, argmax, and then what the manifest's `postprocess` asks for.
    Windows that hold nothing but air are all the same to the network, so one run serves them all.

    Args:
        session: An open segmenter.
        volume: The scan.
        progress: Told after every batch.
        should_stop: Asked before every batch.
        windows: Their size, overlap and batch; the model's own if None.
        num_blocks: Parts in which columns are taken, one after the other: less memory, more time,
            the same labels.
        plan: Windows and blocks instead of these, chosen by `models.preflight` so that memory
            suffices; comes back in the result.

    Raises:
        BundleError: `wrong_model_kind`, or what `OnnxSession.run` raises.
        Stopped: `should_stop` turned true.
    """
    require_segmenter(session.manifest)
    spec, _ = volume_input(session.manifest)
    clock = Clock()
    with clock.stage("preprocess"):
        source = preparation(volume, spec)
    labels = np.zeros(volume.shape, dtype=np.uint8)
    if plan is not None:
        windows, num_blocks = plan.windows, plan.num_blocks
    windows = windows or own_windows(session, source.grid.shape)
    counter = Counter(progress, should_stop)
    fill(
        session,
        source,
        volume.grid,
        labels,
        counter=counter,
        clock=clock,
        windows=windows,
        num_blocks=num_blocks,
    )
    if plan is not None:
        pace.learn(session, counter.total * math.prod(windows.size), clock.spent("infer"))
    return finish(
        session.manifest, volume, labels, num_windows=counter.total, clock=clock, plan=plan
    )


def fill(
    session: Network,
    source: Source,
    target: Grid,
    labels: NDArray[np.uint8],
    *,
    counter: Counter,
    clock: Clock,
    windows: Windows | None = None,
    num_blocks: int = 1,
    watch: Watch | None = None,
) -> None:
    """Label a grid by the sliding windows of a volume as network input.

    Args:
        session: The network.
        source: Its input.
        target: The grid to label; its axes are parallel to the input's.
        labels: (I, J, K) on `target`, written; may be a view.
        counter: Of the windows; its total is set.
        clock: Takes the stages `infer` and `resample`, and `uncertainty` where `watch` is given.
        windows: As in `segment`.
        num_blocks: As in `segment`.
        watch: Shown all blended logits, each voxel once.
    """
    windows = windows or own_windows(session, source.grid.shape)
    parts = blocks(source.grid, target, num_blocks)
    layouts = [Layout.of(source.grid.shape, windows, part.source) for part in parts]
    counter.total = sum(layout.num_windows for layout in layouts)
    num_watched = 0  # columns along J'; blocks overlap there
    for part in parts:
        resampler = PlaneResampler(
            columns_of(source.grid, part.source),
            columns_of(target, part.target),
            labels[:, part.target],
        )
        slabs = blended_slabs(
            session,
            source,
            counter,
            windows=windows,
            columns=part.source,
            release_memory=part is parts[-1],
        )
        while True:
            with clock.stage("infer"):
                slab = next(slabs, None)
            if slab is None:
                break
            with clock.stage("resample"):
                resampler.add(slab)
            if watch is not None:
                with clock.stage("uncertainty"):
                    begin = max(num_watched, part.source.start)  # a first block may begin later
                    fresh = slab.logits[:, :, begin - part.source.start :]
                    watch(fresh, begin, slab.first)
        num_watched = part.source.stop


def finish(
    manifest: Manifest,
    volume: Volume,
    labels: NDArray[np.uint8],
    *,
    num_windows: int,
    clock: Clock,
    plan: Preflight | None = None,
) -> Segmentation:
    """What a labelled grid amounts to, after the clean-up that the manifest asks for."""
    names, asked = manifest.labels, manifest.postprocess
    cleaned = Cleaned(labels, {}, {})
    if asked.changes_masks:
        with clock.stage("postprocess"):
            cleaned = clean(labels, names, asked)
    labels = cleaned.labels
    counted: dict[str, Lesions] = {}
    for name in asked.lesions:
        with clock.stage("postprocess"):
            value = names.index(name) + 1
            counted[name] = lesions(labels, value, volume.affine, asked.connectivity)
    voxels = {name: int(np.count_nonzero(labels == c)) for c, name in enumerate(names, start=1)}
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    volumes_ml = {name: count * voxel_ml for name, count in voxels.items()}
    return Segmentation(
        labels,
        voxels,
        volumes_ml,
        num_windows,
        clock.timings_s(),
        lesions=counted,
        removed_voxels=cleaned.removed_voxels,
        filled_voxels=cleaned.filled_voxels,
        preflight=plan,
    )


def embed(
    session: OnnxSession,
    volume: Volume,
    *,
    overlap: float = 0.0,
    plan: Preflight | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    watch: WindowWatch | None = None,
) -> Embedding:
    """One unit vector for a volume.

        vector = normalise(sum over windows of body share * embedding(window))

    Windows without body are not run. A volume without any body counts every window alike.

    Args:
        session: An open encoder.
        volume: The scan.
        overlap: Of the windows.
        plan: Overlap and batch instead, from `models.preflight.plan_embedding`.
        progress: Told after every batch.
        should_stop: Asked before every batch.
        watch: Shown the feature map of every window that is run.

    Raises:
        BundleError: `wrong_model_kind`, `degenerate_embedding` (a zero vector), or what
            `OnnxSession.run` raises.
        Stopped: `should_stop` turned true.
    """
    require_kind(session.manifest, "encoder")
    spec, patch = volume_input(session.manifest)
    clock = Clock()
    at_once = batch_size(patch)
    if plan is not None:
        overlap, at_once = plan.windows.overlap, plan.windows.batch
    with clock.stage("preprocess"):
        prepared = prepare(volume, spec)
        padded = pad(prepared.array, patch, prepared.background)
        starts = window_starts(shape_of(padded), patch, overlap)
        threshold = prepared.background + FOREGROUND_ABOVE
        shares = [float(np.mean(window(padded, start, patch) > threshold)) for start in starts]
        if not any(shares):
            shares = [1.0] * len(starts)
        num_bodies = sum(share > 0 for share in shares)
        if watch is not None:
            watch.begin(prepared.grid, patch)
        weighted = [
            (start, share)
            for start, share in zip(starts, shares, strict=True)
            if share > 0 or (watch is not None and watch.wants(start, patch))
        ]
    counter = Counter(progress, should_stop, len(weighted))
    may_keep = session.may_keep_memory(min(at_once, len(weighted)) * math.prod(patch))
    total: NDArray[np.float64] = np.zeros(1)
    with clock.stage("infer"):
        for chunk in chunks(weighted, at_once):
            counter.before_batch()
            batch = np.stack([window(padded, start, patch)[None] for start, _ in chunk])
            ends = counter.done + len(chunk) == counter.total and not may_keep
            if watch is None:
                embeddings = session.run(batch, release_memory=ends)  # (B, E)
            else:
                embeddings, maps = session.run_with_map(batch, release_memory=ends)
                watch.add([start for start, _ in chunk], patch, maps)
            weights = np.array([weight for _, weight in chunk])
            total = total + weights @ embeddings.astype(np.float64)  # (E,)
            counter.after_batch(len(chunk))
    pace.learn(session, counter.total * math.prod(patch), clock.spent("infer"))
    vector, distance = on_the_sphere(total, session)
    return Embedding(vector, num_bodies, clock.timings_s(), distance)


def on_the_sphere(
    total: NDArray[np.floating], session: OnnxSession
) -> tuple[Float32Array, OutOfDistribution]:
    """A vector (E,) at unit length, and how far that is from the training scans.

    Raises:
        BundleError: `degenerate_embedding`: it is zero.
    """
    length = float(np.linalg.norm(total))
    if length == 0.0:
        raise BundleError("degenerate_embedding", "the encoder gives a zero vector for this scan")
    vector = (total / length).astype(np.float32)
    return vector, reference.judged(vector, session.manifest, session.reference)


class Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is done inside; a stage may come again."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - begin

    def spent(self, name: str) -> float:
        """Seconds in a stage so far."""
        return self._spent.get(name, 0.0)

    def timings_s(self) -> dict[str, float]:
        """Each stage, and `total` since the clock was made."""
        total = time.perf_counter() - self._started
        return {name: round(spent, 3) for name, spent in (*self._spent.items(), ("total", total))}


def require_kind(manifest: Manifest, kind: str) -> None:
    """Refuse a model of another kind.

    Raises:
        BundleError: `wrong_model_kind`.
    """
    if manifest.kind != kind:
        raise BundleError("wrong_model_kind", f"the model is of kind {manifest.kind}, not {kind}")


def require_segmenter(manifest: Manifest) -> None:
    """A scan here is one image, and a mask holds one label a voxel; refuse what needs more.

    Raises:
        BundleError: `wrong_model_kind`.
    """
    require_kind(manifest, "segmenter")
    channels, names = manifest.channels, manifest.labels
    if len(channels) > 1:
        raise BundleError(
            "wrong_model_kind",
            f"the model reads {len(channels)} images of a scan ({', '.join(channels)}), not one",
        )
    if manifest.activation == "sigmoid":
        raise BundleError(
            "wrong_model_kind",
            f"the model's regions ({', '.join(names)}) may overlap; a mask holds one label a voxel",
        )
