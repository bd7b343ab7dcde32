"""Segment a scan in one pass or in two: an organ at low resolution, then its box at full.

The coarse pass labels the whole scan on the coarse grid; the largest component of the organ with
its parts is the organ. Its box, widened by the margin, is cut out of the *network's* grid of the
whole scan, so every voxel in it is what the single pass would have seen, and its logits go back to
the scan's own voxels by the same two affines. What lies outside is background.

A coarse pass that finds no organ proves nothing: the fine pass then looks at the whole scan, and
the result says so. A mask that reaches a face of its box was cut off there: it is flagged.

C classes, I J K voxels; a prime (I' J' K') is the network's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imaging.resample import resampled_grid
from imaging.volume import Grid, Shape, Volume
from models import box, pace, reference
from models.blend import Counter, Network, Progress, own_windows
from models.box import Box
from models.bundle import (
    BundleError,
    Cascade,
    Manifest,
    coarse_manifest,
    volume_input,
)
from models.features import FeatureMeter
from models.flips import Axis, with_flips
from models.ood import OutOfDistribution
from models.postprocess import keep_largest
from models.predict import Clock, Segmentation, fill, finish, require_segmenter
from models.preflight import Preflight
from models.preprocess import preparation
from models.session import OnnxSession
from models.tiling import Windows, window_starts
from models.uncertainty import EntropyMeter, Judgement, Uncertainty, judged

Float32Array = NDArray[np.float32]
Labels = NDArray[np.uint8]
Fallback = Literal["organ_not_found"]


@dataclass(frozen=True, slots=True)
class Passes:
    """What the two passes of a cascade did."""

    organ: str
    coarse_voxels: Shape
    """Of the grid that the coarse pass labelled."""
    organ_ml: float
    """Of what the coarse pass took for the organ."""
    box_voxels: Shape
    """Of the part of the network's grid that the fine pass looked at."""
    num_windows: dict[str, int]
    """`coarse` and `fine`; flips count."""
    fallback: Fallback | None
    """Why the fine pass looked at the whole scan; None where it did not."""
    is_cut: bool
    """Whether a label reaches a face of the box behind which the scan goes on."""


@dataclass(frozen=True, slots=True)
class Case:
    """A segmented scan with how sure the network was, and how it was looked at."""

    segmentation: Segmentation
    uncertainty: Uncertainty
    quality: Judgement
    cascade: Passes | None
    """None for a model that looks at a scan in one pass."""
    entropy_map: NDArray[np.uint8] | None
    """(I, J, K) on the volume's grid, 255 where nothing is known, 0 outside of a cascade's box;
    None unless asked for."""
    features: Float32Array | None
    """Mean of what the network's encoder made of the windows, of unit length (E,); None for a
    cascade, a network that does not tell, and a scan without a body."""
    ood: OutOfDistribution
    """Its distance from the training scans, or why there is none."""


@dataclass(frozen=True, slots=True)
class _Found:
    """The organ as the coarse pass saw it."""

    coarse_voxels: Shape
    organ_ml: float
    box: Box | None
    """On the fine network's grid; None where there is no organ."""


def segment_case(
    session: OnnxSession,
    volume: Volume,
    *,
    coarse: OnnxSession | None = None,
    flips: Sequence[Axis] = (),
    wants_map: bool = False,
    plan: Preflight | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Case:
    """Label every voxel of a volume as the bundle says, and tell how sure the network was.

    A bundle without a cascade gives the mask of `models.predict.segment`; so does one with a
    cascade inside of its box, up to windows that lie otherwise.

    Args:
        session: An open segmenter.
        volume: The scan.
        coarse: The open coarse network, of a cascade of two.
        flips: Axes of the fine pass's mirror images (`models.flips`); 2, 4 or 8 times the work.
        wants_map: Keep a map of the entropy.
        plan: How to do it, from `models.preflight.plan` with the same flips and coarse network.
        progress: Told after every batch; what is left to do shrinks when the organ is found.
        should_stop: Asked before every batch, in both passes.

    Raises:
        BundleError: `wrong_model_kind`, or what `OnnxSession.run` raises.
        Stopped: `should_stop` turned true.
    """
    manifest = session.manifest
    require_segmenter(manifest)
    spec, patch = volume_input(manifest)
    clock = Clock()
    num_views = 2 ** len(flips)
    grid = resampled_grid(volume.grid, spec.spacing_mm)
    windows = plan.windows if plan is not None else own_windows(session, grid.shape)
    part, found, num_coarse = box.whole(grid.shape), None, 0
    if manifest.cascade is not None:
        finder = _finder(session, coarse)
        later = num_views * len(window_starts(grid.shape, windows.size, windows.overlap))
        with clock.stage("coarse"):
            found, num_coarse = _look(
                finder,
                volume,
                manifest.cascade,
                grid=grid,
                at_least=patch,
                counter=Counter(_with_more(progress, later=later), should_stop),
                plan=plan.coarse if plan is not None else None,
            )
        if plan is not None and plan.coarse is not None and coarse is not None:
            size = plan.coarse.windows.size
            pace.learn(coarse, num_coarse * math.prod(size), clock.spent("coarse"))
        part = found.box or part
        windows = _no_larger(own_windows(session, part.shape), windows)

    counter = Counter(_with_more(progress, before=num_coarse, times=num_views), should_stop)
    with clock.stage("preprocess"):
        source = preparation(volume, spec, part)
    features = None
    if session.has_features and manifest.cascade is None:
        features = FeatureMeter(session, source.background)
    looking = with_flips(session, flips, upright=features)
    seen = box.centres_within(part, grid, volume.grid)
    target = box.grid_of(volume.grid, seen)
    labels = np.zeros(volume.shape, dtype=np.uint8)
    meter = EntropyMeter(manifest.labels, source.grid.shape if wants_map else None)
    fill(
        looking,
        source,
        target,
        labels[seen.slices],
        counter=counter,
        clock=clock,
        windows=windows,
        num_blocks=plan.num_blocks if plan is not None else 1,
        watch=meter.add,
    )
    num_fine = num_views * counter.total
    if plan is not None:
        pace.learn(session, num_fine * math.prod(windows.size), clock.spent("infer"))
    entropy_map = None
    if wants_map:
        with clock.stage("uncertainty"):
            entropy_map = np.zeros(volume.shape, dtype=np.uint8)
            entropy_map[seen.slices] = meter.map_on(source.grid, target)
    is_cut = box.touches(labels[seen.slices], seen, volume.shape)
    segmentation = finish(
        manifest, volume, labels, num_windows=num_coarse + num_fine, clock=clock, plan=plan
    )
    passes = None
    if found is not None:
        assert manifest.cascade is not None
        passes = Passes(
            organ=manifest.cascade.organ,
            coarse_voxels=found.coarse_voxels,
            organ_ml=found.organ_ml,
            box_voxels=part.shape,
            num_windows={"coarse": num_coarse, "fine": num_fine},
            fallback="organ_not_found" if found.box is None else None,
            is_cut=is_cut,
        )
    uncertainty = meter.result()
    vector = features.vector() if features is not None else None
    return Case(
        segmentation,
        uncertainty,
        judged(uncertainty, manifest.quality, _concerns(manifest, segmentation, passes)),
        passes,
        entropy_map,
        vector,
        reference.judged(vector, manifest, session.reference),
    )


def box_of_organ(
    labels: Labels, coarse_grid: Grid, cascade: Cascade, names: Sequence[str], *, fine_grid: Grid
) -> tuple[Box | None, float]:
    """Where an organ lies on the fine grid, margin included, and its volume in ml.

    Args:
        labels: The coarse pass's, (I, J, K).
        coarse_grid: Their grid.
        cascade: Organ, parts, margin, and what is too small to be the organ.
        names: Of the coarse network's labels.
        fine_grid: Of the network that makes the mask, over the whole scan.

    Returns:
        No box where the organ's largest component is absent or too small.
    """
    organ = names.index(cascade.organ) + 1
    parts = [names.index(part) + 1 for part in cascade.parts]
    others = ~np.isin(labels, (organ, *parts))
    kept = keep_largest(labels, {organ: parts})
    kept[others] = 0
    if not (kept == organ).any():  # a part alone (a lone tumour) is no organ
        return None, 0.0
    voxel_ml = abs(float(np.linalg.det(coarse_grid.affine[:3, :3]))) / 1000
    organ_ml = int(np.count_nonzero(kept)) * voxel_ml
    bounds = box.around(kept > 0)
    if bounds is None or organ_ml < cascade.min_organ_ml:
        return None, organ_ml
    return box.carried(bounds, coarse_grid, fine_grid, cascade.margin_mm), organ_ml


@dataclass(frozen=True, slots=True)
class _AtCoarseSpacing:
    """The model itself, told that its input is coarser."""

    network: Network
    manifest: Manifest

    def run(self, batch: Float32Array, *, release_memory: bool = False) -> Float32Array:
        return self.network.run(batch, release_memory=release_memory)


def _finder(session: Network, coarse: Network | None) -> Network:
    """The network of the coarse pass: another one, or the model itself."""
    cascade = session.manifest.cascade
    assert cascade is not None
    if (cascade.coarse is None) != (coarse is None):
        raise BundleError(
            "wrong_model_kind", "the cascade and its coarse network do not go together"
        )
    return coarse or _AtCoarseSpacing(session, coarse_manifest(session.manifest))


def _look(
    network: Network,
    volume: Volume,
    cascade: Cascade,
    *,
    grid: Grid,
    at_least: Shape,
    counter: Counter,
    plan: Preflight | None,
) -> tuple[_Found, int]:
    """The coarse pass; the organ's box is at least a window large, since a window is run anyway."""
    spec, _ = volume_input(network.manifest)
    source = preparation(volume, spec)
    labels = np.zeros(source.grid.shape, dtype=np.uint8)
    fill(
        network,
        source,
        source.grid,
        labels,
        counter=counter,
        clock=Clock(),
        windows=plan.windows if plan is not None else None,
        num_blocks=plan.num_blocks if plan is not None else 1,
    )
    found, organ_ml = box_of_organ(
        labels, source.grid, cascade, network.manifest.labels, fine_grid=grid
    )
    if found is not None:
        found = box.at_least(found, at_least, grid.shape)
    return _Found(source.grid.shape, organ_ml, found), counter.total


def _no_larger(wanted: Windows, planned: Windows) -> Windows:
    """The windows that suit a box, unless they take more memory than those of the whole scan."""
    if math.prod(wanted.size) > math.prod(planned.size):
        return planned
    return replace(wanted, batch=min(wanted.batch, planned.batch))


def _concerns(manifest: Manifest, segmentation: Segmentation, passes: Passes | None) -> list[str]:
    """What speaks for a look at a cascade's result."""
    if passes is None or passes.fallback is not None:
        return []
    concerns = ["box_reaches_edge"] if passes.is_cut else []
    if segmentation.voxels.get(passes.organ) == 0:
        concerns.append("stages_disagree")
    return concerns


def _with_more(
    progress: Progress | None, *, before: int = 0, later: int = 0, times: int = 1
) -> Progress | None:
    """Progress of one pass, each of its windows run so many times, as that of both."""
    if progress is None:
        return None
    return lambda done, total: progress(before + times * done, before + times * total + later)
