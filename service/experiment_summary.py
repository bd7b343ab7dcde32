"""How far experiments are, counted from their cells' rows in one query for a whole page.

The plan is not read: an experiment whose plan this version does not know is listed and canceled
like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, SQLColumnExpression, String, case, cast, func, select
from sqlalchemy.orm import Session

from service.db import TERMINAL, Experiment, ExperimentCell, Run, RunState

WAITING = "waiting"
CANCELED = {"code": "canceled", "detail": "the experiment was canceled before it began"}
"""Of a cell that never had a run; its code tells it from one that failed."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How far an experiment is."""

    counts: dict[str, int]
    """Cells in each state."""
    finished_at: datetime | None
    """When the last run ended; None while one has not."""

    @property
    def num_cells(self) -> int:
        """All trainings."""
        return sum(self.counts.values())

    @property
    def num_ended(self) -> int:
        """Those that have ended."""
        return sum(count for state, count in self.counts.items() if state in TERMINAL)

    @property
    def state(self) -> str:
        """`running` until all have ended, then `succeeded`, `failed` (any did) or `canceled`."""
        if self.num_ended < max(1, self.num_cells):  # none at all: its rows are not there yet
            return "running"
        if RunState.CANCELED in self.counts:
            return "canceled"
        return "failed" if RunState.FAILED in self.counts else "succeeded"


PRETRAIN, FINETUNE = "pretrain", "finetune"


def stages(session: Session, experiment: Experiment) -> tuple[Summary, dict[str, Summary]]:
    """How far one is as a whole, and in its pretrainings and fine-tunings, in this order."""
    is_pretraining = ExperimentCell.key.startswith(f"{PRETRAIN}/", autoescape=True)
    stage = case((is_pretraining, PRETRAIN), else_=FINETUNE).label("stage")
    rows = session.execute(
        _counted(stage).where(ExperimentCell.experiment_id == experiment.id).group_by("stage")
    ).all()
    by_stage = {
        name: _summary(experiment, [(s, n, at) for of, s, n, at in rows if of == name])
        for name in (PRETRAIN, FINETUNE)
    }
    return _summary(experiment, [(s, n, at) for _, s, n, at in rows]), by_stage


def summaries(session: Session, experiments: Sequence[Experiment]) -> dict[str, Summary]:
    """How far experiments are, by id."""
    of = ExperimentCell.experiment_id
    rows = session.execute(
        _counted(of).where(of.in_([one.id for one in experiments])).group_by(of)
    ).all()
    return {
        one.id: _summary(one, [(s, n, at) for of, s, n, at in rows if of == one.id])
        for one in experiments
    }


def summary(session: Session, experiment: Experiment) -> Summary:
    """How far one is."""
    return summaries(session, [experiment])[experiment.id]


def _counted(by: SQLColumnExpression[str]) -> Select[str, str, int, datetime | None]:
    """By something and by state: number of cells, and when the last of them ended."""
    without_run = case(
        (ExperimentCell.error.is_(None), WAITING),
        (ExperimentCell.error["code"].as_string() == CANCELED["code"], str(RunState.CANCELED)),
        else_=str(RunState.FAILED),
    )
    standing = func.coalesce(cast(Run.state, String), without_run).label("standing")
    return (
        select(by, standing, func.count(), func.max(Run.finished_at))
        .outerjoin(Run, Run.id == ExperimentCell.run_id)
        .group_by("standing")
    )


def _summary(experiment: Experiment, rows: list[tuple[str, int, datetime | None]]) -> Summary:
    """From (state, number of cells, when the last of them ended)."""
    counts: Counter[str] = Counter()
    for state, number, _ in rows:
        counts[state] += number
    has_ended = all(state in TERMINAL for state in counts)
    ends = [at for _, _, at in rows if at is not None]
    last = max(ends, default=experiment.canceled_at or experiment.created_at)
    return Summary(dict(counts), last if has_ended else None)
