"""What happens in an experiment, as server-sent events out of its rows and its runs' own events.

    training    a training changed its state
    progress    how far the whole is, at first and whenever it is another

Nothing is written for it. All runs' events are numbered by one sequence and may be committed in
any order (`db.settled_before`). So the `id` of a server-sent event is not its own number but one
below which nothing can come any more: whoever resumes after it misses nothing, and is told again
what was told too early to be sure; `data.id` shows which.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import anyio
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service import db, experiments, schemas
from service.events import MAX_POLL_S, PING, PING_S, POLL_S
from service.experiment_summary import Summary, stages


async def stream(
    sessions: sessionmaker[Session], experiment_id: str, after: int = 0
) -> AsyncIterator[bytes]:
    """Events after `after` as they come; ends when every training has ended, with `progress`.

    As a run's stream (`service.events`), each look is one short session on a worker thread.
    """
    poll_s, sent_at = POLL_S, time.monotonic()
    told: set[int] = set()
    shown: schemas.ExperimentProgress | None = None
    while True:
        found = await run_in_threadpool(read, sessions, experiment_id, after)
        fresh = [one for one in found.trainings if one.id not in told]
        for training in fresh:
            yield _encode("training", training, min(training.id, found.id))
        if is_new := found.progress != shown:
            yield _encode("progress", found.progress, found.id)
        if found.progress.state != "running":
            return
        told = {one.id for one in found.trainings if one.id > found.id}
        after, shown = found.id, found.progress
        if fresh or is_new:
            poll_s, sent_at = POLL_S, time.monotonic()
        elif time.monotonic() - sent_at >= PING_S:
            yield PING
            sent_at = time.monotonic()
        await anyio.sleep(poll_s)
        poll_s = min(poll_s * 1.5, MAX_POLL_S)


def read(
    sessions: sessionmaker[Session], experiment_id: str, after: int
) -> schemas.ExperimentEvents:
    """What happened after event `after`, and how far the experiment is.

    Raises:
        ServiceError: 404 `not_found`.
    """
    with sessions() as session:
        return look(session, experiment_id, after)


def look(session: Session, experiment_id: str, after: int) -> schemas.ExperimentEvents:
    """As `read`. The order matters: what ends an experiment was told before its end is."""
    horizon = db.settled_before(session)
    progress = _progress(session, experiments.get(session, experiment_id))
    rows = session.execute(
        select(db.RunEvent, db.ExperimentCell.key)
        .join(db.ExperimentCell, db.ExperimentCell.run_id == db.RunEvent.run_id)
        .where(
            db.ExperimentCell.experiment_id == experiment_id,
            db.RunEvent.type == "state",
            db.RunEvent.seq > after,
        )
        .order_by(db.RunEvent.seq)
    ).all()
    settled = [row.seq for row, _ in rows if horizon is None or row.created_at < horizon]
    return schemas.ExperimentEvents(
        id=max(settled, default=after),
        trainings=tuple(_training(row, key) for row, key in rows),
        progress=progress,
    )


def _progress(session: Session, experiment: db.Experiment) -> schemas.ExperimentProgress:
    whole, by_stage = stages(session, experiment)
    is_open = [name for name, one in by_stage.items() if one.num_ended < one.num_cells]
    return schemas.ExperimentProgress.model_validate(
        {
            "state": whole.state,
            "stage": next(iter(is_open), None),
            "stages": {name: _stage(one) for name, one in by_stage.items()},
            "num_trainings": whole.num_cells,
            "num_ended": whole.num_ended,
            "fraction": whole.num_ended / max(1, whole.num_cells),
            "counts": whole.counts,
            "running": _running(session, experiment.id),
            "finished_at": whole.finished_at if whole.state != "running" else None,
        }
    )


def _stage(one: Summary) -> schemas.StageProgress:
    return schemas.StageProgress(num_trainings=one.num_cells, num_ended=one.num_ended)


def _running(session: Session, experiment_id: str) -> tuple[schemas.RunningTraining, ...]:
    held = session.execute(
        select(db.ExperimentCell.key, db.Run)
        .join(db.Run, db.Run.id == db.ExperimentCell.run_id)
        .where(db.ExperimentCell.experiment_id == experiment_id, db.Run.state.in_(db.HELD))
        .order_by(db.ExperimentCell.key)
    )
    return tuple(
        schemas.RunningTraining.model_validate(
            {"key": key, "run_id": run.id, "state": run.state, "progress": run.progress}
        )
        for key, run in held
    )


def _training(event: db.RunEvent, key: str) -> schemas.ExperimentTraining:
    return schemas.ExperimentTraining.model_validate(
        {
            "id": event.seq,
            "key": key,
            "run_id": event.run_id,
            "state": event.data["state"],
            "attempt": event.data["attempt"],
            "error": event.data.get("error"),
            "created_at": event.created_at,
        }
    )


def _encode(name: str, data: BaseModel, mark: int) -> bytes:
    return format_sse_event(data_str=data.model_dump_json(), event=name, id=str(mark))
