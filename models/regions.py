"""One embedding for a scan and one for each of its regions, from the same runs of the encoder.

A region's embedding is masked average pooling of the encoder's feature map over the region:

    share = the region's share of each voxel of the network's grid, linear       (I', J', K')
    for each window w (those of `models.predict.embed`) and each cell c of its feature map:
        coverage[w, c] = mean of share over the STRIDE^3 voxels of the cell
    vector = normalise(sum over w, c of coverage[w, c] * features[w][:, c])

A window's padding is covered by nothing. A cell that lies in two windows counts in both, as it does
in the embedding of the whole scan. A region smaller than one cell would be told by what lies around
it: it gets no vector, and the reason.

B batch, E embedding, R regions, W windows, I J K voxels, i j k cells; a prime (I' J' K') is the
network's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imaging.resample import resample
from imaging.volume import Grid, Shape, Volume
from models.blend import Progress, shape_of, window
from models.bundle import FEATURE_STRIDE, BundleError, feature_map_of
from models.predict import Embedding, embed
from models.preflight import Preflight
from models.session import OnnxSession
from models.tiling import pad

Float32Array = NDArray[np.float32]
Reason = Literal["absent", "too_small", "nothing_seen"]
"""Why a region has no vector: no voxel has its label; it covers less than `MIN_CELLS`; the encoder
gives zeros wherever it lies."""
MIN_CELLS = 1.0
_CELL = FEATURE_STRIDE**3


@dataclass(frozen=True, slots=True)
class RegionEmbedding:
    """A region as one point on the unit sphere, or why it is none."""

    region: str
    vector: Float32Array | None
    """(E,), unit length; None where `reason` says why."""
    num_voxels: int
    """Of the scan, with its label."""
    num_cells: float
    """Its volume in cells of the feature map."""
    reason: Reason | None


@dataclass(slots=True)
class _Region:
    """What is known of a region while windows go through."""

    region: str
    num_voxels: int
    num_cells: float
    share: Float32Array
    """(I', J', K'), padded as the scan is."""
    total: NDArray[np.float64]
    """Sum over cells of coverage times features, (E,)."""


def require_feature_map(session: OnnxSession) -> None:
    """Refuse an encoder that gives nothing but the pooled vector.

    Raises:
        BundleError: `no_feature_map`, or `wrong_model_kind` for what is no encoder.
    """
    if session.manifest.kind != "encoder":
        kind = session.manifest.kind
        raise BundleError("wrong_model_kind", f"the model is of kind {kind}, not encoder")
    if feature_map_of(session.manifest) is None:
        raise BundleError(
            "no_feature_map",
            "the encoder was exported without its feature map; export it again for regions",
        )


def embed_regions(
    session: OnnxSession,
    volume: Volume,
    labels: NDArray[np.integer],
    values: Mapping[str, int],
    *,
    plan: Preflight | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[Embedding, tuple[RegionEmbedding, ...]]:
    """The embedding of `models.predict.embed`, and one for each region; see the module.

    Args:
        session: An open encoder with a feature map.
        volume: The scan.
        labels: (I, J, K) on the scan's grid.
        values: Name of each region and its value in `labels`.
        plan: As of `embed`.
        progress: As of `embed`.
        should_stop: As of `embed`.

    Raises:
        BundleError: `no_feature_map`, or what `embed` raises.
        ValueError: `labels` are not on the scan's grid.
        Stopped: `should_stop` turned true.
    """
    require_feature_map(session)
    if labels.shape != volume.shape:
        raise ValueError(f"labels are {labels.shape}, the scan {volume.shape}")
    pooling = _Pooling(volume.grid, labels, values)
    found = embed(
        session, volume, plan=plan, progress=progress, should_stop=should_stop, watch=pooling
    )
    return found, pooling.result()


class _Pooling:
    """Watches an embedding's windows; see `models.predict.WindowWatch`."""

    def __init__(self, grid: Grid, labels: NDArray[np.integer], values: Mapping[str, int]) -> None:
        self._grid, self._labels, self._values = grid, labels, values
        self._regions: list[_Region] = []

    def begin(self, grid: Grid, patch: Shape) -> None:
        """Lay the regions on the network's grid."""
        for region, value in self._values.items():
            mask = self._labels == value
            num_voxels = int(np.count_nonzero(mask))
            share = np.zeros(grid.shape, np.float32)
            if num_voxels:
                share = np.asarray(resample(mask, self._grid, grid, order=1), np.float32)
            num_cells = float(share.sum(dtype=np.float64)) / _CELL
            self._regions.append(
                _Region(region, num_voxels, num_cells, pad(share, patch, 0.0), np.zeros(1))
            )

    def wants(self, start: Shape, patch: Shape) -> bool:
        """Whether a region lies in a window."""
        return any(bool(window(one.share, start, patch).any()) for one in self._regions)

    def add(self, starts: list[Shape], patch: Shape, features: Float32Array) -> None:
        """Add windows' feature maps (B, E, i, j, k) where regions cover them."""
        cells = (patch[0] // FEATURE_STRIDE, patch[1] // FEATURE_STRIDE, patch[2] // FEATURE_STRIDE)
        if features.shape[2:] != cells:
            raise BundleError(
                "bundle_inconsistent", f"the feature map is {features.shape[2:]}, not {cells}"
            )
        for one in self._regions:
            for start, of_window in zip(starts, features, strict=True):
                coverage = cell_means(window(one.share, start, patch))
                if coverage.any():
                    sums = np.tensordot(of_window.astype(np.float64), coverage, axes=3)  # (E,)
                    one.total = one.total + sums

    def result(self) -> tuple[RegionEmbedding, ...]:
        """Every region, in the order in which they were named."""
        return tuple(_embedding_of(one) for one in self._regions)


def cell_means(share: Float32Array) -> NDArray[np.float64]:
    """Means over the cells of a window, (I', J', K') to (i, j, k)."""
    i, j, k = (size // FEATURE_STRIDE for size in shape_of(share))
    split = share.reshape(i, FEATURE_STRIDE, j, FEATURE_STRIDE, k, FEATURE_STRIDE)
    means: NDArray[np.float64] = split.mean(axis=(1, 3, 5), dtype=np.float64)
    return means


def _embedding_of(one: _Region) -> RegionEmbedding:
    told = RegionEmbedding(one.region, None, one.num_voxels, round(one.num_cells, 3), None)
    if one.num_voxels == 0:
        return replace(told, reason="absent")
    if one.num_cells < MIN_CELLS:
        return replace(told, reason="too_small")
    length = float(np.linalg.norm(one.total))
    if length == 0.0:
        return replace(told, reason="nothing_seen")
    return replace(told, vector=(one.total / length).astype(np.float32))
