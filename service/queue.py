"""Whose turn it is: which waiting run of a queue a worker takes, and where a run stands.

Order: highest priority; then the project with the fewest runs that are under way or began lately
(`WINDOW_S`); then the oldest. So one project's thousand runs do not starve another's one.

A run is taken only by a worker that it fits (`Able`), and only while its project has fewer under
way than it may (`Project.max_running`, else `max_running`). The choice is one SQL expression. It
asks the partial index `ix_run_waiting` for each project's first run (a loose index scan: a step a
project, not a run). On PostgreSQL claims of the same moment do not see one another: the claim
counts once more, for one claim of a project at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    CTE,
    BindParameter,
    ColumnElement,
    ScalarSelect,
    and_,
    bindparam,
    func,
    literal,
    or_,
    select,
    tuple_,
)
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from service.db import CLAIMABLE, HELD, Project, Run, RunState, UtcDateTime, db_now, everywhere

WINDOW_S = {"inference": 3600.0, "train": 86400.0}
"""How long a run that began counts against its project."""


@dataclass(frozen=True, slots=True)
class Able:
    """What a worker can do: its kind of device, and that device's memory in bytes.

    `kind` is `cpu`, `cuda`, or empty for a worker that takes whatever comes (tests, tools).
    """

    kind: str = ""
    memory_bytes: int = 0


ANYTHING = Able()


def unit(run: type[Run]) -> InstrumentedAttribute[str]:
    """Whom a run counts for: its project."""
    return run.project_id


@lru_cache(maxsize=64)
def turn(
    queue: str,
    *,
    able: Able = ANYTHING,
    max_running: int = 0,
    without: frozenset[str] = frozenset(),
) -> ScalarSelect[str]:
    """The id of the run whose turn it is, locked for the claim; no row where none waits.

    Another worker that claims at the same moment may hold that row (PostgreSQL): then this finds
    the project's next one of that priority, and nothing where it has none; the caller falls back on
    `any_turn`. Projects in `without` are passed by.
    """
    chosen = _project(queue, able, max_running, without)
    return _first(
        queue,
        able,
        unit(Run) == select(chosen.c.unit).scalar_subquery(),
        Run.priority == select(chosen.c.top).scalar_subquery(),
    )


@lru_cache(maxsize=64)
def any_turn(
    queue: str,
    *,
    able: Able = ANYTHING,
    max_running: int = 0,
    without: frozenset[str] = frozenset(),
) -> ScalarSelect[str]:
    """The best run that nobody else is about to claim, whosever it is: priority, then age."""
    held, limit = aliased(Run), limit_of(max_running)
    busy = (
        select(unit(held))
        .join(Project, Project.id == unit(held))
        .where(held.queue == queue, is_held(held))
        .group_by(unit(held), Project.max_running)
        .having(and_(limit > 0, func.count() >= limit))
    )
    return _first(queue, able, unit(Run).not_in(busy), _is_outside(unit(Run), without))


def _is_outside(
    project: InstrumentedAttribute[str] | ColumnElement[str], without: frozenset[str]
) -> ColumnElement[bool]:
    return project.not_in(sorted(without)) if without else literal(True)


def is_waiting(run: type[Run], queue: str) -> ColumnElement[bool]:
    """Whether a run waits in a queue."""
    return and_(run.queue == queue, is_open(run))


def is_open(run: type[Run]) -> ColumnElement[bool]:
    """Whether nobody holds a run that is to be done; the partial indexes spell it like this."""
    return and_(run.state.in_(_spelled(CLAIMABLE)), run.cancel_requested_at.is_(None))


def is_held(run: type[Run]) -> ColumnElement[bool]:
    """Whether a worker holds a run; written so that the partial index `ix_run_held` serves it."""
    return run.state.in_(_spelled(HELD))


def _spelled(states: Collection[RunState]) -> BindParameter[str]:
    """Written out in the statement: a partial index serves only a condition that spells its own."""
    values = sorted(state.value for state in states)
    return bindparam(None, values, expanding=True, literal_execute=True)


def limit_of(max_running: int) -> ColumnElement[int]:
    """How many of a project's runs may be under way in a queue; 0 is no limit."""
    return func.coalesce(Project.max_running, max_running)


def fits(run: type[Run], able: Able) -> ColumnElement[bool]:
    """Whether a worker that is able to so much can do the run."""
    if not able.kind:
        return literal(True)  # SQL's true
    return and_(run.needs_device.in_(["", able.kind]), run.needs_memory_bytes <= able.memory_bytes)


def position(session: Session, run: Run) -> int | None:
    """How many claims it takes until a waiting run is claimed, if nothing new comes; from 1.

    None for a run that does not wait. It counts every worker as able to do every run, and the runs
    of every project, whosever the session is: the number says how long the queue is and no more.

    Each project's runs of one priority are taken in turns `share + 1`, `share + 2`, ...: so counts
    say how many come before, and of each project at most one run shares this run's turn and has to
    be looked at.
    """
    if run.state not in CLAIMABLE:
        return None
    own, created = run.project_id, (run.created_at, run.id)
    higher, equal, shares = _waiting_counts(session, run)
    made = tuple_(literal(run.created_at, UtcDateTime()), run.id)
    is_before = tuple_(Run.created_at, Run.id) < made
    older = (is_waiting(Run, run.queue), unit(Run) == own, Run.priority == run.priority, is_before)
    before_mine = session.scalars(everywhere(select(func.count()).where(*older))).one()
    turn = shares[own] + higher[own] + before_mine
    ahead = higher.total() + before_mine
    for other in equal.keys() - {own}:
        earlier = turn - shares[other] - higher[other]
        ahead += min(max(earlier, 0), equal[other])
        if 0 <= earlier < equal[other]:
            made_at = _nth(session, run, other, earlier)
            ahead += made_at is not None and made_at < created
    return ahead + 1


def _waiting_counts(session: Session, run: Run) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """By project: waiting runs of a higher priority, of the same, and what counts against them."""
    waiting = (
        select(unit(Run), Run.priority, func.count())
        .where(is_waiting(Run, run.queue), Run.priority >= run.priority)
        .group_by(unit(Run), Run.priority)
    )
    higher: Counter[str] = Counter()
    equal: Counter[str] = Counter()
    for project, priority, count in session.execute(everywhere(waiting)):
        (higher if priority > run.priority else equal)[project] += count
    shares: Counter[str] = Counter()
    for condition in _counts(Run, run.queue):  # apart: each has an index of its own
        counted = select(unit(Run), func.count()).where(Run.queue == run.queue, condition)
        shares.update(dict(session.execute(everywhere(counted.group_by(unit(Run)))).all()))
    return higher, equal, shares


def _nth(session: Session, run: Run, project: str, number: int) -> tuple[datetime, str] | None:
    """When the project's waiting run of that number (from 0) and the run's priority was made.

    None where it waits no longer: PostgreSQL shows each statement what was committed before it, so
    it may have been claimed since it was counted.
    """
    where = (is_waiting(Run, run.queue), unit(Run) == project, Run.priority == run.priority)
    order = (Run.created_at, Run.id)
    found = select(*order).where(*where).order_by(*order).offset(number).limit(1)
    row = session.execute(everywhere(found)).one_or_none()
    return None if row is None else (row[0], row[1])


def _first(queue: str, able: Able, *where: ColumnElement[bool]) -> ScalarSelect[str]:
    return (
        select(Run.id)
        .where(is_waiting(Run, queue), fits(Run, able), *where)
        .order_by(Run.priority.desc(), Run.created_at, Run.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


def _project(queue: str, able: Able, max_running: int, without: frozenset[str]) -> CTE:
    """Whose turn it is (`unit`), and the highest priority of a run of theirs (`top`)."""
    projects = _projects(queue)
    waiting, first, held, recent = aliased(Run), aliased(Run), aliased(Run), aliased(Run)

    def of_project(value: Any, run: type[Run], *where: ColumnElement[bool]) -> ScalarSelect[Any]:
        found = select(value).where(
            is_waiting(run, queue), fits(run, able), unit(run) == projects.c.unit, *where
        )
        return found.correlate(projects).scalar_subquery()

    top = of_project(func.max(waiting.priority), waiting)
    oldest = of_project(func.min(first.created_at), first, first.priority == top)

    def count(run: type[Run], condition: ColumnElement[bool]) -> ScalarSelect[int]:
        where = (run.queue == queue, unit(run) == projects.c.unit, condition)
        mine = select(func.count()).select_from(run).where(*where)
        return mine.correlate(projects).scalar_subquery()

    under_way = count(held, _counts(held, queue)[0])
    began = count(recent, _counts(recent, queue)[1])
    limit = limit_of(max_running)
    statement = (
        select(projects.c.unit, top.label("top"))
        .join(Project, Project.id == projects.c.unit)
        .where(
            top.is_not(None),
            or_(limit == 0, under_way < limit),
            _is_outside(projects.c.unit, without),
        )
    )
    return statement.order_by(top.desc(), under_way + began, oldest).limit(1).cte("chosen")


def _projects(queue: str) -> Any:
    """Each project that has a run waiting: one index lookup each, however many it has."""
    first, later = aliased(Run), aliased(Run)
    projects = (
        select(func.min(unit(first)).label("unit"))
        .where(is_waiting(first, queue))
        .cte("waiting_project", recursive=True)
    )
    following = (
        select(func.min(unit(later)))
        .where(is_waiting(later, queue), unit(later) > projects.c.unit)
        .correlate(projects)
        .scalar_subquery()
    )
    return projects.union_all(select(following).where(projects.c.unit.is_not(None)))


def _counts(run: type[Run], queue: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """What counts against a project: runs under way, and other runs that began lately."""
    # As a subquery, so that PostgreSQL takes the clock once and an index serves the comparison.
    since = select(db_now(-WINDOW_S[queue])).scalar_subquery()
    return is_held(run), and_(run.state.not_in(HELD), run.started_at > since)
