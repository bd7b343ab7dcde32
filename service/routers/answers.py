"""Queueing a run and answering for it: 202 at once, or 200 when it ended within `Prefer: wait`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Header
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service import celery_app, db, events, quota, schemas
from service.auth import Principal
from service.idempotency import Answer
from service.routers import deps
from service.settings import Settings

RETRY_AFTER_S = {"train": 5, "inference": 1}

PreferOf = Annotated[
    str | None,
    Header(
        alias="Prefer",
        max_length=200,
        description="`wait=N` (RFC 7240): answer when the run has ended, after N seconds at most.",
    ),
]
View = Callable[[db.Run], schemas.Answer]


def accepted(run: db.Run, collection: str, view: View) -> Answer:
    """202 for a run that waits or goes on."""
    headers = {
        "Location": f"{deps.PREFIX}/{collection}/{run.id}",
        "Retry-After": str(RETRY_AFTER_S[run.queue]),
    }
    return Answer(202, headers, view(run).model_dump(mode="json"))


async def queue(
    once: deps.Once,
    caller: Principal,
    settings: Settings,
    work: deps.Work,
    *,
    view: View,
    prefer: str | None,
) -> JSONResponse:
    """Create a run, ring for it after the commit, and wait for it if the caller prefers.

    Args:
        once: The request's claim to be answered once.
        caller: Who asks.
        settings: For the broker and for the longest wait.
        work: Creates the run.
        view: How the run is shown when it has ended.
        prefer: The `Prefer` header.
    """

    def within_quota(session: Session) -> Answer:
        quota.check_runs(session, caller.project_id, settings)
        return work(session)

    answer, is_new = await run_in_threadpool(once.answer, caller, within_quota)
    run_id = str(answer.body["id"])
    if is_new:
        queue_name = db.QUEUE_OF[_kind_of(answer)]
        await run_in_threadpool(celery_app.ring, run_id, queue_name, settings=settings)
    wait_s = events.asked_wait_s(prefer)
    if wait_s is not None:
        granted_s = min(float(wait_s), settings.wait_max_s)
        ended = await events.wait_for_end(once.sessions, run_id, granted_s)
        if ended is not None:
            headers = {
                "Location": answer.headers["Location"],
                "Preference-Applied": f"wait={granted_s:g}",
            }
            body = view(ended).model_dump(mode="json")
            return deps.reply(Answer(200, headers, body), is_new=is_new)
    return deps.reply(answer, is_new=is_new)


def _kind_of(answer: Answer) -> db.RunKind:
    """The kind of the run in an answer; inference answers show none, their id does."""
    prefix = str(answer.body["id"]).partition("_")[0]
    if prefix == "run":
        return db.RunKind(answer.body["kind"])
    return next(kind for kind, its in db.ID_PREFIX_OF.items() if its == prefix)
