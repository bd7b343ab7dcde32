"""Runs: post a training, follow it, stop it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from models.bundle import WEIGHTS
from models.recipe import AnyClassify, AnyRecipe, FinetuneRecipe
from service import datasets, db, events, registry, runs, schemas, trainable
from service.auth import Role
from service.errors import ServiceError
from service.idempotency import Answer
from service.pagination import PageSize, PageToken, cursor_of, token_of
from service.queue import Able, position
from service.routers import answers, deps, docs, streams, views

_RUN_ID = re.compile(r"run_[0-9a-f]{32}")
_STREAM: docs.Responses = {
    200: {
        "description": "Events, as a stream until the run ends or as a list",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'id: 7\nevent: state\ndata: {"id":7,"type":"state","data":{"state":'
                '"running"},"created_at":"2026-11-24T04:12:00Z"}\n\n',
            },
            "application/json": {"schema": {"$ref": "#/components/schemas/Events"}},
        },
    }
}

router = deps.router("runs")


@router.post(
    "/runs",
    status_code=202,
    operation_id="create_run",
    summary="Start a training",
    response_model=schemas.Run,
    responses=docs.also(200, schemas.Run, "It ended within the time of `Prefer: wait`")
    | docs.problems(
        "forbidden",
        "not_found",
        "not_ready",
        "request_too_large",
        "invalid_request",
        "wrong_model_kind",
        "wrong_volume_kind",
        "incompatible_parent",
        "dataset_without_labels",
        "idempotency_mismatch",
        "idempotency_in_flight",
        "quota_exceeded",
    ),
)
async def create_run(
    ask: schemas.RunCreate,
    caller: deps.Researcher,
    once: deps.OnceOf,
    settings: deps.SettingsOf,
    prefer: answers.PreferOf = None,
) -> JSONResponse:
    """Queue a pretraining or a fine-tuning: segmentation or classification, by its recipe."""
    if ask.priority > 0 and not caller.role.covers(Role.ADMIN):
        raise ServiceError(
            403,
            "forbidden",
            f"a priority above 0 needs the role admin; the token's is {caller.role}",
        )

    def work(session: Session) -> Answer:
        parent = _check(session, ask)
        run = runs.create(
            session,
            kind=ask.kind,
            spec={
                "recipe": ask.recipe.model_dump(mode="json"),
                "parent": parent.digest if parent is not None else None,
                "parent_ref": ask.parent,
                "model_name": ask.model_name,
            },
            dataset_id=ask.dataset_id,
            priority=ask.priority,
            needs=Able(ask.requires.device or "", ask.requires.memory_bytes),
            principal=caller.id,
        )
        return answers.accepted(run, "runs", views.run)

    return await answers.queue(once, caller, settings, work, view=views.run, prefer=prefer)


@router.get(
    "/runs",
    operation_id="list_runs",
    summary="List runs of every kind, newest first",
    responses=docs.problems("invalid_request"),
)
def list_runs(
    *,
    _caller: deps.Viewer,
    session: deps.DbSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
    kind: Annotated[db.RunKind | None, Query()] = None,
    state: Annotated[schemas.State | None, Query()] = None,
    dataset_id: Annotated[schemas.DatasetId | None, Query()] = None,
) -> schemas.RunPage:
    """Runs, perhaps of one kind, in one state, or on one dataset."""
    page = runs.listing(
        session,
        size=page_size,
        after=cursor_of(page_token),
        kinds=[kind] if kind is not None else None,
        states=[state] if state is not None else None,
        dataset_id=dataset_id,
    )
    items = tuple(views.run(row) for row in page.items)
    return schemas.RunPage(items=items, next_page_token=token_of(page.next))


@router.get(
    "/runs/{run_id}",
    operation_id="get_run",
    summary="Get a run",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_run(run_id: schemas.RunId, _caller: deps.Viewer, session: deps.DbSession) -> schemas.Run:
    """A run as it is now; while it waits, `queue_position` says when its turn comes."""
    row = runs.get(session, run_id)
    return views.run(row, queue_position=position(session, row))


@router.get(
    "/runs/{run_id}/metrics",
    operation_id="get_run_metrics",
    summary="Get the curves of a run",
    responses=docs.problems("invalid_request", "not_found"),
)
def get_run_metrics(
    run_id: schemas.RunId, _caller: deps.Viewer, session: deps.DbSession
) -> schemas.RunMetrics:
    """Every value that the run has measured, by name and step."""
    runs.get(session, run_id)
    points = runs.metrics(session, run_id)
    return schemas.RunMetrics(
        points=tuple(
            schemas.MetricPoint(name=point.name, step=point.step, value=point.value)
            for point in points
        )
    )


@router.get(
    "/runs/{run_id}/events",
    operation_id="get_run_events",
    summary="Follow a run",
    response_class=Response,
    responses=_STREAM | docs.problems("invalid_request", "not_found"),
)
async def get_run_events(
    run_id: schemas.RunId,
    _caller: deps.Viewer,
    sessions: deps.Sessions,
    request: Request,
    after: streams.After = None,
    last_event_id: streams.LastEventId = None,
) -> Response:
    """Events as a stream (`Accept: text/event-stream`, the default) or as a list."""
    since = last_event_id if last_event_id is not None else after or 0
    found = await run_in_threadpool(_events, sessions, run_id, since)
    if streams.wants_list(request, after):
        return JSONResponse(found.model_dump(mode="json"))
    return streams.answer(events.stream(sessions, run_id, since))


@router.post(
    "/runs/{run_id}:cancel",
    status_code=202,
    operation_id="cancel_run",
    summary="Stop a run",
    responses=docs.problems("forbidden", "invalid_request", "not_found", "run_already_ended"),
)
def cancel_run(
    run_id: schemas.RunId, _caller: deps.Researcher, session: deps.DbSession
) -> schemas.Run:
    """Ask a run of any kind to end; asked again, the same answer."""
    row = runs.request_cancel(session, run_id)
    session.commit()
    return views.run(row)


def _check(session: Session, ask: schemas.RunCreate) -> db.ModelVersion | None:
    """Refuse what could only fail later; the parent's version if there is one."""
    datasets.get(session, ask.dataset_id)
    trainable.require(session, ask.dataset_id, ask.recipe)
    registry.check_name(session, ask.model_name, _made_by(ask.recipe))
    if ask.parent is None:
        return None
    parent = _parent(session, ask.parent)
    _check_parent(parent, ask)
    return parent


def _made_by(recipe: AnyRecipe) -> str:
    """The kind of model that comes of a recipe."""
    if isinstance(recipe, FinetuneRecipe):
        return "segmenter"
    return "classifier" if isinstance(recipe, AnyClassify) else "encoder"


def _parent(session: Session, ref: str) -> db.ModelVersion:
    """The version that a model reference or a run id means."""
    if not _RUN_ID.fullmatch(ref):
        return registry.resolve(session, ref)
    run = runs.get(session, ref)
    version = registry.of_run(session, ref)
    if version is None:
        raise ServiceError(
            409,
            "not_ready",
            f"the parent run has registered no model; its state is {run.state}",
            extra={"state": run.state},
        )
    return version


def _check_parent(parent: db.ModelVersion, ask: schemas.RunCreate) -> None:
    require_kind(parent, "encoder")
    manifest = parent.manifest
    network, expected = manifest["recipe"]["network"], ask.recipe.network.model_dump(mode="json")
    if network != expected:
        raise ServiceError(
            422,
            "incompatible_parent",
            f"the parent is a {_described(network)}; the recipe's network is a "
            f"{_described(expected)}",
            extra={"found": network, "expected": expected},
        )
    if WEIGHTS not in manifest["files"]:
        raise ServiceError(
            422,
            "incompatible_parent",
            f"the parent's bundle has no {WEIGHTS} to start from",
            extra={"found": sorted(manifest["files"]), "expected": WEIGHTS},
        )


def require_kind(version: db.ModelVersion, kind: str) -> None:
    """Refuse a model of the wrong kind.

    Raises:
        ServiceError: 422 `wrong_model_kind`.
    """
    found = version.manifest["kind"]
    if found != kind:
        raise ServiceError(
            422,
            "wrong_model_kind",
            f"{version.model_name}/{version.version} is of kind {found}; {kind} is needed",
            extra={"found": found, "expected": kind},
        )


def _events(sessions: deps.Sessions, run_id: str, after: int) -> schemas.Events:
    with sessions() as session:
        runs.get(session, run_id)
        found = runs.events_after(session, run_id, after)
        return schemas.Events(events=tuple(events.as_schema(event) for event in found))


def _described(network: dict[str, Any]) -> str:
    """A network of a recipe in words: its kind, and each number by its name."""
    numbers = [f"{name} {value}" for name, value in network.items() if name != "kind"]
    return f"{network['kind']} of {', '.join(numbers)}"
