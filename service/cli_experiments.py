"""The commands of `pcrl experiment`: what a pretraining buys, as one request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from service.cli_client import DEFAULT_URL, Secret, Url, console, fail, talk

if TYPE_CHECKING:
    from service import schemas
    from service.client import Client

REPORT_FILES: dict[str, Literal["json", "markdown", "svg", "csv"]] = {
    "report.md": "markdown",
    "report.json": "json",
    "curve.svg": "svg",
    "cases.csv": "csv",
}

experiment_app = typer.Typer(
    help="Compare pretrainings by what is fine-tuned from them.", no_args_is_help=True
)
Id = Annotated[str, typer.Argument(help="The experiment.")]


def add_group(app: typer.Typer) -> None:
    """Add `pcrl experiment ...` to `app`."""
    app.add_typer(experiment_app, name="experiment")


@experiment_app.command()
def create(
    plan: Annotated[
        Path, typer.Argument(help="JSON: methods, finetune, ratios, seeds.", exists=True)
    ],
    name: Annotated[str, typer.Option(help="A name for people.")],
    source: Annotated[str, typer.Option(help="Dataset to pretrain on.")],
    target: Annotated[str, typer.Option(help="Labelled dataset with a test split.")],
    wait: Annotated[bool, typer.Option(help="Watch until it ends.")] = False,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Plan an experiment; prints its id."""
    with talk(url, token) as client:
        made = client.create_experiment(name, source, target, _json(plan))
        console.print(made.id, highlight=False)
        if wait:
            _follow(client, made.id)


@experiment_app.command("list")
def list_all(url: Url = DEFAULT_URL, token: Secret = "") -> None:
    """List experiments."""
    with talk(url, token) as client:
        table = Table("experiment", "name", "state", "done", "trainings")
        for one in client.experiments():
            done = f"{one.fraction:.0%}"
            table.add_row(one.id, one.name, one.state, done, str(one.num_trainings))
        console.print(table)


@experiment_app.command()
def show(experiment_id: Id, url: Url = DEFAULT_URL, token: Secret = "") -> None:
    """Show every training of an experiment."""
    with talk(url, token) as client:
        table = Table("training", "state", "progress", "run", "error")
        for cell in client.experiment_trainings(experiment_id):
            done = f"{cell.progress.fraction or 0:.0%}" if cell.progress else ""
            code = cell.error.code if cell.error else ""
            table.add_row(cell.key, cell.state, done, cell.run_id or "", code)
        console.print(table)


@experiment_app.command("wait")
def wait_for(experiment_id: Id, url: Url = DEFAULT_URL, token: Secret = "") -> None:
    """Watch an experiment until it ends."""
    with talk(url, token) as client:
        _follow(client, experiment_id)


@experiment_app.command()
def extend(
    experiment_id: Id,
    methods: Annotated[Path | None, typer.Option(help="JSON list of more methods.")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="A further ratio; may be repeated.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="A further seed; may be repeated.")] = None,
    retry: Annotated[bool, typer.Option(help="Do what failed or was canceled again.")] = False,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Add seeds, ratios or methods; what is done stays."""
    more = {
        "methods": _json(methods) if methods is not None else [],
        "ratios": ratio or [],
        "seeds": seed or [],
        "retry": retry,
    }
    with talk(url, token) as client:
        made = client.extend_experiment(experiment_id, more)
        console.print(f"{made.num_trainings} trainings, {made.fraction:.0%} done")


@experiment_app.command()
def cancel(experiment_id: Id, url: Url = DEFAULT_URL, token: Secret = "") -> None:
    """Stop an experiment; what is done stays."""
    with talk(url, token) as client:
        console.print(client.cancel_experiment(experiment_id).state)


@experiment_app.command()
def report(
    experiment_id: Id,
    folder: Annotated[Path, typer.Argument(help="Where to put the report's files.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Save the report so far: report.md, report.json, curve.svg and cases.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    with talk(url, token) as client:
        for name, form in REPORT_FILES.items():
            client.experiment_report(experiment_id, folder / name, format=form)
        console.print(str(folder / "report.md"), highlight=False)


def _follow(client: Client, experiment_id: str) -> None:
    with Progress(TextColumn("{task.description}"), BarColumn(), console=console) as bar:
        task = bar.add_task("trainings", total=1.0)

        def show_it(now: schemas.ExperimentProgress) -> None:
            told = ", ".join(f"{count} {state}" for state, count in sorted(now.counts.items()))
            stage = f"{now.stage}: " if now.stage is not None else ""
            begun = sum(one.progress.fraction or 0.0 for one in now.running if one.progress)
            done = (now.num_ended + begun) / max(1, now.num_trainings)
            bar.update(task, completed=done, description=f"{stage}{told}")

        ended = client.wait_experiment(experiment_id, show_it)
    if ended.state != "succeeded":
        fail(f"{ended.state}: pcrl experiment show {experiment_id} says why")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        fail(f"{path.name} is no JSON: {error}")
