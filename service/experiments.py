"""Experiments: a plan, its trainings as ordinary runs, and what has come of them.

    waiting -----advance----> a run (queued ... succeeded | failed | canceled)
    waiting -----advance----> failed     its pretraining has not succeeded
    waiting -----advance----> canceled   the experiment was

`advance` is the planner: it looks at the rows and makes what has become possible. It may be called
at any time, by anyone, any number of times: by the request that plans, by a worker that has ended
a run, and by upkeep, which finds what a killed process left undone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from models.experiment.plan import Cell, Method, Plan, cells, extended, recipe_of
from service import datasets, registry, runs, trainable
from service.db import (
    TERMINAL,
    Cursor,
    Experiment,
    ExperimentCell,
    ModelVersion,
    Page,
    Run,
    RunState,
    db_now,
    new_id,
    page,
    within,
)
from service.errors import ServiceError
from service.experiment_summary import CANCELED, WAITING, summary

logger = logging.getLogger(__name__)

PRIORITY = -10
"""Of a training: a worker takes any single request before it."""
IS_WAITING = (ExperimentCell.run_id.is_(None), ExperimentCell.error.is_(None))
CANCELING_RETRY_S = "10"
"""A worker hears of it with its next heartbeat."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A cell with its row and its run, if it has them."""

    cell: Cell
    row: ExperimentCell | None
    run: Run | None

    @property
    def state(self) -> str:
        """The run's; without one `waiting`, `failed` or `canceled`."""
        if self.run is not None:
            return self.run.state
        error = self.error
        if error is None:
            return WAITING
        return "canceled" if error["code"] == CANCELED["code"] else "failed"

    @property
    def error(self) -> dict[str, Any] | None:
        """Code and detail of why it has no result."""
        if self.run is not None:
            return self.run.error
        return self.row.error if self.row is not None else None


def create(
    session: Session,
    *,
    name: str,
    source_dataset_id: str,
    target_dataset_id: str,
    plan: Plan,
    principal: str,
) -> tuple[Experiment, list[Run]]:
    """Plan an experiment; the caller commits, then rings for the runs.

    Raises:
        ServiceError: 404 `not_found`; 422 `wrong_volume_kind` if a recipe reads no such scans, 422
            `dataset_without_labels` if nothing labelled trains or tests, 422 `split_leaks_subject`
            if a pretraining would see who validates or tests.
    """
    _check_datasets(session, source_dataset_id, target_dataset_id, plan)
    experiment = Experiment(
        id=new_id("exp"),
        name=name,
        source_dataset_id=source_dataset_id,
        target_dataset_id=target_dataset_id,
        plan=plan.model_dump(mode="json"),
        created_by=principal,
    )
    session.add(experiment)
    session.flush()
    return experiment, advance(session, experiment.id)


def get(session: Session, experiment_id: str) -> Experiment:
    """An experiment by id.

    Raises:
        ServiceError: 404 `not_found`.
    """
    experiment = session.get(Experiment, experiment_id, populate_existing=True)
    if experiment is None:
        raise ServiceError(404, "not_found", "no experiment has this id")
    return experiment


def listing(session: Session, *, size: int = 50, after: Cursor | None = None) -> Page[Experiment]:
    """Experiments, newest first."""
    return page(session, Experiment, size=size, after=after)


def plan_of(experiment: Experiment) -> Plan:
    """The plan as it is now.

    Raises:
        ServiceError: 500 `plan_unreadable`: a newer or older version has written it.
    """
    try:
        return Plan.model_validate(experiment.plan)
    except ValidationError:  # its text repeats values
        raise ServiceError(
            500, "plan_unreadable", "the stored plan is not of a form that this version knows"
        ) from None


def standings(session: Session, experiment: Experiment) -> list[Standing]:
    """Every cell of the plan in its order, with what has become of it.

    Raises:
        ServiceError: 500 `plan_unreadable`.
    """
    found = session.execute(
        select(ExperimentCell, Run)
        .outerjoin(Run, Run.id == ExperimentCell.run_id)
        .where(ExperimentCell.experiment_id == experiment.id)
        .execution_options(populate_existing=True)
    )
    by_key = {row.key: (row, run) for row, run in found}
    return [
        Standing(cell, *by_key.get(cell.key, (None, None))) for cell in cells(plan_of(experiment))
    ]


def advance(session: Session, experiment_id: str) -> list[Run]:
    """Queue every training that has become possible; the caller commits, then rings for them.

    The experiment's row is locked meanwhile. Who finds it locked by another does nothing and waits
    for nobody: one stuck transaction must not hold up upkeep, which serves everyone. What that
    leaves undone upkeep finds the next time. So nothing is made twice and, since the rows alone
    decide, nothing is forgotten.
    """
    experiment = session.scalars(_for_update(experiment_id, skip_locked=True)).one_or_none()
    if experiment is None:
        return []
    try:
        plan = plan_of(experiment)
    except ServiceError as error:  # nobody's loop may end by it
        logger.warning("experiment %s is not planned: %s", experiment_id, error.code)
        return []
    with within(session, experiment.project_id):  # a worker's and upkeep's session is of all
        return _advanced(session, experiment, plan)


def _advanced(session: Session, experiment: Experiment, plan: Plan) -> list[Run]:
    found = {one.cell.key: one for one in standings(session, experiment)}
    made = []
    for key, one in found.items():  # pretrainings come before what needs them
        row = one.row
        if row is None:
            row = ExperimentCell(experiment_id=experiment.id, key=key, tries=0)
            session.add(row)
            found[key] = Standing(one.cell, row, None)
        if row.run_id is not None or row.error is not None:
            continue
        if experiment.canceled_at is not None:
            row.error = CANCELED
            continue
        parent = found[one.cell.parent] if one.cell.parent is not None else None
        if parent is not None and parent.state in TERMINAL - {RunState.SUCCEEDED}:
            row.error = _pretraining_failed(parent)
        elif parent is None or parent.state == RunState.SUCCEEDED:
            encoder = _encoder(session, parent)
            if parent is not None and encoder is None:
                row.error = {"code": "pretraining_failed", "detail": "its encoder is gone"}
                continue
            run = _train(session, experiment, plan, one.cell, encoder)
            row.run_id, row.tries = run.id, row.tries + 1
            made.append(run)
    session.flush()
    return made


def advance_after(session: Session, run_id: str) -> list[Run]:
    """Queue what the end of a run has made possible. Commits."""
    experiment_id = session.scalar(
        select(ExperimentCell.experiment_id).where(ExperimentCell.run_id == run_id)
    )
    made = advance(session, experiment_id) if experiment_id is not None else []
    session.commit()
    return made


def waiting(session: Session) -> list[str]:
    """Experiments with a cell that has neither a run nor a reason."""
    return list(session.scalars(select(ExperimentCell.experiment_id).where(*IS_WAITING).distinct()))


def cancel(session: Session, experiment_id: str) -> None:
    """Ask every run of it to end and begin no other; the caller commits.

    By the rows alone, so that a plan which cannot be read can be canceled.

    Raises:
        ServiceError: 404 `not_found`; 409 `run_already_ended` if all have ended.
    """
    experiment = _locked(session, experiment_id)
    if summary(session, experiment).finished_at is not None:
        raise ServiceError(409, "run_already_ended", "every training has ended already")
    if experiment.canceled_at is None:
        experiment.canceled_at = session.scalar(select(db_now()))
        session.flush()
    mine = ExperimentCell.experiment_id == experiment_id
    session.execute(update(ExperimentCell).where(mine, *IS_WAITING).values(error=CANCELED))
    going = (
        select(Run.id)
        .join(ExperimentCell, ExperimentCell.run_id == Run.id)
        .where(mine, Run.state.not_in(TERMINAL))
        .order_by(Run.id)
    )
    for run_id in session.scalars(going).all():
        try:
            runs.request_cancel(session, run_id)
        except ServiceError as error:
            if error.code != "run_already_ended":  # it ended meanwhile: fine
                raise


def extend(
    session: Session,
    experiment_id: str,
    *,
    methods: tuple[Method, ...] = (),
    ratios: tuple[float, ...] = (),
    seeds: tuple[int, ...] = (),
    retry: bool = False,
) -> list[Run]:
    """Add to a plan; what is done stays. The caller commits, then rings for the runs.

    Args:
        session: Database session.
        experiment_id: The experiment.
        methods: New ones.
        ratios: New ones.
        seeds: New ones.
        retry: Do what failed or was canceled again; a canceled experiment goes on by it alone.

    Raises:
        ServiceError: 404 `not_found`; 409 `experiment_canceled`, `experiment_canceling` while a
            worker has yet to end what was canceled; 422 `invalid_request`; 500
            `plan_unreadable`.
    """
    experiment = _locked(session, experiment_id)
    if experiment.canceled_at is not None and not retry:
        raise ServiceError(
            409, "experiment_canceled", "the experiment was canceled; ask with retry to go on"
        )
    before = plan_of(experiment)
    try:
        plan = extended(before, methods=methods, ratios=ratios, seeds=seeds)
    except ValueError as error:
        raise ServiceError(422, "invalid_request", str(error)) from None
    _check_datasets(session, experiment.source_dataset_id, experiment.target_dataset_id, plan)
    if retry:
        found = standings(session, experiment)
        _require_ended(found)
        experiment.canceled_at = None
        for one in found:
            if one.row is not None and one.state in TERMINAL - {RunState.SUCCEEDED}:
                one.row.run_id, one.row.error = None, None
    experiment.plan = plan.model_dump(mode="json")
    session.flush()
    return advance(session, experiment_id)


def _require_ended(found: Sequence[Standing]) -> None:
    """A run that is `canceling` would keep its cell, and end as canceled after the retry."""
    if number := sum(one.state == RunState.CANCELING for one in found):
        raise ServiceError(
            409,
            "experiment_canceling",
            f"{number} canceled trainings have not ended yet; ask again when they have",
            headers={"Retry-After": CANCELING_RETRY_S},
        )


def _locked(session: Session, experiment_id: str) -> Experiment:
    """An experiment whose row is ours until the commit: plans change one after the other.

    Raises:
        ServiceError: 404 `not_found`.
    """
    experiment = session.scalars(_for_update(experiment_id)).one_or_none()
    if experiment is None:
        raise ServiceError(404, "not_found", "no experiment has this id")
    return experiment


def _for_update(experiment_id: str, *, skip_locked: bool = False) -> Select[Experiment]:
    return (
        select(Experiment)
        .where(Experiment.id == experiment_id)
        .with_for_update(skip_locked=skip_locked)
        .execution_options(populate_existing=True)
    )


def _encoder(session: Session, parent: Standing | None) -> ModelVersion | None:
    """What a pretraining that has succeeded registered."""
    if parent is None:
        return None
    assert parent.run is not None  # it has succeeded
    return registry.of_run(session, parent.run.id)


def _train(
    session: Session, experiment: Experiment, plan: Plan, cell: Cell, encoder: ModelVersion | None
) -> Run:
    """A run of a cell; its model's name holds the experiment's id, so it meets no other."""
    stem = f"{experiment.id[:12]}.{cell.method}"
    is_encoder = cell.kind == "pretrain"
    return runs.create(
        session,
        kind=cell.kind,
        spec={
            "recipe": recipe_of(plan, cell).model_dump(mode="json"),
            "parent": encoder.digest if encoder is not None else None,
            "parent_ref": encoder.run_id if encoder is not None else None,
            "model_name": f"{stem}.encoder" if is_encoder else stem,
            "experiment": {"id": experiment.id, "cell": cell.key},
        },
        dataset_id=experiment.source_dataset_id if is_encoder else experiment.target_dataset_id,
        priority=PRIORITY,
        principal=experiment.created_by,
    )


def _pretraining_failed(parent: Standing) -> dict[str, str]:
    """Why a fine-tuning cannot begin; canceled where its pretraining was."""
    if parent.state == RunState.CANCELED:
        return {"code": CANCELED["code"], "detail": "its pretraining was canceled"}
    error = parent.error or {"code": "unknown", "detail": ""}
    return {
        "code": "pretraining_failed",
        "detail": f"{parent.cell.key} failed: {error['code']}: {error['detail']}"[:2000],
    }


def _check_datasets(session: Session, source_id: str, target_id: str, plan: Plan) -> None:
    source, target = datasets.get(session, source_id), datasets.get(session, target_id)
    trainable.require(session, target.id, plan.finetune, judged=True)
    pretrainings = [method.pretrain for method in plan.methods if method.pretrain is not None]
    if not pretrainings:
        return
    trainable.require(session, source.id, pretrainings[0])  # all have one network
    items = datasets.items_of(session, target.id)
    held_out = {item.subject for item in items if item.split != "train"}
    trained = {
        item.subject for item in datasets.items_of(session, source.id) if item.split == "train"
    }
    if both := held_out & trained:
        raise ServiceError(
            422,
            "split_leaks_subject",
            f"{len(both)} subjects that validate or test in the target are in the source's train "
            "split; their scans would be pretrained on",
        )
