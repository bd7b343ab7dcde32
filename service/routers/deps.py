"""What routes ask for: the caller, a session, the store, and how a creating request is answered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from service import db, faults, idempotency
from service.auth import Principal, Role, authenticate, site_pseudonyms
from service.errors import ServiceError
from service.experiment_reports import Reports
from service.idempotency import Answer
from service.routers.strict import StrictRoute
from service.settings import Settings
from service.storage import Store

PREFIX = "/api/v1"

bearer = HTTPBearer(auto_error=False, description="`pcrl token create NAME --role ROLE`")


def principal(role: Role) -> Callable[..., Principal]:
    """A FastAPI dependency: the caller, who has at least this role.

    Raises:
        ServiceError: 401 `not_authenticated`, 403 `forbidden`, 404 `not_found` (the project).
    """

    def require(caller: Annotated[Principal, Depends(identify)]) -> Principal:
        if not caller.role.covers(role):
            raise ServiceError(
                403, "forbidden", f"the token's role is {caller.role}; {role} is needed"
            )
        return caller

    return require


def identify(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    project: Annotated[
        str | None,
        Header(
            alias="PCRL-Project",
            description="Id or name of the project that the request acts in, for tokens of all "
            "projects; `default` unless told.",
        ),
    ] = None,
) -> Principal:
    """A FastAPI dependency: the caller, and the project that the request acts in.

    It uses a session of its own (`app.state.sessions`, a `sessionmaker`), so no transaction is
    open while the request's body streams.

    Raises:
        ServiceError: 401 `not_authenticated`, 404 `not_found` (the project).
    """
    with request.app.state.sessions() as session:
        return authenticate(session, credentials.credentials if credentials else None, project)


Viewer = Annotated[Principal, Depends(principal(Role.VIEWER))]
Annotator = Annotated[Principal, Depends(principal(Role.ANNOTATOR))]
Researcher = Annotated[Principal, Depends(principal(Role.RESEARCHER))]

Work = Callable[[Session], Answer]
"""Creates something in a session (which it does not commit) and says what to answer."""


def router(tag: str) -> APIRouter:
    """A router for one resource under `/api/v1`, with strict JSON bodies."""
    return APIRouter(prefix=PREFIX, tags=[tag], route_class=StrictRoute)


def _site_admin(caller: Annotated[Principal, Depends(identify)]) -> Principal:
    if not caller.all_projects:
        raise ServiceError(403, "forbidden", "an admin whose token is of all projects is needed")
    return caller


SiteAdmin = Annotated[Principal, Depends(_site_admin)]
Caller = Annotated[Principal, Depends(identify)]


def _every_session(request: Request) -> sessionmaker[Session]:
    return cast("sessionmaker[Session]", request.app.state.sessions)


EverySession = Annotated["sessionmaker[Session]", Depends(_every_session)]
"""Sessions of all projects: for health, which shows nothing of theirs, and for `SiteAdmin`."""


def _sessions(request: Request, caller: Caller) -> sessionmaker[Session]:
    known: dict[str, sessionmaker[Session]] = request.app.state.of_project
    if caller.project_id not in known:
        made = db.of_project(request.app.state.sessions, caller.project_id)
        known.setdefault(caller.project_id, made)
    return known[caller.project_id]


def _session(sessions: Annotated[sessionmaker[Session], Depends(_sessions)]) -> Iterator[Session]:
    with sessions() as session:
        yield session


def _projects_session(
    caller: Caller, every: EverySession, own: Annotated[sessionmaker[Session], Depends(_sessions)]
) -> Iterator[Session]:
    with (every if caller.all_projects else own)() as session:
        yield session


def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


def _reports(request: Request) -> Reports:
    return cast(Reports, request.app.state.reports)


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


Sessions = Annotated["sessionmaker[Session]", Depends(_sessions)]
"""Sessions of the project that the request acts in (`service.db.scope`)."""
DbSession = Annotated[Session, Depends(_session, scope="function")]
"""A session for the length of the route's function; a route that creates commits it itself."""
ProjectsSession = Annotated[Session, Depends(_projects_session, scope="function")]
"""A session that sees the projects that the caller may see."""
StoreOf = Annotated[Store, Depends(_store)]
ReportsOf = Annotated[Reports, Depends(_reports)]
SettingsOf = Annotated[Settings, Depends(_settings)]


@dataclass(frozen=True, slots=True)
class Once:
    """How a creating request is answered: once for each `Idempotency-Key`, or always anew."""

    sessions: sessionmaker[Session]
    route: str
    key: str | None
    request_sha256: str

    def answer(self, caller: Principal, work: Work) -> tuple[Answer, bool]:
        """Do the work and commit it, or find what was answered before.

        Blocking: call it from a thread.

        Returns:
            The answer, and whether it is new.
        """
        with self.sessions() as session:
            if self.key is None:
                answer = work(session)
                session.commit()
                return answer, True
            claim = idempotency.begin(
                session,
                principal=caller.id,
                route=self.route,
                key=self.key,
                request_sha256=self.request_sha256,
            )
            if isinstance(claim, Answer):
                return claim, False
            try:
                faults.point("create.after_key")
                answer = work(session)
                idempotency.record(session, claim, answer)
                faults.point("create.before_commit")
                session.commit()
            except BaseException:
                session.rollback()
                idempotency.abandon(session, claim)
                raise
            faults.point("create.after_commit")
            return answer, True


async def _key(
    store: StoreOf,
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[\x21-\x7e]{1,200}$",
            description="Any text of the caller's; a repeat with it gets the first answer.",
        ),
    ] = None,
) -> str | None:
    if idempotency_key is None:
        return None
    names = await run_in_threadpool(site_pseudonyms, store.data_dir)
    return names.text(idempotency_key)  # callers put names of patients into keys


KeyOf = Annotated[str | None, Depends(_key)]
"""The caller's `Idempotency-Key`, for a body that is not held in memory; else `OnceOf`."""


async def _once(request: Request, caller: Caller, sessions: Sessions, key: KeyOf) -> Once:
    digest = asked_sha256(caller, await request.body())
    return Once(sessions, f"{request.method} {request.url.path}", key, digest)


def asked_sha256(caller: Principal, body: bytes) -> str:
    """Digest of what is asked, and of where: in another project it is another request."""
    where = b"" if caller.project_id == db.DEFAULT_PROJECT else caller.project_id.encode()
    return hashlib.sha256(where + body).hexdigest()


OnceOf = Annotated[Once, Depends(_once)]


def reply(answer: Answer, *, is_new: bool = True) -> JSONResponse:
    """The response for an answer; `Idempotent-Replayed` marks a repeated one."""
    headers = answer.headers if is_new else {**answer.headers, "Idempotent-Replayed": "true"}
    return JSONResponse(answer.body, answer.status, headers=headers)
