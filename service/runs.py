"""The state machine of runs. Every change is one conditional UPDATE; every write carries the fence.

    queued ------claim-----> starting --started--> running --finish--> succeeded | failed
    interrupted --claim----> starting                 |
    starting | running ----request_cancel----> canceling --finish--> canceled (or as it ended)
    queued | interrupted --request_cancel----> canceled
    starting | running ----give_back, reap---> interrupted (canceling: canceled)

A claim raises the row's `fence`; whoever holds an older one (a worker that was frozen while its
run was taken back) can write nothing any more. `attempt` counts claims that were lost or crashed,
not those that were preempted. All times that decide anything are the database's own.

Who commits: `create` and `request_cancel` belong to a request, whose caller commits, then rings
(`celery_app.ring`). The steps of workers and of upkeep are one transaction each and commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    ScalarSelect,
    and_,
    case,
    func,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from service import embeddings, faults, registry
from service import queue as turns
from service.db import (
    CLAIMABLE,
    HELD,
    ID_PREFIX_OF,
    QUEUE_OF,
    TERMINAL,
    Artifact,
    Blob,
    Cursor,
    Page,
    Run,
    RunAttempt,
    RunEvent,
    RunKind,
    RunState,
    db_now,
    insert_if_absent,
    new_id,
    page,
)
from service.embeddings import NewEmbedding
from service.errors import ServiceError
from service.patience import patiently
from service.queue import ANYTHING, Able

Outcome = Literal[
    "done", "error", "oom", "crash", "canceled", "preempted", "lost", "stalled", "fenced"
]
FIRST_REMINDER_S = 5.0
REMINDER_S = 30.0
LATE_REMINDER_S = 300.0
"""Doorbells of a run that stays queued: after 5 s, every 30 s, and every 5 min once it is old, so
that a long training does not let thousands of messages pile up behind it."""


class Fenced(Exception):  # noqa: N818  # reads as what happened
    """The run is no longer this worker's: stop, and write nothing."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"run {run_id} is no longer held by this worker")


@dataclass(frozen=True, slots=True)
class Lease:
    """A claimed run: what to do, and the fence that every write must carry."""

    run_id: str
    fence: int
    attempt: int
    kind: RunKind
    spec: dict[str, Any]
    dataset_id: str | None
    volume_id: str | None
    worker: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class Beat:
    """Answer to a heartbeat."""

    alive: bool
    """False: the run was taken back or has ended; stop at once."""
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class NewArtifact:
    """A file of the run that lies in the store and is recorded when the run finishes."""

    name: str
    sha256: str
    size: int
    media_type: str


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A bundle in the store that becomes a model version when the run finishes."""

    name: str
    kind: str
    digest: str
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of a metric."""

    name: str
    step: int
    value: float


# The API's side. The caller commits.


def create(
    session: Session,
    *,
    kind: RunKind | str,
    spec: dict[str, Any],
    dataset_id: str | None = None,
    volume_id: str | None = None,
    priority: int = 0,
    needs: Able = ANYTHING,
    principal: str,
) -> Run:
    """Queue a run; the caller commits, then calls `celery_app.ring(run.id, run.queue)`.

    `needs` says which workers may take it.
    """
    kind = RunKind(kind)
    run = Run(
        id=new_id(ID_PREFIX_OF[kind]),
        kind=kind,
        state=RunState.QUEUED,
        queue=QUEUE_OF[kind],
        priority=priority,
        needs_device=needs.kind,
        needs_memory_bytes=needs.memory_bytes,
        spec=spec,
        dataset_id=dataset_id,
        volume_id=volume_id,
        publish_after=db_now(FIRST_REMINDER_S),
        created_by=principal,
    )
    session.add(run)
    session.flush()
    _state_event(session, run.id, RunState.QUEUED, run.attempt)
    return run


def get(session: Session, run_id: str, *, kinds: Sequence[str] | None = None) -> Run:
    """A run by id, as it is in the database now.

    Args:
        session: Database session.
        run_id: The run.
        kinds: Only these kinds exist for the caller (segmentations, for example).

    Raises:
        ServiceError: 404 `not_found`.
    """
    run = session.get(Run, run_id, populate_existing=True)
    if run is None or (kinds is not None and run.kind not in kinds):
        raise ServiceError(404, "not_found", "no run has this id")
    return run


def listing(
    session: Session,
    *,
    size: int = 50,
    after: Cursor | None = None,
    kinds: Sequence[str] | None = None,
    states: Sequence[str] | None = None,
    dataset_id: str | None = None,
    volume_id: str | None = None,
) -> Page[Run]:
    """Runs, newest first."""
    where: list[Any] = []
    if kinds is not None:
        where.append(Run.kind.in_(kinds))
    if states is not None:
        where.append(Run.state.in_(states))
    if dataset_id is not None:
        where.append(Run.dataset_id == dataset_id)
    if volume_id is not None:
        where.append(Run.volume_id == volume_id)
    return page(session, Run, *where, size=size, after=after)


def request_cancel(session: Session, run: Run | str) -> Run:
    """Ask a run to end: at once if nobody holds it, else with its worker's next heartbeat.

    Asked again while it is canceling, it changes nothing. The caller commits.

    Raises:
        ServiceError: 404 `not_found`; 409 `run_already_ended`.
    """
    run_id = run if isinstance(run, str) else run.id
    is_waiting = Run.state.in_(CLAIMABLE)
    canceled = session.scalars(
        update(Run)
        .where(Run.id == run_id, Run.state.not_in([*TERMINAL, RunState.CANCELING]))
        .values(
            state=case((is_waiting, RunState.CANCELED), else_=RunState.CANCELING),
            finished_at=case((is_waiting, db_now()), else_=None),
            publish_after=None,
            cancel_requested_at=db_now(),
        )
        .returning(Run),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if canceled is not None:
        _state_event(session, run_id, RunState(canceled.state), canceled.attempt)
        session.flush()
        return canceled
    current = get(session, run_id)
    if current.state in TERMINAL:
        raise ServiceError(
            409,
            "run_already_ended",
            f"the run has ended already; its state is {current.state}",
            extra={"state": current.state},
        )
    return current


def attempts(session: Session, run_id: str) -> Sequence[RunAttempt]:
    """Every claim of the run and how it ended, oldest first."""
    return session.scalars(
        select(RunAttempt).where(RunAttempt.run_id == run_id).order_by(RunAttempt.fence)
    ).all()


def artifacts(session: Session, run_id: str) -> Sequence[Artifact]:
    """The files that the run produced, by name."""
    return session.scalars(
        select(Artifact).where(Artifact.run_id == run_id).order_by(Artifact.name)
    ).all()


def artifact(session: Session, run_id: str, name: str) -> Artifact:
    """One file of the run.

    Raises:
        ServiceError: 404 `not_found`.
    """
    found = session.get(Artifact, (run_id, name))
    if found is None:
        raise ServiceError(404, "not_found", "the run has no such artifact")
    return found


def events_after(
    session: Session, run_id: str, seq: int = 0, *, limit: int = 500
) -> Sequence[RunEvent]:
    """What happened in the run after event `seq`, in order.

    Every writer updates the run's row first, so that for one run a later `seq` is never visible
    before an earlier one and a reader that resumes by `seq` misses nothing.
    """
    return session.scalars(
        select(RunEvent)
        .where(RunEvent.run_id == run_id, RunEvent.seq > seq)
        .order_by(RunEvent.seq)
        .limit(limit)
    ).all()


def metrics(
    session: Session, run_id: str, *, names: Sequence[str] | None = None
) -> list[MetricPoint]:
    """The run's metrics by name and step; a step done again after a resume replaces the first."""
    found: dict[tuple[str, int], float] = {}
    for event in session.scalars(
        select(RunEvent)
        .where(RunEvent.run_id == run_id, RunEvent.type == "metric")
        .order_by(RunEvent.seq)
    ):
        for name, value in event.data.get("values", {}).items():
            if names is None or name in names:
                found[name, int(event.data["step"])] = float(value)
    return [MetricPoint(name, step, value) for (name, step), value in sorted(found.items())]


# The worker's side. Each commits.


def claim(
    session: Session,
    run_id: str | None,
    queue: str,
    worker: str,
    *,
    lease_s: float = 30.0,
    able: Able = ANYTHING,
    max_running: int = 0,
    only: RunKind | None = None,
) -> Lease | None:
    """Take the run of a queue whose turn it is: priority, fair share, age (`service.queue`).

    A message may come never, late or several times; only one claim finds the row waiting.

    Args:
        session: Database session.
        run_id: What the doorbell said. A hint and no more: a better run goes first.
        queue: `train` or `inference`.
        worker: Who takes it.
        lease_s: How long it is held without a heartbeat.
        able: What the worker's device can do; a run that does not fit is left to others.
        max_running: A caller with so many runs under way waits; 0 is no limit.
        only: Take it if it is of this kind, else nothing: never a worse one past a better.

    Returns:
        The run, now starting; None if nothing waits that this worker may take.
    """
    choices = [turns.turn(queue, able=able, max_running=max_running)]
    if only is None:  # the fallback knows no fair share: it would pass a better run of another kind
        choices.append(turns.any_turn(queue, able=able, max_running=max_running))
    for best in choices:
        run = _claimed(session, best, queue, worker, lease_s=lease_s, only=only)
        if run is not None:
            break
    else:
        session.rollback()
        return None
    session.add(RunAttempt(run_id=run.id, fence=run.fence, worker=worker))
    _state_event(session, run.id, RunState.STARTING, run.attempt)
    lease = Lease(
        run_id=run.id,
        fence=run.fence,
        attempt=run.attempt,
        kind=RunKind(run.kind),
        spec=run.spec,
        dataset_id=run.dataset_id,
        volume_id=run.volume_id,
        worker=worker,
        lease_s=lease_s,
    )
    faults.point("claim.before_commit")
    session.commit()
    faults.point("claim.after_commit")
    return lease


def _claimed(
    session: Session,
    best: ScalarSelect[str],
    queue: str,
    worker: str,
    *,
    lease_s: float,
    only: RunKind | None,
) -> Run | None:
    return session.scalars(
        update(Run)
        .where(
            Run.id == best,
            turns.is_waiting(Run, queue),
            true() if only is None else Run.kind == only,
        )
        .values(
            state=RunState.STARTING,
            fence=Run.fence + 1,
            attempt=Run.attempt + 1,
            lease_owner=worker,
            lease_until=db_now(lease_s),
            suspect_at=None,
            publish_after=None,
            started_at=func.coalesce(Run.started_at, db_now()),
        )
        .returning(Run),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).one_or_none()


def started(session: Session, lease: Lease) -> None:
    """The work itself begins: starting -> running (a run that is canceling stays so).

    Raises:
        Fenced: The run is no longer ours.
    """
    state = _write(
        session,
        lease,
        state=case((Run.state == RunState.STARTING, RunState.RUNNING), else_=Run.state),
    )
    if state is RunState.RUNNING:
        _state_event(session, lease.run_id, state, lease.attempt)
    session.commit()
    faults.point("started.after_commit")


def heartbeat(session: Session, lease: Lease) -> Beat:
    """Keep the lease, and learn whether to stop."""
    row = session.execute(
        update(Run)
        .where(_is_ours(lease))
        .values(lease_until=db_now(lease.lease_s), suspect_at=None)
        .returning(Run.cancel_requested_at),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    faults.point("heartbeat.before_commit")
    session.commit()
    return Beat(alive=row is not None, cancel_requested=row is not None and row[0] is not None)


def record(
    session: Session,
    lease: Lease,
    type: Literal["progress", "metric", "log"],
    data: dict[str, Any],
) -> None:
    """Append an event; a `progress` event also becomes the run's progress.

    Args:
        session: Database session.
        lease: The claim under which this is written.
        type: `progress` {stage, step, total, fraction, eta_s}; `metric` {step, values: {name:
            value}}; `log` {level, message}.
        data: The event, JSON-able, without NaN.

    Raises:
        Fenced: The run is no longer ours; nothing was written.
    """
    change: dict[str, Any] = {"progress": data} if type == "progress" else {"fence": Run.fence}
    _write(session, lease, **change)
    session.add(RunEvent(run_id=lease.run_id, type=type, data=data))
    faults.point("record.before_commit")
    session.commit()
    faults.point("record.after_commit")


def finish(
    session: Session,
    lease: Lease,
    state: RunState,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    outcome: Outcome,
    exit_code: int | None = None,
    artifacts: Sequence[NewArtifact] = (),
    register: NewVersion | None = None,
    embedding: NewEmbedding | None = None,
) -> None:
    """End a run for good: its state, result, files and model version in one transaction.

    Args:
        session: Database session.
        lease: The claim under which this is written.
        state: `succeeded`, `failed`, or `canceled` (only if that was requested).
        result: What the run gives (JSON-able).
        error: `{code, detail}` of a failed run.
        outcome: How the attempt ended.
        exit_code: Of the child process.
        artifacts: Files in the store that now belong to the run.
        register: The bundle that becomes a model version; its `{name, version}` is added to
            the result as `model`.
        embedding: The vector of the run's volume, to be found by a search.

    Raises:
        Fenced: The run is no longer ours; nothing was written.
        ServiceError: The registry refuses; nothing was written.
    """
    if state not in TERMINAL:
        raise ValueError(f"{state} is not an end")

    def write() -> None:
        _finish(
            session,
            lease,
            state,
            result=result,
            error=error,
            outcome=outcome,
            exit_code=exit_code,
            artifacts=artifacts,
            register=register,
            embedding=embedding,
        )

    patiently(session, write, for_s=lease.lease_s)


def _finish(
    session: Session,
    lease: Lease,
    state: RunState,
    *,
    result: dict[str, Any] | None,
    error: dict[str, Any] | None,
    outcome: Outcome,
    exit_code: int | None,
    artifacts: Sequence[NewArtifact],
    register: NewVersion | None,
    embedding: NewEmbedding | None,
) -> None:
    try:
        if state is RunState.CANCELED:
            _write(session, lease, extra=Run.cancel_requested_at.is_not(None), **_end(state))
        else:
            _write(session, lease, **_end(state))
        for new in artifacts:
            _attach(session, lease, new)
        if embedding is not None:
            assert lease.volume_id is not None  # an embedding is of a volume
            embeddings.record(session, lease.run_id, lease.volume_id, embedding)
        if register is not None:
            version = registry.register(
                session,
                register.name,
                kind=register.kind,
                digest=register.digest,
                manifest=register.manifest,
                run_id=lease.run_id,
            )
            model = {"name": version.model_name, "version": version.version}
            result = {**(result or {}), "model": {**model, "digest": version.digest}}
        _write(session, lease, states=TERMINAL, result=result, error=error)
        detail = error["code"] if error is not None else None
        _end_attempt(
            session, lease.run_id, lease.fence, outcome, exit_code=exit_code, detail=detail
        )
        _state_event(session, lease.run_id, state, lease.attempt, error)
        faults.point("finish.before_commit")
        session.commit()
    except BaseException:
        session.rollback()
        raise
    faults.point("finish.after_commit")


def give_back(
    session: Session,
    lease: Lease,
    outcome: Outcome,
    *,
    exit_code: int | None = None,
    error: dict[str, Any] | None = None,
    max_attempts: int = 3,
) -> RunState:
    """End an attempt but not the run: it will resume by itself, here or on another worker.

    A preempted attempt does not count. Any other does: after `max_attempts` of them the run
    fails with `error`. A run that was asked to stop is canceled instead.

    Returns:
        `interrupted`, `failed` or `canceled`.

    Raises:
        Fenced: The run is no longer ours.
    """
    return patiently(
        session,
        lambda: _give_back(
            session,
            lease,
            outcome,
            exit_code=exit_code,
            error=error,
            max_attempts=max_attempts,
        ),
        for_s=lease.lease_s,
    )


def _give_back(
    session: Session,
    lease: Lease,
    outcome: Outcome,
    *,
    exit_code: int | None,
    error: dict[str, Any] | None,
    max_attempts: int,
) -> RunState:
    counts = outcome != "preempted"
    is_spent = counts and lease.attempt >= max_attempts
    after = RunState.FAILED if is_spent else RunState.INTERRUPTED
    next_state = case((Run.cancel_requested_at.is_not(None), RunState.CANCELED), else_=after)
    is_end = or_(Run.cancel_requested_at.is_not(None), literal(is_spent))
    state = _write(
        session,
        lease,
        state=next_state,
        attempt=Run.attempt - (0 if counts else 1),
        error=error if is_spent else None,
        finished_at=case((is_end, db_now()), else_=None),
        publish_after=case((is_end, None), else_=db_now()),
        lease_owner=None,
        lease_until=None,
        suspect_at=None,
    )
    detail = error["code"] if error is not None else None
    _end_attempt(session, lease.run_id, lease.fence, outcome, exit_code=exit_code, detail=detail)
    _state_event(
        session, lease.run_id, state, lease.attempt, error if state is RunState.FAILED else None
    )
    faults.point("give_back.before_commit")
    session.commit()
    faults.point("give_back.after_commit")
    return state


# Upkeep's side. Each commits, and is safe to run twice at once.


def reap(
    session: Session, *, suspect_s: float = 15.0, max_attempts: int = 3, lease_s: float = 30.0
) -> list[str]:
    """Take back runs whose worker is gone, in two sweeps.

    A lease that has run out makes a run suspect; one that is still out `suspect_s` later loses
    it. A live worker's heartbeat in between clears the suspicion, so a jump of the clock alone
    takes nothing away. A lease longer than any that is given (`lease_s`, twice) is out as well:
    the clock was set back, and a dead worker's run would wait for it to come again.

    Returns:
        Ids of the runs that were taken back: interrupted, canceled if that was requested, failed
        with `worker_lost` after `max_attempts`.
    """
    is_over = or_(Run.lease_until < db_now(), Run.lease_until > db_now(2 * lease_s))
    is_out = and_(Run.state.in_(HELD), is_over)
    is_confirmed = or_(Run.suspect_at < db_now(-suspect_s), Run.suspect_at > db_now(2 * lease_s))
    is_canceled = Run.cancel_requested_at.is_not(None)
    is_spent = Run.attempt >= max_attempts
    error = {
        "code": "worker_lost",
        "detail": f"the worker was lost {max_attempts} times while it worked on this run",
    }
    taken = session.scalars(
        update(Run)
        .where(is_out, is_confirmed)
        .values(
            state=case(
                (is_canceled, RunState.CANCELED),
                (is_spent, RunState.FAILED),
                else_=RunState.INTERRUPTED,
            ),
            finished_at=case((or_(is_canceled, is_spent), db_now()), else_=None),
            publish_after=case((or_(is_canceled, is_spent), None), else_=db_now()),
            lease_owner=None,
            lease_until=None,
            suspect_at=None,
        )
        .returning(Run),
        execution_options={"populate_existing": True, "synchronize_session": False},
    ).all()
    for run in taken:
        state = RunState(run.state)
        if state is RunState.FAILED:
            run.error = error
        _end_attempt(session, run.id, run.fence, "lost")
        _state_event(session, run.id, state, run.attempt, run.error)
    session.execute(
        update(Run).where(is_out, Run.suspect_at.is_(None)).values(suspect_at=db_now()),
        execution_options={"synchronize_session": False},
    )
    faults.point("reap.before_commit")
    session.commit()
    faults.point("reap.after_commit")
    return [run.id for run in taken]


def due(session: Session, *, limit: int = 50) -> list[tuple[str, str]]:
    """Waiting runs whose doorbell may have been lost, as (id, queue); ring for each of them.

    This makes the table the outbox: an accepted run is rung for until a worker takes it.
    """
    is_time = or_(  # the second: the clock was set back
        Run.publish_after <= db_now(), Run.publish_after > db_now(2 * LATE_REMINDER_S)
    )
    is_due = and_(Run.state.in_(CLAIMABLE), is_time)
    picked = (
        select(Run.id)
        .where(is_due)
        .order_by(Run.priority.desc(), Run.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = session.execute(
        update(Run)
        .where(Run.id.in_(select(picked.cte("picked").c.id)), is_due)
        .values(
            publish_after=case(
                (Run.created_at < db_now(-LATE_REMINDER_S), db_now(LATE_REMINDER_S)),
                else_=db_now(REMINDER_S),
            )
        )
        .returning(Run.id, Run.queue),
        execution_options={"synchronize_session": False},
    ).all()
    faults.point("due.before_commit")
    session.commit()
    faults.point("due.after_commit")
    return [(run_id, queue) for run_id, queue in rows]


def not_rung(session: Session, run_ids: Sequence[str]) -> None:
    """The broker did not take their messages: try again soon, not at the next reminder."""
    session.execute(
        update(Run)
        .where(Run.id.in_(run_ids), Run.state.in_(CLAIMABLE))
        .values(publish_after=db_now(FIRST_REMINDER_S)),
        execution_options={"synchronize_session": False},
    )
    session.commit()


def _is_ours(lease: Lease, states: frozenset[RunState] = HELD) -> Any:
    return and_(Run.id == lease.run_id, Run.fence == lease.fence, Run.state.in_(states))


def _write(
    session: Session,
    lease: Lease,
    *,
    states: frozenset[RunState] = HELD,
    extra: ColumnElement[bool] | None = None,
    **values: Any,
) -> RunState:
    """Change the run's row if it is still ours, and lock it until the commit."""
    state = session.execute(
        update(Run)
        .where(_is_ours(lease, states), true() if extra is None else extra)
        .values(**values)
        .returning(Run.state),
        execution_options={"synchronize_session": False},
    ).scalar_one_or_none()
    if state is None:
        session.rollback()
        raise Fenced(lease.run_id)
    return RunState(state)


def _end(state: RunState) -> dict[str, Any]:
    return {
        "state": state,
        "finished_at": db_now(),
        "lease_owner": None,
        "lease_until": None,
        "suspect_at": None,
        "publish_after": None,
    }


def _attach(session: Session, lease: Lease, new: NewArtifact) -> None:
    insert_if_absent(session, Blob, sha256=new.sha256, size_bytes=new.size)
    session.add(
        Artifact(
            run_id=lease.run_id,
            name=new.name,
            sha256=new.sha256,
            media_type=new.media_type,
            fence=lease.fence,
        )
    )


def _end_attempt(
    session: Session,
    run_id: str,
    fence: int,
    outcome: Outcome,
    *,
    exit_code: int | None = None,
    detail: str | None = None,
) -> None:
    session.execute(
        update(RunAttempt)
        .where(RunAttempt.run_id == run_id, RunAttempt.fence == fence)
        .values(ended_at=db_now(), outcome=outcome, exit_code=exit_code, detail=detail),
        execution_options={"synchronize_session": False},
    )


def _state_event(
    session: Session,
    run_id: str,
    state: RunState,
    attempt: int,
    error: dict[str, Any] | None = None,
) -> None:
    """Tell the listeners; the caller has changed the run's row in this transaction."""
    data: dict[str, Any] = {"state": state.value, "attempt": attempt}
    if error is not None:
        data["error"] = error
    session.add(RunEvent(run_id=run_id, type="state", data=data))
    session.flush()
