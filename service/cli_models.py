"""The commands of `pcrl` about models that go live, models from elsewhere, and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from service.cli_client import (
    DEFAULT_URL,
    Secret,
    Url,
    console,
    fail,
    run_progress,
    talk,
    upload_progress,
)

model_app = typer.Typer(help="Models: import, roll back, look back, check.", no_args_is_help=True)
batch_app = typer.Typer(help="One model over a whole dataset.", no_args_is_help=True)


def add_groups(app: typer.Typer) -> None:
    """Add `pcrl model ...` and `pcrl batch ...` to `app`."""
    app.add_typer(model_app, name="model")
    app.add_typer(batch_app, name="batch")


@model_app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="Zip or tar of a bundle.", exists=True)],
    name: Annotated[str, typer.Option(help="The model that it becomes a version of.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Take in a model from elsewhere; prints the version."""
    with talk(url, token) as client:
        with upload_progress(file) as advance:
            run = client.import_model(file, name, wait=False, on_progress=advance)
        with run_progress("import") as show:
            run = client.wait(run.id, show)
        if run.model is None:
            fail(f"{run.error.code}: {run.error.detail}" if run.error else run.state)
        console.print(f"models:/{run.model.name}/{run.model.version}", highlight=False)


@model_app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    alias: Annotated[str, typer.Argument(help="The alias, for example champion.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Point an alias at the version before."""
    with talk(url, token) as client:
        row = client.rollback(model, alias)
        console.print(f"models:/{model}@{alias} is version {row.version}")


@model_app.command()
def history(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    alias: Annotated[str, typer.Argument(help="The alias, for example champion.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """List every move of an alias, newest first."""
    with talk(url, token) as client:
        table = Table("when", "version", "cause", "by", "against", "reason")
        for move in client.alias_history(model, alias):
            table.add_row(
                move.created_at.isoformat(timespec="seconds"),
                "" if move.version is None else str(move.version),
                move.cause,
                move.set_by,
                ", ".join(move.unmet),
                move.override_reason or "",
            )
        console.print(table)


@model_app.command()
def check(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[int, typer.Argument(help="The version.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Hold a version to the model's golden cases."""
    with talk(url, token) as client:
        run = client.check_version(model, version)
        if run.result is None:
            fail(f"{run.error.code}: {run.error.detail}" if run.error else run.state)
        for case in run.result["cases"]:
            scored = case.get("dice", case.get("cosine"))
            console.print(f"{case['name']}: {'passed' if case['passed'] else 'missed'} {scored}")
        if not run.result["passed"]:
            fail("the version does not reproduce every golden case")


@batch_app.command()
def start(
    dataset: Annotated[str, typer.Argument(help="Dataset id.")],
    model: Annotated[str, typer.Option(help="models:/name@alias, name/version or name.")],
    kind: Annotated[Literal["segment", "embed"], typer.Option(help="What to do.")] = "segment",
    wait: Annotated[bool, typer.Option(help="Watch until it ends.")] = True,
    table: Annotated[Path | None, typer.Option(help="Where to put the table (.csv).")] = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Run a model on every scan of a dataset."""
    with talk(url, token) as client:
        batch = client.create_batch(dataset, model, kind)
        console.print(batch.id, highlight=False)
        if not wait:
            return
        batch = client.wait_batch(batch.id)
        if table is not None:
            client.download_batch_table(batch.id, table)
        if batch.state != "succeeded":
            fail(f"{batch.state}: {dict(batch.counts)}")


@batch_app.command()
def show(
    batch_id: Annotated[str, typer.Argument(help="The batch.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Show how far a batch is, and its failed scans."""
    with talk(url, token) as client:
        console.print_json(client.batch(batch_id).model_dump_json())
        for item in client.batch_items(batch_id, state="failed"):
            code = item.error.code if item.error else ""
            console.print(f"{item.volume_id} {item.run_id} {code}", highlight=False)


@batch_app.command()
def cancel(
    batch_id: Annotated[str, typer.Argument(help="The batch.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Stop a batch."""
    with talk(url, token) as client:
        console.print(client.cancel_batch(batch_id).state)


@batch_app.command()
def retry(
    batch_id: Annotated[str, typer.Argument(help="The batch.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Do the failed and canceled scans of a batch again."""
    with talk(url, token) as client:
        console.print(client.retry_batch(batch_id).state)


@batch_app.command("table")
def save_table(
    batch_id: Annotated[str, typer.Argument(help="The batch, ended.")],
    path: Annotated[Path, typer.Argument(help="Where to put the table (.csv).")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Save what came of every scan as CSV."""
    with talk(url, token) as client:
        client.download_batch_table(batch_id, path)
