"""The commands of `pcrl` about projects; they need the token of an admin of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from service.cli_client import DEFAULT_URL, Secret, Url, console, fail, talk

if TYPE_CHECKING:
    from service.client import Client
    from service.schemas import Project

project_app = typer.Typer(help="Projects: make, look, rename, limit.", no_args_is_help=True)

Count = Annotated[
    int | None, typer.Option(min=-1, help="0 is no limit, -1 makes it the site's again.")
]
Named = Annotated[str, typer.Argument(help="Id or name of the project.")]


def add_group(app: typer.Typer) -> None:
    """Add `pcrl project ...` to `app`."""
    app.add_typer(project_app, name="project")


@project_app.command("list")
def list_projects(url: Url = DEFAULT_URL, token: Secret = "") -> None:
    """List projects and their limits."""
    with talk(url, token) as client:
        table = Table("id", "name", "max queued", "max running", "max stored bytes")
        for row in client.projects():
            limits = (row.max_queued, row.max_running, row.max_stored_bytes)
            table.add_row(
                row.id, row.name, *("site's" if one is None else str(one) for one in limits)
            )
        console.print(table)


@project_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name.")],
    *,
    max_queued: Count = None,
    max_running: Count = None,
    max_stored_bytes: Count = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Make a project; prints its id."""
    limits = _given(max_queued, max_running, max_stored_bytes)
    with talk(url, token) as client:
        console.print(client.create_project(name, **limits).id, highlight=False)


@project_app.command("set")
def set_project(
    project: Named,
    *,
    name: Annotated[str | None, typer.Option(help="Its new name.")] = None,
    max_queued: Count = None,
    max_running: Count = None,
    max_stored_bytes: Count = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Rename a project, or change its limits."""
    changes: dict[str, str | int | None] = {
        **_given(max_queued, max_running, max_stored_bytes),
        **({} if name is None else {"name": name}),
    }
    with talk(url, token) as client:
        row = client.change_project(_found(client, project).id, **changes)
        console.print(row.id, highlight=False)


def _given(
    max_queued: int | None, max_running: int | None, max_stored_bytes: int | None
) -> dict[str, int | None]:
    """The limits that were named; -1 as None."""
    asked = {
        "max_queued": max_queued,
        "max_running": max_running,
        "max_stored_bytes": max_stored_bytes,
    }
    return {
        key: None if value == -1 else value for key, value in asked.items() if value is not None
    }


def _found(client: Client, project: str) -> Project:
    for row in client.projects():
        if project in (row.id, row.name):
            return row
    fail("no project has this id or name")
