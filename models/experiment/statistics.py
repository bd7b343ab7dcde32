"""How sure an experiment is: intervals over patients and seeds, paired tests, Holm's correction.

Two things make a result uncertain: which patients are in the test split, and what a training's
seed decided (weights, batches, which patients were labelled). A test over patients alone would
call two seeds of the same method different, since one network is a little better on all patients.

`scipy.stats` takes most of a second to load, and the API, which loads this module at its start,
reports on an experiment now and then: so the functions that need it load it.

S seeds, R resamples, P patients, N cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.experiment.cases import CaseTable, Floats, mean_of_known, require_same_cases

NUM_RESAMPLES = 4000
NUM_PERMUTATIONS = 1000
CONFIDENCE = 0.95
BLOCK_VALUES = 2_000_000
"""Weights that are held at once."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and what it may as well have been."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Whether one method differs from another."""

    p_patients: float
    """Over the patients of the test split, these seeds taken as given."""
    p_seeds: float | None
    """Over seeds, this test split taken as given; None with a single seed."""

    @property
    def p(self) -> float:
        """The larger: a difference must hold over patients and over seeds.

        An intersection-union test: each of the two null hypotheses is rejected at the level, so
        the whole keeps it (Berger, 1982). With a single seed it is of patients alone, and tells of
        these trainings rather than of the methods: no significance follows from it.
        """
        return self.p_patients if self.p_seeds is None else max(self.p_patients, self.p_seeds)


def interval(runs: Sequence[CaseTable], *, random: int = 0) -> Interval:
    """Mean over seeds of the test split's value, with its 95 % interval.

    Patients (with all their cases) are drawn with replacement, the same for every seed; seeds are
    too few to be drawn from, so their part is Student's t:

        for each resample r:
            mean over s of value(run s, patients of r) + t[S - 1] * sd over s of value / sqrt(S)
        the 2.5 % and 97.5 % quantiles

    With one seed the interval is over patients alone.

    Args:
        runs: One table a seed, at least one.
        random: Seed of the resampling: the same gives the same interval.
    """
    require_same_cases(runs)
    drawn = _resampled(runs, random)  # (S, R)
    found = np.array([run.value()[0] for run in runs])
    low, high = _quantiles(drawn.mean(axis=0) + _seed_noise(found, random))
    return Interval(float(found.mean()), max(low, 0.0), min(high, 1.0))


def difference(
    runs: Sequence[CaseTable], others: Sequence[CaseTable], *, random: int = 0
) -> Interval:
    """`interval` of how much better `runs` are than `others`, paired by seed and by patient."""
    require_same_cases([*runs, *others])
    both = _resampled([*runs, *others], random)
    drawn = both[: len(runs)] - both[len(runs) :]  # (S, R)
    found = _by_seed(runs, others)
    low, high = _quantiles(drawn.mean(axis=0) + _seed_noise(found, random))
    return Interval(float(found.mean()), low, high)


def paired_test(
    runs: Sequence[CaseTable], others: Sequence[CaseTable], *, random: int = 0
) -> PairedTest:
    """Two-sided tests of `runs` against `others`, paired by seed and by patient.

    Over patients: of Dice, Wilcoxon's signed-rank test of each patient's mean difference; of AUC,
    a permutation test (`permutation_p`). Over seeds: Student's paired t-test.
    """
    require_same_cases([*runs, *others])
    if runs[0].measure == "dice":
        p_patients = _signed_rank_p(_by_patient(runs, others))
    else:
        p_patients = permutation_p(runs, others, random=random)
    return PairedTest(p_patients, _t_test_p(_by_seed(runs, others)))


def permutation_p(
    runs: Sequence[CaseTable], others: Sequence[CaseTable], *, random: int = 0
) -> float:
    """P-value of the difference of values when the two methods' answers are swapped by patient.

        for each permutation: swap the answers of a random half of the patients, in every seed
        (1 + number of differences at least as large) / (1 + number of permutations)

    Scores of two networks have no scale in common, so each run's are replaced by their ranks
    first, which changes no AUC (as Bandos et al., 2005).
    """
    patients, place = runs[0].patients
    swaps = np.random.default_rng(random).random((NUM_PERMUTATIONS, len(patients))) < 0.5
    is_swapped = swaps[:, place]  # (R, N)
    totals = np.zeros(NUM_PERMUTATIONS)
    for run, other in zip(runs, others, strict=True):
        ranks, other_ranks = _ranked(run), _ranked(other)
        for at, swapped in enumerate(is_swapped):
            ours = np.where(swapped[:, None], other_ranks, ranks)
            theirs = np.where(swapped[:, None], ranks, other_ranks)
            totals[at] += _value_of(run, ours) - _value_of(other, theirs)
    found = abs(_by_seed(runs, others).mean())
    as_large = np.abs(totals / len(runs)) >= found - 1e-12
    return float((1 + as_large.sum()) / (1 + NUM_PERMUTATIONS))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being a family (Holm, 1979), in the order given.

    for the i-th smallest of m, from 0: max of what came before and min(1, (m - i) * p)
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = largest
    return corrected


def _resampled(runs: Sequence[CaseTable], random: int) -> Floats:
    """Each run's value where patients are drawn with replacement, the same for all, (runs, R).

    Some resamples at a time, so that memory does not grow with the number of cases.
    """
    patients, place = runs[0].patients
    number = len(patients)
    drawn, share = np.random.default_rng(random), np.full(number, 1.0 / number)
    at_once = max(1, BLOCK_VALUES // len(place))
    values = []
    for first in range(0, NUM_RESAMPLES, at_once):
        counts = drawn.multinomial(number, share, min(at_once, NUM_RESAMPLES - first))
        weights = counts[:, place].astype(np.float64)  # how often each case counts
        values.append(np.stack([run.value(weights) for run in runs]))
    return np.concatenate(values, axis=1)


def _seed_noise(found: Floats, random: int) -> Floats:
    """What another choice of seeds might have added, (R,); 0 with one seed."""
    if len(found) < 2:
        return np.zeros(NUM_RESAMPLES)
    drawn: Floats = np.random.default_rng([random, 1]).standard_t(len(found) - 1, NUM_RESAMPLES)
    return drawn * float(found.std(ddof=1) / math.sqrt(len(found)))


def _quantiles(drawn: Floats) -> tuple[float, float]:
    """Of the resamples that can be judged; (NaN, NaN) if none can."""
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return math.nan, math.nan
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(known, [tail, 1.0 - tail])
    return float(low), float(high)


def _by_seed(runs: Sequence[CaseTable], others: Sequence[CaseTable]) -> Floats:
    """Differences of the split's value, (S,)."""
    pairs = zip(runs, others, strict=True)
    return np.array([run.value()[0] - other.value()[0] for run, other in pairs])


def _by_patient(runs: Sequence[CaseTable], others: Sequence[CaseTable]) -> Floats:
    """Mean difference of each patient over cases and seeds, of those who can be judged."""
    pairs = zip(runs, others, strict=True)
    by_case = np.stack([run.case_values() - other.case_values() for run, other in pairs]).T
    patients, place = runs[0].patients
    means = np.array([mean_of_known(by_case[place == at].ravel()) for at in range(len(patients))])
    kept: Floats = means[~np.isnan(means)]
    return kept


def _signed_rank_p(differences: Floats) -> float:
    if not np.any(differences):
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(differences).pvalue)


def _t_test_p(differences: Floats) -> float | None:
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0.0:  # no spread: scipy would divide by it
        return 0.0 if differences[0] else 1.0
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _ranked(table: CaseTable) -> Floats:
    from scipy import stats

    ranks: Floats = stats.rankdata(table.values, axis=0)
    return ranks


def _value_of(table: CaseTable, values: Floats) -> float:
    changed = CaseTable(table.measure, table.case_ids, table.subjects, values, table.truth)
    return float(changed.value()[0])
