"""Projects: make, look, rename, limit. A token of one project sees that one."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from service import db, projects, schemas
from service.idempotency import Answer
from service.pagination import PageSize, PageToken, name_of, name_token_of
from service.routers import deps, docs

router = deps.router("projects")


@router.post(
    "/projects",
    status_code=201,
    operation_id="create_project",
    summary="Make a project",
    response_model=schemas.Project,
    responses=docs.problems(
        "forbidden",
        "invalid_request",
        "name_taken",
        "request_too_large",
        "idempotency_mismatch",
        "idempotency_in_flight",
    ),
)
def create_project(
    ask: schemas.ProjectCreate, caller: deps.SiteAdmin, once: deps.OnceOf
) -> JSONResponse:
    """Make a project, which owns nothing yet; its tokens are made by `pcrl token --project`."""

    def work(session: Session) -> Answer:
        given = ask.model_dump()
        row = projects.create(session, given.pop("name"), given)
        headers = {"Location": f"{deps.PREFIX}/projects/{row.id}"}
        return Answer(201, headers, _view(row).model_dump(mode="json"))

    answer, is_new = once.answer(caller, work)
    return deps.reply(answer, is_new=is_new)


@router.get(
    "/projects",
    operation_id="list_projects",
    summary="List projects by name",
    responses=docs.problems("invalid_request"),
)
def list_projects(
    _caller: deps.Viewer,
    session: deps.ProjectsSession,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> schemas.ProjectPage:
    """All projects, for an admin of all; else the token's."""
    rows = projects.listing(session, size=page_size + 1, after=name_of(page_token))
    page = rows[:page_size]
    token = name_token_of(page[-1].name) if len(rows) > page_size else None
    return schemas.ProjectPage(items=tuple(_view(row) for row in page), next_page_token=token)


@router.get(
    "/projects/{project_id}",
    operation_id="get_project",
    summary="Get a project",
    responses=docs.problems("invalid_request"),
)
def get_project(
    project_id: schemas.ProjectId, _caller: deps.Viewer, session: deps.ProjectsSession
) -> schemas.Project:
    """A project and its limits."""
    return _view(projects.get(session, project_id))


@router.patch(
    "/projects/{project_id}",
    operation_id="change_project",
    summary="Rename a project, or change its limits",
    responses=docs.problems("forbidden", "invalid_request", "name_taken", "request_too_large"),
)
def change_project(
    project_id: schemas.ProjectId,
    ask: schemas.ProjectChange,
    _caller: deps.SiteAdmin,
    session: deps.ProjectsSession,
) -> schemas.Project:
    """Change what is sent; null makes a limit the site's again. Runs that are under way go on."""
    limits = ask.model_dump(exclude_unset=True, exclude={"name"})
    row = projects.change(session, project_id, ask.name, limits)
    session.commit()
    return _view(row)


def _view(row: db.Project) -> schemas.Project:
    return schemas.Project(
        id=row.id,
        name=row.name,
        max_queued=row.max_queued,
        max_running=row.max_running,
        max_stored_bytes=row.max_stored_bytes,
        created_at=row.created_at,
    )
