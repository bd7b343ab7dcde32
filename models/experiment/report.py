"""The cells' results as one answer: the curve, the comparisons, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from models.experiment.cases import CaseResults, CaseTable, Measure
from models.experiment.plan import Cell, Plan, cells
from models.experiment.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Interval,
    difference,
    holm,
    interval,
    paired_test,
)
from models.recipe import Part

LEVEL = 0.05
"""Of significance, after Holm's correction."""

Untested = Literal["single_seed", "single_pretraining"]
"""Why nothing is said of the methods: what a seed decides, in training or in pretraining, was drawn
once, and its part in the difference cannot be told from the method's."""

CellState = Literal["succeeded", "failed", "canceled", "open"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of one cell."""

    state: CellState
    results: CaseResults | None = None
    """Of a fine-tuning that succeeded."""
    reason: str = ""
    """Code and detail of one that did not."""


class Point(Part):
    """One method at one ratio."""

    method: str
    ratio: float
    value: float | None
    """Mean over seeds; None where no seed is done."""
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]


class Comparison(Part):
    """One method against another at one ratio, paired by seed and patient."""

    method: str
    other: str
    ratio: float
    difference: float
    low: float
    high: float
    seeds: tuple[int, ...]
    p_patients: float
    p_seeds: float | None
    p: float
    p_holm: float
    significant: bool | None
    """`p_holm` below 0.05; None where the methods were not put to the test."""
    untested: Untested | None
    """Why not."""


class Missing(Part):
    """A cell without a result."""

    key: str
    state: CellState
    reason: str


class Report(Part):
    """An experiment's answer so far."""

    name: str
    source: str
    target: str
    plan: Plan
    measure: Measure | None
    labels: tuple[str, ...]
    num_patients: int
    """In the test split."""
    num_cases: int
    confidence: float = CONFIDENCE
    num_resamples: int = NUM_RESAMPLES
    points: tuple[Point, ...]
    comparisons: tuple[Comparison, ...]
    """The first method against every other, corrected as one family."""
    best_against_second: tuple[Comparison, ...]
    """The paper's last row: at each ratio, chosen by these results, so lower than it should be."""
    missing: tuple[Missing, ...]


def build(
    plan: Plan, outcomes: Mapping[str, Outcome], *, name: str, source: str, target: str
) -> Report:
    """The report of the cells' outcomes; a cell that is not among them is open.

    Args:
        plan: The experiment.
        outcomes: By cell key.
        name: Of the experiment, for its title.
        source: Name of the data that was pretrained on.
        target: Name of the data that was fine-tuned on.

    Raises:
        ValueError: The runs were judged on different cases.
    """
    every = cells(plan)
    tables = {
        (cell.method, cell.ratio, cell.seed): CaseTable.of(found.results)
        for cell in every
        if (found := outcomes.get(cell.key)) is not None and found.results is not None
    }
    grid = {
        (method.name, ratio): _by_seed(tables, method.name, ratio, plan.seeds)
        for method in plan.methods
        for ratio in sorted(plan.ratios)
    }
    points = tuple(_point(method, ratio, runs) for (method, ratio), runs in grid.items())
    first, *others = (method.name for method in plan.methods)
    asked = [(first, other, ratio) for ratio in sorted(plan.ratios) for other in others]
    any_results = next((o.results for o in outcomes.values() if o.results is not None), None)
    any_table = next(iter(tables.values()), None)
    return Report(
        name=name,
        source=source,
        target=target,
        plan=plan,
        measure=any_table.measure if any_table is not None else None,
        labels=any_results.labels if any_results is not None else (),
        num_patients=len(any_table.patients[0]) if any_table is not None else 0,
        num_cases=len(any_table.case_ids) if any_table is not None else 0,
        points=points,
        comparisons=_compared(plan, asked, grid),
        best_against_second=_compared(plan, _best_two(plan, points), grid),
        missing=tuple(_missing(cell, outcomes) for cell in every if not _is_done(cell, outcomes)),
    )


Runs = dict[int, CaseTable]
"""By seed."""
Grid = Mapping[tuple[str, float], Runs]


def _by_seed(
    tables: Mapping[tuple[str, float | None, int | None], CaseTable],
    method: str,
    ratio: float,
    seeds: Sequence[int],
) -> Runs:
    keys = ((seed, (method, ratio, seed)) for seed in sorted(seeds))
    return {seed: tables[key] for seed, key in keys if key in tables}


def _point(method: str, ratio: float, runs: Runs) -> Point:
    found = interval(list(runs.values())) if runs else Interval(math.nan, math.nan, math.nan)
    return Point(
        method=method,
        ratio=ratio,
        value=_known(found.value),
        low=_known(found.low),
        high=_known(found.high),
        seeds=tuple(runs),
        by_seed=tuple(float(run.value()[0]) for run in runs.values()),
    )


def _compared(
    plan: Plan, asked: Sequence[tuple[str, str, float]], grid: Grid
) -> tuple[Comparison, ...]:
    """Comparisons of methods that share seeds at a ratio, with p-values corrected together."""
    found = []
    for method, other, ratio in asked:
        shared = [seed for seed in grid[method, ratio] if seed in grid[other, ratio]]
        ours = [grid[method, ratio][seed] for seed in shared]
        theirs = [grid[other, ratio][seed] for seed in shared]
        if shared and not math.isnan((apart := difference(ours, theirs)).low):
            found.append((method, other, ratio, tuple(shared), apart, paired_test(ours, theirs)))
    corrected = holm([test.p for *_, test in found])
    untested = [_untested(plan, (method, other), seeds) for method, other, _, seeds, *_ in found]
    return tuple(
        Comparison(
            method=method,
            other=other,
            ratio=ratio,
            difference=apart.value,
            low=apart.low,
            high=apart.high,
            seeds=seeds,
            p_patients=test.p_patients,
            p_seeds=test.p_seeds,
            p=test.p,
            p_holm=p_holm,
            significant=None if why_not is not None else p_holm < LEVEL,
            untested=why_not,
        )
        for (method, other, ratio, seeds, apart, test), p_holm, why_not in zip(
            found, corrected, untested, strict=True
        )
    )


def _untested(plan: Plan, methods: Sequence[str], seeds: Sequence[int]) -> Untested | None:
    """Why a comparison over these seeds says nothing of the methods, if so."""
    if len(seeds) < 2:
        return "single_seed"
    is_drawn = any(plan.method(name).is_drawn for name in methods)
    return "single_pretraining" if is_drawn and plan.pretrain_per == "method" else None


def _best_two(plan: Plan, points: Sequence[Point]) -> list[tuple[str, str, float]]:
    """Best and second best method at each ratio; of equals, the one that the plan names first."""
    pairs = []
    for ratio in sorted(plan.ratios):
        known = [(p.value, p.method) for p in points if p.ratio == ratio and p.value is not None]
        ranked = [method for _, method in sorted(known, key=lambda one: -one[0])]
        if len(ranked) >= 2:
            pairs.append((ranked[0], ranked[1], ratio))
    return pairs


def _is_done(cell: Cell, outcomes: Mapping[str, Outcome]) -> bool:
    found = outcomes.get(cell.key)
    return found is not None and found.state == "succeeded"


def _missing(cell: Cell, outcomes: Mapping[str, Outcome]) -> Missing:
    found = outcomes.get(cell.key, Outcome("open"))
    return Missing(key=cell.key, state=found.state, reason=found.reason)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
