"""One project a session (docs/adr/0014): what it may see and where its rows go, in one place.

A session of `of_project` asks every SELECT, UPDATE and DELETE for its project, whoever wrote the
statement: the tables are listed here (`OWNED`, `OWNER`), and a table in no list fails a test. What
could slip through (text, statements on bare tables) is refused before it reaches the database, by
what it says (`refuse_unscoped`). So a router that forgets the project finds nothing of another's.

A session without a project is that of workers, upkeep and tools, which serve all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Executable, ExecutionContext, event, literal_column, select
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker, with_loader_criteria

from service.db.base import Base
from service.db.experiments import Experiment, ExperimentCell
from service.db.models import (
    AliasEvent,
    GoldenCase,
    Model,
    ModelAlias,
    ModelVersion,
    VersionCheck,
)
from service.db.projects import DEFAULT_PROJECT, Project
from service.db.scans import Dataset, DatasetItem, Upload, Volume
from service.db.vectors import Embedding
from service.db.work import Artifact, Batch, BatchItem, Run, RunAttempt, RunEvent

OWNED: tuple[type[Any], ...] = (
    Volume,
    Upload,
    Dataset,
    Run,
    Batch,
    Experiment,
    Model,
    ModelVersion,
    ModelAlias,
    AliasEvent,
    GoldenCase,
    VersionCheck,
)
"""Tables with a `project_id`."""
OWNER: dict[type[Any], tuple[str, type[Any]]] = {
    DatasetItem: ("dataset_id", Dataset),
    RunAttempt: ("run_id", Run),
    RunEvent: ("run_id", Run),
    Artifact: ("run_id", Run),
    Embedding: ("volume_id", Volume),
    BatchItem: ("batch_id", Batch),
    ExperimentCell: ("experiment_id", Experiment),
}
"""Tables whose rows belong to the project of the row that they name: by which column, where."""
Statement = TypeVar("Statement", bound=Executable)
_PROJECT = "project"
_EVERYWHERE = "every_project"
_NAMES: dict[str, str | None] = {
    Project.__tablename__: None,
    **{table.__tablename__: None for table in OWNED},
    **{table.__tablename__: column for table, (column, _) in OWNER.items()},
}
_MENTION = re.compile(
    rf"(?:\b(?:FROM|JOIN|UPDATE)|,) (?:ONLY )?\"?({'|'.join(_NAMES)})\"?(?: AS (\w+))?(?=[\s,)]|$)"
)


class UnscopedError(RuntimeError):
    """A statement of a project's session that does not ask for the project; it did not run."""


def of_project(sessions: sessionmaker[Session], project_id: str) -> sessionmaker[Session]:
    """Sessions like these that see one project, and whose new rows are the project's."""
    return sessionmaker(class_=sessions.class_, **sessions.kw, info={_PROJECT: project_id})


def project_of(session: Session) -> str:
    """The project whose rows a session makes."""
    return cast(str, session.info.get(_PROJECT, DEFAULT_PROJECT))


@contextmanager
def within(session: Session, project_id: str) -> Iterator[None]:
    """Let a session without a project be that of one for a while."""
    before = session.info.get(_PROJECT)
    session.info[_PROJECT] = project_id
    try:
        yield
    finally:
        if before is None:
            del session.info[_PROJECT]
        else:
            session.info[_PROJECT] = before


def everywhere(statement: Statement) -> Statement:
    """A statement that sees every project's rows, whosever the session is.

    For what the projects share (files by digest, names of projects): its result must not be shown.
    """
    return statement.execution_options(**{_EVERYWHERE: True})


class ScopedSession(Session):
    """A session that may be one project's."""


@event.listens_for(ScopedSession, "do_orm_execute")
def _ask_for_the_project(state: ORMExecuteState) -> None:
    project_id = state.session.info.get(_PROJECT)
    if project_id is None or state.execution_options.get(_EVERYWHERE) or state.is_column_load:
        return
    if state.is_orm_statement and not state.is_insert:
        state.statement = state.statement.options(*_criteria(project_id))
    state.update_execution_options(**{_PROJECT: project_id})


@event.listens_for(ScopedSession, "before_flush")
def _own_new_rows(session: Session, _context: Any, _instances: Any) -> None:
    for row in session.new:
        if isinstance(row, OWNED):
            if row.project_id is None:
                row.project_id = project_of(session)
            elif row.project_id != session.info.get(_PROJECT, row.project_id):
                raise UnscopedError(f"a new {type(row).__name__} of another project")


def refuse_unscoped(
    _connection: Connection,
    _cursor: Any,
    statement: str,
    _parameters: Any,
    context: ExecutionContext | None,
    _many: bool,
) -> None:
    """Before a statement runs (`before_cursor_execute`): a project's must ask for the project.

    Raises:
        UnscopedError: It reads or changes a table of projects and does not.
    """
    if context is not None and _PROJECT in context.execution_options:
        for found in _unscoped(statement):
            raise UnscopedError(f"a statement on {found} does not ask for the project")


@lru_cache(maxsize=4096)
def _unscoped(statement: str) -> tuple[str, ...]:
    """Tables of projects that a statement names without a condition on the project."""
    plain = " ".join(statement.split())
    found = []
    for mention in _MENTION.finditer(plain):
        table, alias = mention[1], mention[2] or mention[1]
        if (column := _NAMES[table]) is not None:
            asks = f"= {alias}.{column} AND owner.project_id = "
        else:
            asks = f"{alias}.{'id' if table == Project.__tablename__ else 'project_id'} = "
        if asks not in plain:
            found.append(table)
    return tuple(found)


@lru_cache(maxsize=1024)
def _criteria(project_id: str) -> tuple[Any, ...]:
    """What is added to every statement, for each table of projects that it names."""
    conditions: list[tuple[type[Base], Any]] = [(Project, Project.id == project_id)]
    conditions += [(table, table.project_id == project_id) for table in OWNED]
    for table, (column, owner) in OWNER.items():
        row = owner.__table__.alias("owner")
        is_owned = (
            select(literal_column("1"))
            .select_from(row)
            .where(row.c.id == getattr(table, column), row.c.project_id == project_id)
            .exists()
        )
        conditions.append((table, is_owned))
    return tuple(
        with_loader_criteria(table, condition, include_aliases=True)
        for table, condition in conditions
    )
