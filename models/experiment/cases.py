"""What one fine-tuning scored on every case of the test split, and the split's value from it.

N cases, L labels, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.recipe import Part

FILE = "cases.json"
"""Of a fine-tuning's folder, and the run's artifact of that name."""

Floats = NDArray[np.float64]
Measure = Literal["dice", "auc"]


class CaseResult(Part):
    """One case: a scan that was segmented, or an example that was classified."""

    case_id: str
    subject: str
    """The patient's pseudonym: cases of one patient are resampled together."""
    values: dict[str, float]
    """Of `dice`: Dice by label, none for a label that the truth lacks. Of `auc`: the score."""
    truth: dict[str, Annotated[int, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Of `auc`: whether a label holds; none where that is not known."""


class CaseResults(Part):
    """All cases of the test split."""

    measure: Measure
    labels: tuple[str, ...]
    cases: tuple[CaseResult, ...]


@dataclass(frozen=True)
class CaseTable:
    """The same as arrays, cases in the order of their ids."""

    measure: Measure
    case_ids: tuple[str, ...]
    subjects: tuple[str, ...]
    values: Floats
    """NaN where a label is not judged, (N, L)."""
    truth: Floats
    """1, 0 or NaN, (N, L); all NaN for `dice`."""

    @classmethod
    def of(cls, results: CaseResults) -> CaseTable:
        """The table of a run's results."""
        cases = sorted(results.cases, key=lambda case: case.case_id)

        def array(rows: list[list[float]]) -> Floats:
            return np.array(rows, dtype=np.float64).reshape(len(cases), len(results.labels))

        return cls(
            results.measure,
            tuple(case.case_id for case in cases),
            tuple(case.subject for case in cases),
            array([[case.values.get(name, math.nan) for name in results.labels] for case in cases]),
            array([[case.truth.get(name, math.nan) for name in results.labels] for case in cases]),
        )

    @cached_property
    def patients(self) -> tuple[tuple[str, ...], NDArray[np.intp]]:
        """Distinct subjects, and for each case the place of its own among them."""
        names, place = np.unique(np.array(self.subjects, dtype=str), return_inverse=True)
        return tuple(str(name) for name in names), place

    def value(self, weights: Floats | None = None) -> Floats:
        """The split's value where case n counts `weights[r, n]` times, (R,).

        Without weights every case counts once, and the value is what the fine-tuning reports:
        the mean over labels of the mean Dice of the cases that have the label, or of the areas
        under the ROC curves. NaN where nothing can be judged.
        """
        if weights is None:
            weights = np.ones((1, len(self.case_ids)))
        if self.measure == "dice":
            by_label = _weighted_means(self.values, weights)
        else:
            pairs = zip(self.values.T, self.truth.T, strict=True)
            by_label = np.stack([weighted_auc(s, t, weights) for s, t in pairs], axis=1)
        return mean_of_known(by_label)

    def case_values(self) -> Floats:
        """Of `dice`: the mean over each case's labels; NaN where it has none, (N,)."""
        return mean_of_known(self.values)


def require_same_cases(tables: Sequence[CaseTable]) -> None:
    """Refuse runs that were judged on different cases.

    Raises:
        ValueError: Some are.
    """
    if len({(table.measure, table.case_ids, table.subjects) for table in tables}) > 1:
        raise ValueError("the runs were judged on different cases; a comparison needs the same")


def weighted_auc(scores: Floats, truth: Floats, weights: Floats) -> Floats:
    """Area under the ROC curve where example n counts `weights[r, n]` times, (R,).

        for each positive p and negative n:
            won += w[p] * w[n] * (1 if score[p] > score[n], 1/2 if equal, else 0)
        won / (sum of w[p] * sum of w[n])

    Args:
        scores: (N,).
        truth: 1, 0, or NaN for an example that is left out, (N,).
        weights: (R, N).

    Returns:
        NaN where a resample has no positive or no negative.
    """
    known = ~np.isnan(truth) & ~np.isnan(scores)
    scores, truth, weights = scores[known], truth[known], weights[:, known]
    if not len(scores):
        return np.full(len(weights), math.nan)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-math.inf) > 0)  # of equal scores
    positive = np.add.reduceat((weights * truth)[:, order], starts, axis=1)
    negative = np.add.reduceat((weights * (1.0 - truth))[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    won = (positive * (below + negative / 2.0)).sum(axis=1)
    return _divided(won, positive.sum(axis=1) * negative.sum(axis=1))


def mean_of_known(values: Floats) -> Floats:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    return _divided(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1))


def _weighted_means(values: Floats, weights: Floats) -> Floats:
    """Of each label over the cases that have it, (R, L)."""
    known = ~np.isnan(values)
    return _divided(weights @ np.where(known, values, 0.0), weights @ known.astype(np.float64))


def _divided(top: Floats, bottom: Floats | NDArray[np.int_]) -> Floats:
    is_defined = bottom > 0
    return np.where(is_defined, top / np.where(is_defined, bottom, 1.0), math.nan)
