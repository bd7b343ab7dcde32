"""The commands of `pcrl` about datasets: of uploaded volumes, or of a public data set's folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from imaging.datasets import READERS, LayoutError, Options, read_layout
from service.cli_client import DEFAULT_URL, Secret, Url, console, errors, fail, talk

if TYPE_CHECKING:
    from imaging.datasets.plan import Plan
    from service.client import Client
    from service.client.scans import Item
    from service.dataset_import import Sent

dataset_app = typer.Typer(help="Datasets: make, import.", no_args_is_help=True)


@dataset_app.command()
def create(
    name: Annotated[str, typer.Argument(help="A name for people.")],
    items: Annotated[
        list[str] | None, typer.Argument(help="Volume ids; `vol_image:vol_labels` where labelled.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="CSV of classified scans: volume_id, perhaps split, and a column a class with 1, "
            "0 or nothing.",
            exists=True,
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Make a dataset of uploaded scans, split by subject; prints its id."""
    pairs = [item.partition(":") for item in items or []]
    listed: list[Item] = [(image, labels or None) for image, _, labels in pairs]
    if classes is not None:
        listed += _classified(classes)
    with talk(url, token) as client:
        made = client.create_dataset(name, listed)
        console.print(made.id, highlight=False)


@dataset_app.command("import")
def import_folder(
    kind: Annotated[str, typer.Argument(help=f"Whose layout it has: {', '.join(READERS)}.")],
    folder: Annotated[Path, typer.Argument(help="Where the archives were unpacked to.")],
    name: Annotated[str | None, typer.Option(help="A name for people; else the kind.")] = None,
    channel: Annotated[str | None, typer.Option(help="The one to take of several.")] = None,
    skip_refused: Annotated[
        bool, typer.Option("--skip-refused", help="Make the dataset without scans not taken.")
    ] = False,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Upload a public data set and make a dataset of it; prints its id. Safe to repeat.

    Every file that is not used is counted with the reason. Patients are split as the data set says,
    else by share.
    """
    from service.dataset_import import make_dataset

    plan = _plan(kind, folder, Options(channel=channel))
    with talk(url, token) as client:
        sent = _send(client, plan)
        for one in sent.refused:
            errors.print(f"{one.case}: {one.code}: {one.detail}", highlight=False, soft_wrap=True)
        if sent.refused and not skip_refused:
            fail(f"{len(sent.refused)} scans were not taken; --skip-refused goes on without them")
        if not sent.items:
            fail("no scan was taken")
        made = make_dataset(client, name or kind, plan, sent)
        console.print(made.id, highlight=False)


def _classified(table: Path) -> list[Item]:
    """The rows of a table of classes."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        names = list(rows.fieldnames or ())
        if "volume_id" not in names:
            fail(f"{table.name} has no column volume_id")
        return [_classified_row(row, f"{table.name}, line {rows.line_num}") for row in rows]


def _classified_row(row: dict[str, str], where: str) -> Item:
    if None in row or None in row.values():
        fail(f"{where}: not as many cells as columns")
    volume_id, split = row.pop("volume_id"), row.pop("split", "")
    known = {"1": 1, "0": 0, "": None}
    if other := next((name for name, cell in row.items() if cell.strip() not in known), None):
        fail(f"{where}: {other} is neither 1 nor 0 nor empty")
    return volume_id, None, split or None, {name: known[cell.strip()] for name, cell in row.items()}


def _plan(kind: str, folder: Path, options: Options) -> Plan:
    from service.dataset_import import check_held

    if kind not in READERS:
        fail(f"no reader is called {kind}; there are {', '.join(READERS)}")
    try:
        plan = read_layout(kind, folder, options)
        lost = check_held(plan)
    except LayoutError as error:
        fail(f"{error.code}: {error.detail}")
    reasons = list(plan.explained.values())
    for reason in sorted(set(reasons)):
        errors.print(f"{reasons.count(reason)} files not used: {reason}", highlight=False)
    for note in (*plan.notes, *lost):
        errors.print(note, highlight=False, soft_wrap=True)
    return plan


def _send(client: Client, plan: Plan) -> Sent:
    from service.dataset_import import send

    with Progress(
        TextColumn("upload"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} scans"),
        TimeRemainingColumn(),
        console=errors,
    ) as progress:
        task = progress.add_task("upload", total=len(plan.cases))
        return send(client, plan, lambda done, _: progress.update(task, completed=done))
