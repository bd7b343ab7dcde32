"""How far an embedding lies from those of the training set, and from where on that is far.

The distance is Mahalanobis' to the training scans, each embedding of unit length x:

    distance(x) = sqrt((x - mean) . inverse(covariance) . (x - mean))

with the covariance of Ledoit and Wolf (J. Multivariate Analysis 88, 2004), since there are fewer
scans than numbers in an embedding. It was chosen by measurement (docs/experiments.md): a cosine is
blind in the directions in which embeddings hardly vary, and those tell an inverted scan.

References of before have the method `cosine`, one minus the mean cosine to the k nearest embeddings
of *other* scans; they are read, and judged by it, as they were calibrated.

The threshold is a quantile of the training scans' own distances, each measured without itself
(leave one scan out), so no scan is its own neighbour. Of n scans a quantile above 1 - 1/n cannot be
known: then the largest distance stands in, and of scans like these about 1/(n + 1) are flagged.

N scans, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

QUANTILE = 0.95
MIN_SCANS = 5
"""Below it there is no threshold worth the name."""

FLOOR = 1e-12
"""Least variance along any direction: scans that are all the same have none."""

Float64Array = NDArray[np.float64]
Method = Literal["mahalanobis", "cosine"]
Reason = Literal["no_reference", "too_few_scans", "cascade", "nothing_seen"]
"""Why there is no score: the model came without a reference; it was trained on fewer than
`MIN_SCANS` scans; it is a cascade, which looks at a box and not at the scan; no window of the scan
has a body in it, or the network saw nothing in any."""


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """Where the training scans lie, and how they spread."""

    mean: Float64Array
    """(E,)."""
    precision: Float64Array
    """(E, E), the inverse of the covariance."""

    @classmethod
    def of(cls, units: Float64Array) -> Gaussian:
        """Of unit vectors (N, E)."""
        precision = np.linalg.inv(ledoit_wolf(units)).astype(np.float64)
        return cls(units.mean(axis=0), precision)

    def distance(self, unit: Float64Array) -> float:
        """Mahalanobis' of one vector (E,)."""
        away = unit - self.mean
        return float(np.sqrt(max(float(away @ self.precision @ away), 0.0)))


@dataclass(frozen=True, slots=True)
class Reference:
    """The training set's embeddings, and what is far from them."""

    units: Float64Array
    """(N, E), each of unit length."""
    num_neighbours: int
    """Of `cosine`; 0 where the distance is to the mean."""
    threshold: float
    gaussian: Gaussian | None = None
    """Of `mahalanobis`; None for `cosine`."""

    @property
    def method(self) -> Method:
        """How distances are measured."""
        return "cosine" if self.gaussian is None else "mahalanobis"


@dataclass(frozen=True, slots=True)
class OutOfDistribution:
    """Of one scan: its distance, and whether it is beyond the threshold."""

    score: float | None
    threshold: float | None
    is_out: bool | None
    n_reference: int
    """Scans of the reference."""
    reason: Reason | None = None
    """Why the others are None; None where they are not."""
    method: Method | None = None


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
    distances = [
        Gaussian.of(np.delete(units, n, axis=0)).distance(unit) for n, unit in enumerate(units)
    ]
    threshold = float(np.quantile(distances, quantile, method="higher"))
    return Reference(units, 0, threshold, Gaussian.of(units))


def restored(
    vectors: NDArray[np.floating],
    *,
    num_neighbours: int,
    threshold: float,
    method: Method = "cosine",
) -> Reference:
    """A reference whose threshold was found before.

    Raises:
        ValueError: A vector that is zero or not finite, or not as many as neighbours.
    """
    if method == "mahalanobis":
        if vectors.ndim != 2 or len(vectors) < MIN_SCANS:
            raise ValueError(f"a mean and a covariance of {vectors.shape}")
        units = _units(vectors)
        return Reference(units, 0, threshold, Gaussian.of(units))
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
    (unit,) = _units(vector[None])
    if reference.gaussian is not None:
        distance = reference.gaussian.distance(unit)
    else:
        cosines = reference.units @ unit  # (N,)
        distance = 1.0 - float(np.sort(cosines)[-reference.num_neighbours :].mean())
    return OutOfDistribution(
        distance,
        reference.threshold,
        distance > reference.threshold,
        len(reference.units),
        method=reference.method,
    )


def ledoit_wolf(vectors: Float64Array) -> Float64Array:
    """Covariance of vectors, shrunk towards a multiple of the identity (Ledoit and Wolf, 2004).

        S = mean of c c^T over centred vectors c;  m = trace(S) / E
        share = min(sum ||c c^T - S||^2 / N^2, ||S - m I||^2) / ||S - m I||^2
        covariance = share m I + (1 - share) S, and `FLOOR` on its diagonal

    Args:
        vectors: (N, E).

    Returns:
        (E, E), positive definite.
    """
    centred = vectors - vectors.mean(axis=0)
    num, dims = centred.shape
    sample = centred.T @ centred / num
    mean = float(np.trace(sample)) / dims
    spread = float(((sample - mean * np.eye(dims)) ** 2).sum())
    # The sum of ||c c^T - S||^2 is that of ||c||^4 less N ||S||^2.
    error = float((centred**2).sum(axis=1) @ (centred**2).sum(axis=1)) / num
    error = max(error - float((sample**2).sum()), 0.0) / num
    share = min(error, spread) / spread if spread > 0.0 else 1.0
    covariance: Float64Array = (1.0 - share) * sample + (share * mean + FLOOR) * np.eye(dims)
    return covariance


def _units(vectors: NDArray[np.floating]) -> Float64Array:
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.isfinite(wide).all() or not (lengths > 0.0).all():
        raise ValueError("an embedding is finite and not zero")
    units: Float64Array = wide / lengths
    return units
