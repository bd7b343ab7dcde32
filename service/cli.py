"""`pcrl`: the service's processes, and a client of its REST API.

Server commands (`up`, `api`, `worker`, `upkeep`, `migrate`, `token`, `doctor`) read `PCRL_`
settings; client commands (`upload`, `dataset`, `pretrain`, `finetune`, `runs`, `models`, `segment`,
`embed`) talk to `PCRL_URL` with `PCRL_TOKEN`.
"""

# The docstring is what `pcrl --help` prints. Every process of the service starts here, so a command
# loads for itself what the others have no use for.

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from service import (
    cli_client,
    cli_datasets,
    cli_experiments,
    cli_models,
    cli_projects,
    logs,
)
from service.process import stop_with_parent
from service.settings import Settings, get_settings

app = typer.Typer(
    name="pcrl",
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli_client.add_commands(app)
cli_experiments.add_group(app)
cli_models.add_groups(app)
app.add_typer(cli_datasets.dataset_app, name="dataset")
cli_projects.add_group(app)
console = Console()


@app.command()
def up(
    port: Annotated[int | None, typer.Option(help="Port of the API.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of everything.")] = None,
) -> None:
    """Start the embedded stack (API, workers, upkeep) until Ctrl-C."""
    from service.migrate import SchemaError
    from service.stack import Stack, StackError

    chosen = {"port": port, "data_dir": data_dir}
    settings = Settings(**{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    stack = Stack(settings)
    console.print(f"starting in {settings.data_dir} ...")
    try:
        with stack:
            if stack.admin_token is not None:
                console.print(
                    "The first admin token, shown this once:\n\n"
                    f"  export PCRL_TOKEN={stack.admin_token}\n",
                    soft_wrap=True,
                )
            console.print(f"ready at {stack.url}; logs in {stack.log_dir}; Ctrl-C stops everything")
            stack.supervise()
    except KeyboardInterrupt:
        console.print("stopped")
    except (StackError, SchemaError) as error:
        sys.exit(str(error))


@app.command()
def api() -> None:
    """Serve the REST API."""
    import uvicorn

    from service.app import create_app
    from service.auth import ensure_admin_token
    from service.db import connect, sessions

    settings = get_settings()
    logs.configure(settings)
    require_schema(settings)
    engine = connect(settings.database_url)
    with sessions(engine)() as session:
        token = ensure_admin_token(session, settings)
    engine.dispose()
    if token is not None:
        print(f"The first admin token, shown this once: {token}", flush=True)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level.lower(),
        log_config=None,  # ours, for uvicorn's own lines too
        access_log=False,  # the app writes its own, without query strings
        server_header=False,
        timeout_graceful_shutdown=30,
    )


@app.command()
def worker(
    queue: Annotated[Literal["inference", "train"], typer.Option(help="What it works on.")],
) -> None:
    """Work on a queue: `inference` (resident models) or `train` (one training at a time)."""
    from service.celery_app import worker_command
    from service.device import only

    settings = get_settings()
    require_schema(settings)
    try:
        only(settings.device, os.environ)
    except ValueError as error:
        sys.exit(str(error))
    command = worker_command(queue, settings=settings)
    os.execv(command[0], command)  # noqa: S606 - our own command; signals reach Celery itself


@app.command()
def upkeep() -> None:
    """Ring for waiting runs, take back lost ones, sweep what was left over."""
    from service.upkeep import run

    settings = get_settings()
    require_schema(settings)
    run(settings)


@app.command("migrate")
def migrate_command(
    revision: Annotated[str, typer.Option(help="Alembic revision.")] = "head",
) -> None:
    """Bring the database to this version's tables."""
    from service.migrate import SchemaError, upgrade

    try:
        upgrade(get_settings().database_url, revision)
    except SchemaError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(os.EX_CONFIG) from None
    print("the database is up to date")


@app.command()
def backup(
    target: Annotated[Path, typer.Argument(help="A new folder, or a new file that ends in .tar.")],
    secrets: Annotated[
        bool, typer.Option(help="With the key of the patients' pseudonyms, or without.")
    ] = True,
) -> None:
    """Back up database, store, checkpoints and secrets, while the service works."""
    from service.backup import backup as make
    from service.backup_form import BackupError
    from service.migrate import SchemaError
    from service.routers.health import product_version

    try:
        made = make(get_settings(), target, version=product_version(), with_secrets=secrets)
    except (BackupError, SchemaError) as error:
        sys.exit(str(error))
    found = made.manifest
    print(
        f"{made.path}: revision {found.revision}, {sum(found.rows.values())} rows, "
        f"{found.num_blobs} files ({found.blob_bytes / 1e9:.2f} GB), {len(found.bundles)} models"
        + ("" if found.has_secrets else "; without the key of the pseudonyms")
    )


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(help="What `pcrl backup` made.")],
    replace: Annotated[bool, typer.Option("--replace", help="Lose what is there.")] = False,
) -> None:
    """Check a backup by its digests and put it in place; the service must be stopped."""
    from service.backup_form import BackupError
    from service.migrate import SchemaError
    from service.restore import restore as put_in_place

    try:
        found = put_in_place(get_settings(), source, replace=replace)
    except (BackupError, SchemaError) as error:
        sys.exit(str(error))
    print(
        f"restored {sum(found.rows.values())} rows and {found.num_blobs} files of "
        f"{found.created_at:%Y-%m-%d %H:%M} UTC; start the service"
    )


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Whom or what it is for.")],
    role: Annotated[
        Literal["viewer", "annotator", "researcher", "admin"], typer.Option(help="What it may do.")
    ] = "researcher",
    days: Annotated[int | None, typer.Option(help="Valid for so many days; else for ever.")] = None,
    project: Annotated[
        str | None,
        typer.Option(
            help="Id or name; else all projects for an admin, the default one for others."
        ),
    ] = None,
) -> None:
    """Make an API token in this installation's database and print it, once."""
    from service import projects
    from service.auth import Role, create_token
    from service.db import connect, sessions
    from service.errors import ServiceError

    expires = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    with sessions(connect(get_settings().database_url))() as session:
        try:
            project_id = None if project is None else projects.find(session, project).id
        except ServiceError as error:
            sys.exit(error.detail)
        _, secret = create_token(session, name, Role(role), expires, project_id=project_id)
        session.commit()
    print(secret)


@app.command()
def doctor() -> None:
    """Print the settings in force and check what the service needs; status 1 where it lacks."""
    from service.doctor import examine

    settings = get_settings()
    table = Table("setting", "value", title="Settings")
    for name in Settings.model_fields:
        table.add_row(f"PCRL_{name.upper()}", settings.shown(name))
    console.print(table)
    findings = examine(settings)
    for finding in findings:
        mark = "[green]ok[/]" if finding.is_ok else "[red]no[/]"
        console.print(f"{mark}  {finding.what}: {finding.detail}", highlight=False)
    if not all(finding.is_ok for finding in findings):
        raise typer.Exit(1)


def require_schema(settings: Settings) -> None:
    """End the process on tables of an older or newer version (78), or without a database (75)."""
    from sqlalchemy.exc import OperationalError

    from service.db import connect
    from service.migrate import SchemaError, require_current

    engine = connect(settings.database_url)
    try:
        require_current(engine)
    except SchemaError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(os.EX_CONFIG) from None
    except OperationalError:  # a supervisor starts us again
        print("the database does not answer", file=sys.stderr)
        raise typer.Exit(os.EX_TEMPFAIL) from None
    finally:
        engine.dispose()


def main() -> None:
    """Entry point of `pcrl`."""
    if supervisor := os.environ.pop("PCRL_SUPERVISOR_PID", None):
        stop_with_parent(int(supervisor))
    try:
        app()
    except ValidationError as error:
        # A wrong setting: name it, never its value.
        for fault in error.errors(include_input=False, include_url=False):
            where = "_".join(str(part) for part in fault["loc"]).upper()
            print(f"PCRL_{where}: {fault['msg']}" if where else fault["msg"], file=sys.stderr)
        sys.exit(64)


if __name__ == "__main__":
    main()
