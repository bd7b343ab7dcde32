"""How far an embedding lies from those of the training set, and from where on that is far.

The distance is one minus the mean cosine to the k nearest embeddings of *other* scans. The
threshold is a quantile of the training scans' own distances, each measured without itself (leave
one scan out), so no scan is its own neighbour. Of n scans a quantile above 1 - 1/n cannot be known:
then the largest distance stands in, and of scans like these about 1/(n + 1) are flagged.

N scans, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

QUANTILE = 0.95
MAX_NEIGHBOURS = 5
MIN_SCANS = 5
"""Below it there is no threshold worth the name."""

Float64Array = NDArray[np.float64]
Reason = Literal["no_reference", "too_few_scans", "cascade", "nothing_seen"]
"""Why there is no score: the model came without a reference; it was trained on fewer than
`MIN_SCANS` scans; it is a cascade, which looks at a box and not at the scan; no window of the scan
has a body in it, or the network saw nothing in any."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The training set's embeddings, and what is far from them."""

    units: Float64Array
    """(N, E), each of unit length."""
    num_neighbours: int
    threshold: float


@dataclass(frozen=True, slots=True)
class OutOfDistribution:
    """Of one scan: its distance, 0 to 2, and whether it is beyond the threshold."""

    score: float | None
    threshold: float | None
    is_out: bool | None
    n_reference: int
    """Scans of the reference."""
    reason: Reason | None = None
    """Why the others are None; None where they are not."""


def unknown(reason: Reason, n_reference: int = 0) -> OutOfDistribution:
    """Of a scan that has no score."""
    return OutOfDistribution(None, None, None, n_reference, reason)


def reference_of(vectors: NDArray[np.floating], *, quantile: float = QUANTILE) -> Reference:
    """A reference with its threshold, from one embedding for each training scan.

    Args:
        vectors: (N, E), finite, none of them zero.
        quantile: Of the leave-one-scan-out distances, 0 to 1; the next larger observed one.

    Raises:
        ValueError: Fewer than `MIN_SCANS` scans, or a vector that is zero or not finite.
    """
    if vectors.ndim != 2 or len(vectors) < MIN_SCANS:
        raise ValueError(f"a reference needs {MIN_SCANS} scans or more, not {vectors.shape}")
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"a quantile is 0 to 1, not {quantile}")
    units = _units(vectors)
    k = min(MAX_NEIGHBOURS, len(units) - 1)
    cosines = units @ units.T  # (N, N)
    np.fill_diagonal(cosines, -np.inf)
    distances = 1.0 - np.sort(cosines, axis=1)[:, -k:].mean(axis=1)  # (N,)
    return Reference(units, k, float(np.quantile(distances, quantile, method="higher")))


def restored(vectors: NDArray[np.floating], *, num_neighbours: int, threshold: float) -> Reference:
    """A reference whose threshold was found before.

    Raises:
        ValueError: A vector that is zero or not finite, or not as many as neighbours.
    """
    if vectors.ndim != 2 or not 1 <= num_neighbours <= len(vectors):
        raise ValueError(f"{num_neighbours} neighbours of {vectors.shape}")
    return Reference(_units(vectors), num_neighbours, threshold)


def score(vector: NDArray[np.floating], reference: Reference) -> OutOfDistribution:
    """One embedding (E,) against a reference.

    Raises:
        ValueError: It has another size than the reference's, is zero or not finite.
    """
    if vector.shape != reference.units.shape[1:]:
        raise ValueError(f"{vector.shape} does not fit a reference of {reference.units.shape}")
    cosines = reference.units @ _units(vector[None])[0]  # (N,)
    distance = 1.0 - float(np.sort(cosines)[-reference.num_neighbours :].mean())
    return OutOfDistribution(
        distance, reference.threshold, distance > reference.threshold, len(reference.units)
    )


def _units(vectors: NDArray[np.floating]) -> Float64Array:
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.isfinite(wide).all() or not (lengths > 0.0).all():
        raise ValueError("an embedding is finite and not zero")
    units: Float64Array = wide / lengths
    return units
