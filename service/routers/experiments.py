"""Experiments: plan a comparison, follow it, extend it, read its report."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service import (
    celery_app,
    db,
    experiment_events,
    experiment_reports,
    experiments,
    quota,
    schemas,
)
from service.experiment_reports import Facts, Form
from service.experiment_summary import Summary, summaries, summary
from service.idempotency import Answer
from service.pagination import PageSize, PageToken, cursor_of, token_of
from service.routers import deps, docs, streams

RETRY_AFTER_S = "30"
MEDIA_TYPES: dict[Form, str] = {
    "json": "application/json",
    "markdown": "text/markdown; charset=utf-8",
    "svg": "image/svg+xml",
    "csv": "text/csv; charset=utf-8",
}
_REPORT: docs.Responses = {
    200: {
        "description": "The report so far: as JSON or Markdown, its curve as SVG, its cases as CSV",
        "content": {
            "application/json": {
                "schema": {"type": "object", "examples": [{"name": "Liver", "points": []}]}
            },
            "text/markdown": {"schema": {"type": "string"}},
            "image/svg+xml": {"schema": {"type": "string"}},
            "text/csv": {"schema": {"type": "string"}},
        },
    }
}
_STREAM: docs.Responses = {
    200: {
        "description": "Events as a stream until every training has ended, or what there is now",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'id: 7\nevent: training\ndata: {"id":7,"key":"pretrain/pcrl/0","run_id":'
                '"run_0123456789abcdef0123456789abcdef","state":"succeeded","attempt":1,"error":null,"created_at":'
                '"2026-11-24T04:12:00Z"}\n\nid: 7\nevent: progress\ndata: {"state":"running",'
                '"stage":"finetune","stages":{"pretrain":{"num_trainings":1,"num_ended":1},'
                '"finetune":{"num_trainings":2,"num_ended":0}},"num_trainings":3,"num_ended":1,'
                '"fraction":0.3333333333333333,"counts":{"queued":2,"succeeded":1},"running":[],'
                '"finished_at":null}\n\n',
            },
            "application/json": {"schema": {"$ref": "#/components/schemas/ExperimentEvents"}},
        },
    }
}

router = deps.router("experiments")


@router.post(
    "/experiments",
    status_code=202,
    operation_id="create_experiment",
    summary="Compare pretrainings by what is fine-tuned from them",
    response_model=schemas.Experiment,
    responses=docs.problems(
        "forbidden",
        "not_found",
        "request_too_large",
        "invalid_request",
        "dataset_without_labels",
        "split_leaks_subject",
        "wrong_volume_kind",
        "idempotency_mismatch",
        "idempotency_in_flight",
        "quota_exceeded",
    ),
)
async def create_experiment(
    ask: schemas.ExperimentCreate,
    caller: deps.Researcher,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
) -> JSONResponse:
    """Queue every training that can begin; the others follow as their pretrainings end."""

    def work(session: Session) -> Answer:
        quota.check_runs(session, caller.project_id, settings)
        experiment, _made = experiments.create(
            session,
            name=ask.name,
            source_dataset_id=ask.source_dataset_id,
            target_dataset_id=ask.target_dataset_id,
            plan=ask.plan(),
            principal=caller.id,
        )
        return _accepted(session, experiment)

    answer, is_new = await run_in_threadpool(once.answer, caller, work)
    if is_new:  # one doorbell: a worker goes on until nothing waits, and upkeep wakes others
        await run_in_threadpool(celery_app.ring, str(answer.body["id"]), "train", settings=settings)
    return deps.reply(answer, is_new=is_new)


@router.get(
    "/experiments",
    operation_id="list_experiments",
    summary="List experiments, newest first",
    responses=docs.problems("invalid_request"),
)
def list_experiments(
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> schemas.ExperimentPage:
    """Experiments with how far they are."""
    page = experiments.listing(session, size=page_size, after=cursor_of(page_token))
    found = summaries(session, page.items)
    items = tuple(_view(row, found[row.id]) for row in page.items)
    return schemas.ExperimentPage(items=items, next_page_token=token_of(page.next))


@router.get(
    "/experiments/{experiment_id}",
    operation_id="get_experiment",
    summary="Get an experiment",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_experiment(
    experiment_id: schemas.ExperimentId, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.Experiment:
    """Its plan, and how far it is: the number of trainings in each state."""
    return _current(session, experiments.get(session, experiment_id))


@router.get(
    "/experiments/{experiment_id}/trainings",
    operation_id="list_experiment_trainings",
    summary="List the trainings of an experiment",
    responses=docs.problems("invalid_request", "not_found", "plan_unreadable"),
)
def list_experiment_trainings(
    experiment_id: schemas.ExperimentId,
    _caller: deps.Viewer,
    session: deps.DbSession,
    state: Annotated[schemas.CellState | None, Query()] = None,
) -> schemas.ExperimentCells:
    """Every training with its run, whose metrics and events are at `/runs/{run_id}`."""
    found = experiments.standings(session, experiments.get(session, experiment_id))
    return schemas.ExperimentCells(
        items=tuple(_cell(one) for one in found if state in (None, one.state))
    )


@router.get(
    "/experiments/{experiment_id}/events",
    operation_id="get_experiment_events",
    summary="Follow an experiment",
    response_class=Response,
    responses=_STREAM | docs.problems("invalid_request", "not_found"),
)
async def get_experiment_events(
    experiment_id: schemas.ExperimentId,
    _caller: deps.Viewer,
    sessions: deps.Sessions,
    request: Request,
    after: streams.After = None,
    last_event_id: streams.LastEventId = None,
) -> Response:
    """`training` when one changes its state, `progress` of the whole when it is another.

    After a break `Last-Event-ID` misses nothing; a `training` may be told twice, by the same `id`.
    """
    since = last_event_id if last_event_id is not None else after or 0
    found = await run_in_threadpool(experiment_events.read, sessions, experiment_id, since)
    if streams.wants_list(request, after):
        return JSONResponse(found.model_dump(mode="json"))
    return streams.answer(experiment_events.stream(sessions, experiment_id, since))


@router.get(
    "/experiments/{experiment_id}/report",
    operation_id="get_experiment_report",
    summary="Get the report of an experiment",
    response_class=Response,
    responses=_REPORT
    | docs.problems("invalid_request", "not_found", "blob_corrupt", "plan_unreadable"),
)
async def get_experiment_report(
    experiment_id: schemas.ExperimentId,
    _caller: deps.Viewer,
    sessions: deps.Sessions,
    store: deps.StoreOf,
    reports: deps.ReportsOf,
    form: Annotated[Form, Query(alias="format")] = "json",
) -> Response:
    """The curve, its intervals and tests, of the trainings that have succeeded so far."""

    def read() -> Facts:
        with sessions() as session:
            return experiment_reports.read(session, experiments.get(session, experiment_id))

    texts = await reports.texts(await run_in_threadpool(read), store)
    return Response(texts[form], media_type=MEDIA_TYPES[form])


@router.post(
    "/experiments/{experiment_id}:extend",
    status_code=202,
    operation_id="extend_experiment",
    summary="Add methods, ratios or seeds to an experiment",
    response_model=schemas.Experiment,
    responses=docs.problems(
        "forbidden",
        "request_too_large",
        "invalid_request",
        "not_found",
        "dataset_without_labels",
        "split_leaks_subject",
        "wrong_volume_kind",
        "experiment_canceled",
        "experiment_canceling",
        "plan_unreadable",
        "idempotency_mismatch",
        "idempotency_in_flight",
        "quota_exceeded",
    ),
)
async def extend_experiment(
    experiment_id: schemas.ExperimentId,
    ask: schemas.ExperimentExtend,
    caller: deps.Researcher,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
) -> JSONResponse:
    """Queue what is new; trainings that are done are part of the larger experiment."""

    def work(session: Session) -> Answer:
        quota.check_runs(session, caller.project_id, settings)
        experiments.extend(
            session,
            experiment_id,
            methods=ask.methods,
            ratios=ask.ratios,
            seeds=ask.seeds,
            retry=ask.retry,
        )
        return _accepted(session, experiments.get(session, experiment_id))

    answer, is_new = await run_in_threadpool(once.answer, caller, work)
    if is_new:
        await run_in_threadpool(celery_app.ring, experiment_id, "train", settings=settings)
    return deps.reply(answer, is_new=is_new)


@router.post(
    "/experiments/{experiment_id}:cancel",
    status_code=202,
    operation_id="cancel_experiment",
    summary="Stop an experiment",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "run_already_ended"),
)
def cancel_experiment(
    experiment_id: schemas.ExperimentId, _caller: deps.Researcher, session: deps.DbSession
) -> schemas.Experiment:
    """Ask every training that has not ended to end; what is done stays, and is reported."""
    experiments.cancel(session, experiment_id)
    session.commit()
    return _current(session, experiments.get(session, experiment_id))


def _accepted(session: Session, experiment: db.Experiment) -> Answer:
    session.refresh(experiment)
    headers = {
        "Location": f"{deps.PREFIX}/experiments/{experiment.id}",
        "Retry-After": RETRY_AFTER_S,
    }
    return Answer(202, headers, _current(session, experiment).model_dump(mode="json"))


def _current(session: Session, row: db.Experiment) -> schemas.Experiment:
    return _view(row, summary(session, row))


def _view(row: db.Experiment, so_far: Summary) -> schemas.Experiment:
    return schemas.Experiment.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "source_dataset_id": row.source_dataset_id,
            "target_dataset_id": row.target_dataset_id,
            "plan": row.plan,
            "state": so_far.state,
            "num_trainings": so_far.num_cells,
            "counts": so_far.counts,
            "fraction": so_far.num_ended / max(1, so_far.num_cells),
            "canceled_at": row.canceled_at,
            "created_at": row.created_at,
            "finished_at": so_far.finished_at,
        }
    )


def _cell(one: experiments.Standing) -> schemas.ExperimentCell:
    return schemas.ExperimentCell.model_validate(
        {
            "key": one.cell.key,
            "kind": one.cell.kind,
            "method": one.cell.method,
            "ratio": one.cell.ratio,
            "seed": one.cell.seed,
            "state": one.state,
            "run_id": one.run.id if one.run is not None else None,
            "tries": one.row.tries if one.row is not None else 0,
            "progress": one.run.progress if one.run is not None else None,
            "error": one.error,
        }
    )
