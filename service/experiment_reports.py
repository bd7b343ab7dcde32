"""Reports of experiments: read in one short transaction, built outside of it, and kept a while.

A bootstrap over seeds and patients takes seconds to a minute. Meanwhile no transaction is open (on
SQLite it would be the only writer), one report at most is being built, and whoever asks for the
same one waits for that. What a report says depends on `Facts` alone, so these are its key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import anyio
from sqlalchemy import select
from sqlalchemy.orm import Session

from models.experiment import render
from models.experiment.cases import FILE, CaseResults
from models.experiment.curve import svg
from models.experiment.plan import Plan
from models.experiment.report import CellState, Outcome, Report, build
from service import datasets, experiments
from service.db import Artifact, Experiment, RunState
from service.storage import Store

KEPT = 8
"""Reports; one of 2000 trainings, each judged on 100 cases, is some 10 MB of text."""
Form = Literal["json", "markdown", "svg", "csv"]
FORMS: dict[Form, Callable[[Report, dict[str, Outcome]], str]] = {
    "json": lambda told, _: told.model_dump_json(),
    "markdown": lambda told, _: render.markdown(told),
    "svg": lambda told, _: svg(told),
    "csv": lambda told, found: render.cases_csv(told.plan, found),
}
_STATES: dict[str, CellState] = {
    "succeeded": "succeeded",
    "failed": "failed",
    "canceled": "canceled",
}


@dataclass(frozen=True, slots=True)
class CellFacts:
    """What has become of one training."""

    key: str
    state: CellState
    reason: str
    cases_sha256: str | None
    """Digest of what a fine-tuning scored; None for any other."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a report depends on."""

    name: str
    source: str
    target: str
    plan: str
    """As JSON."""
    cells: tuple[CellFacts, ...]


def read(session: Session, experiment: Experiment) -> Facts:
    """What the rows say of an experiment; nothing is computed yet."""
    found = experiments.standings(session, experiment)
    run_ids = [one.run.id for one in found if one.run is not None]
    kept = select(Artifact).where(Artifact.run_id.in_(run_ids), Artifact.name == FILE)
    files = {artifact.run_id: artifact.sha256 for artifact in session.scalars(kept)}
    return Facts(
        name=experiment.name,
        source=datasets.get(session, experiment.source_dataset_id).name,
        target=datasets.get(session, experiment.target_dataset_id).name,
        plan=experiments.plan_of(experiment).model_dump_json(),
        cells=tuple(_cell(one, files) for one in found),
    )


def built(facts: Facts, store: Store) -> tuple[Report, dict[str, Outcome]]:
    """The report of an experiment so far, and what it is of.

    Raises:
        BlobCorrupt: A file of results is missing or has changed.
    """
    found = {one.key: Outcome(one.state, _results(one, store), one.reason) for one in facts.cells}
    plan = Plan.model_validate_json(facts.plan)
    told = build(plan, found, name=facts.name, source=facts.source, target=facts.target)
    return told, found


class Reports:
    """The reports that were asked for last, in every form; made on the running event loop."""

    def __init__(self, *, kept: int = KEPT) -> None:
        self._kept = kept
        self._texts: OrderedDict[Facts, dict[Form, str]] = OrderedDict()
        self._turn = anyio.Lock()

    async def texts(self, facts: Facts, store: Store) -> dict[Form, str]:
        """A report in every form: as it is kept, else built when no other is being built.

        Who waits for a turn holds no thread.

        Raises:
            BlobCorrupt: A file of results is missing or has changed; nothing is kept.
        """
        if facts not in self._texts:
            async with self._turn:
                if facts not in self._texts:
                    self._texts[facts] = await anyio.to_thread.run_sync(_texts, facts, store)
        found = self._texts[facts]
        self._texts.move_to_end(facts)
        while len(self._texts) > self._kept:
            self._texts.popitem(last=False)
        return found


def _texts(facts: Facts, store: Store) -> dict[Form, str]:
    told, found = built(facts, store)
    return {form: write(told, found) for form, write in FORMS.items()}


def _cell(one: experiments.Standing, files: dict[str, str]) -> CellFacts:
    error = one.error or {}
    reason = f"{error['code']}: {error['detail']}" if error else ""
    is_judged = one.state == RunState.SUCCEEDED and one.cell.kind == "finetune"
    cases = files[one.run.id] if is_judged and one.run is not None else None
    return CellFacts(one.cell.key, _STATES.get(one.state, "open"), reason, cases)


def _results(one: CellFacts, store: Store) -> CaseResults | None:
    if one.cases_sha256 is None:
        return None
    return CaseResults.model_validate_json(store.verify(one.cases_sha256).read_bytes())
