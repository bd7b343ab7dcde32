"""How far experiments are, counted from their cells' rows in one query for a whole page.

The plan is not read: an experiment whose plan this version does not know is listed and canceled
like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import String, case, cast, func, select
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


def summaries(session: Session, experiments: Sequence[Experiment]) -> dict[str, Summary]:
    """How far experiments are, by id."""
    without_run = case(
        (ExperimentCell.error.is_(None), WAITING),
        (ExperimentCell.error["code"].as_string() == CANCELED["code"], str(RunState.CANCELED)),
        else_=str(RunState.FAILED),
    )
    standing = func.coalesce(cast(Run.state, String), without_run).label("standing")
    rows = session.execute(
        select(ExperimentCell.experiment_id, standing, func.count(), func.max(Run.finished_at))
        .outerjoin(Run, Run.id == ExperimentCell.run_id)
        .where(ExperimentCell.experiment_id.in_([one.id for one in experiments]))
        .group_by(ExperimentCell.experiment_id, "standing")
    ).all()
    return {
        one.id: _summary(one, [(str(s), n, at) for of, s, n, at in rows if of == one.id])
        for one in experiments
    }


def summary(session: Session, experiment: Experiment) -> Summary:
    """How far one is."""
    return summaries(session, [experiment])[experiment.id]


def _summary(experiment: Experiment, rows: list[tuple[str, int, datetime | None]]) -> Summary:
    """From (state, number of cells, when the last of them ended)."""
    counts = {state: number for state, number, _ in rows}
    has_ended = all(state in TERMINAL for state in counts)
    ends = [at for _, _, at in rows if at is not None]
    last = max(ends, default=experiment.canceled_at or experiment.created_at)
    return Summary(counts, last if has_ended else None)
