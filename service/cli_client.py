"""The commands of `pcrl` that use the REST API, as any other client would.

Every `pcrl` process loads these modules for their signatures, a worker too: the client and the
forms that it speaks in are loaded by the command that talks (`talk`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.formats import MaskFormat

if TYPE_CHECKING:
    from service.client import Client
    from service.schemas import Event, Run

console = Console()
errors = Console(stderr=True)

Url = Annotated[
    str, typer.Option("--url", envvar="PCRL_URL", help="Address of the service.", show_envvar=True)
]
Secret = Annotated[
    str, typer.Option("--token", envvar="PCRL_TOKEN", help="API token.", show_envvar=True)
]
DEFAULT_URL = "http://127.0.0.1:8000"


def add_commands(app: typer.Typer) -> None:
    """Add the client commands to `app`."""
    for command in (upload, pretrain, finetune, runs, cancel, models, alias, segment):
        app.command()(command)
    app.command()(cascade)
    app.command()(embed)
    app.command()(similar)


def upload(
    paths: Annotated[
        list[Path],
        typer.Argument(help="NIfTI, zip of DICOM; with --kind image_2d PNG, JPEG, DICOM."),
    ],
    kind: Annotated[
        Literal["image", "labels", "image_2d"], typer.Option(help="What the file is.")
    ] = "image",
    subject: Annotated[str | None, typer.Option(help="Pseudonym of the patient.")] = None,
    series_uid: Annotated[str | None, typer.Option(help="Which series of several.")] = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Upload scans, label volumes or 2D images; prints an id a line."""
    with talk(url, token) as client:
        for path in paths:
            with upload_progress(path) as advance:
                volume = client.upload(
                    path, kind=kind, subject=subject, series_uid=series_uid, on_progress=advance
                )
            console.print(volume.id, highlight=False)


def pretrain(
    recipe: Annotated[Path, typer.Argument(help="Recipe, JSON.")],
    dataset_id: Annotated[str, typer.Option("--dataset", help="Dataset id.")],
    model: Annotated[str, typer.Option(help="Name of the model that will come of it.")],
    wait: Annotated[bool, typer.Option(help="Watch until it ends.")] = True,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Pretrain an encoder on a dataset's scans."""
    with talk(url, token) as client:
        run = client.pretrain(dataset_id, _json(recipe), model_name=model)
        _follow(client, run, wait=wait)


def finetune(
    recipe: Annotated[Path, typer.Argument(help="Recipe, JSON.")],
    dataset_id: Annotated[str, typer.Option("--dataset", help="Dataset id.")],
    model: Annotated[str, typer.Option(help="Name of the model that will come of it.")],
    parent: Annotated[
        str | None, typer.Option(help="Encoder to start from: models:/name@alias, or a run id.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Watch until it ends.")] = True,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Fine-tune on a dataset's labels; a recipe of kind `classify` makes a classifier."""
    with talk(url, token) as client:
        run = client.finetune(dataset_id, _json(recipe), model_name=model, parent=parent)
        _follow(client, run, wait=wait)


def runs(
    run_id: Annotated[str | None, typer.Argument(help="One run; else the newest.")] = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """List runs, or show one."""
    with talk(url, token) as client:
        if run_id is not None:
            console.print_json(client.run(run_id).model_dump_json())
            return
        table = Table("run", "kind", "state", "progress", "model", "error")
        for run in client.runs():
            done = f"{run.progress.fraction or 0:.0%}" if run.progress else ""
            code = run.error.code if run.error else ""
            table.add_row(run.id, run.kind, run.state, done, run.model_name or "", code)
        console.print(table)


def cancel(
    run_id: Annotated[str, typer.Argument(help="The run.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Ask a run to stop."""
    with talk(url, token) as client:
        console.print(client.cancel(run_id).state)


def models(url: Url = DEFAULT_URL, token: Secret = "") -> None:
    """List models with their versions and aliases."""
    with talk(url, token) as client:
        table = Table("model", "kind", "version", "aliases", "digest")
        for summary in client.models():
            model = client.model(summary.name)
            for version in model.versions:
                aliases = [a.alias for a in model.aliases if a.version == version.version]
                table.add_row(
                    model.name,
                    model.kind,
                    str(version.version),
                    ", ".join(aliases),
                    version.digest[:12],
                )
        console.print(table)


def alias(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    name: Annotated[str, typer.Argument(help="The alias, for example champion.")],
    version: Annotated[int, typer.Argument(help="The version it shall name.")],
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Point an alias at a version of a model."""
    with talk(url, token) as client:
        client.set_alias(model, name, version)
        console.print(f"models:/{model}@{name} is version {version}")


def cascade(
    model: Annotated[str, typer.Argument(help="Name of the model that gets the new version.")],
    fine: Annotated[str, typer.Option(help="The segmenter that makes the mask.")],
    organ: Annotated[str, typer.Option(help="What is looked for first: a label.")],
    coarse: Annotated[
        str | None, typer.Option(help="The segmenter that finds it; else the fine one.")
    ] = None,
    margin_mm: Annotated[float | None, typer.Option(help="Around the organ's box.")] = None,
    coarse_spacing_mm: Annotated[
        float | None, typer.Option(help="Of the first pass, without --coarse.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Compose a model of two passes (an organ's box first) of registered segmenters."""
    with talk(url, token) as client:
        made = client.create_cascade(
            model,
            fine,
            organ,
            coarse=coarse,
            margin_mm=margin_mm,
            coarse_spacing_mm=coarse_spacing_mm,
        )
        console.print(f"models:/{made.name}/{made.version}", highlight=False)


def segment(
    volume_id: Annotated[str, typer.Argument(help="The uploaded volume.")],
    model: Annotated[str, typer.Option(help="models:/name@alias, name/version or name.")],
    mask: Annotated[Path | None, typer.Option(help="Where to put the mask.")] = None,
    format: Annotated[
        MaskFormat, typer.Option(help="Of the mask's file; all but nifti need a DICOM scan.")
    ] = "nifti",
    preview: Annotated[Path | None, typer.Option(help="Where to put the overlay (.png).")] = None,
    flips: Annotated[bool, typer.Option(help="Average over mirror images: 8 times the work.")] = (
        False
    ),
    uncertainty: Annotated[
        Path | None, typer.Option(help="Where to put the map of the entropy (.nii.gz).")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Segment a volume; prints the volumes in ml."""
    with talk(url, token) as client:
        with run_progress("segment") as show:
            formats = None if format == "nifti" else (format,)
            made = client.segment(
                volume_id,
                model,
                formats=formats,
                flips=flips,
                uncertainty=uncertainty is not None,
                on_event=show,
            )
        if made.result is None:
            fail(made.error.code if made.error else made.state)
        console.print_json(made.result.model_dump_json())
        if made.result.ood is not None and made.result.ood.is_out:
            errors.print("out of distribution: the model was not trained on scans like this one")
        if mask is not None:
            client.download_mask(made.id, mask, format=format)
        if preview is not None:
            client.download_preview(made.id, preview)
        if uncertainty is not None:
            client.download_uncertainty(made.id, uncertainty)


def embed(
    volume_id: Annotated[str, typer.Argument(help="The uploaded volume.")],
    model: Annotated[str, typer.Option(help="models:/name@alias, name/version or name.")],
    segmentation: Annotated[
        str | None, typer.Option(help="Also embed this segmentation's labels.")
    ] = None,
    segmenter: Annotated[
        str | None, typer.Option(help="Also embed the labels that this model finds.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """Embed a volume or a 2D image; prints the vector as JSON, and whether the model knows such.

    With regions, an object: `vector`, and `regions` with a vector or a reason each.
    """
    with talk(url, token) as client:
        with run_progress("embed") as show:
            made = client.embed(
                volume_id,
                model,
                segmentation_id=segmentation,
                segmenter=segmenter,
                on_event=show,
            )
        if made.result is None:
            fail(made.error.code if made.error else made.state)
        shown: object = list(made.result.vector)
        if made.result.regions:
            shown = made.result.model_dump(include={"vector", "regions"}, mode="json")
        console.print(json.dumps(shown), soft_wrap=True, highlight=False)
        if made.result.ood is not None and made.result.ood.is_out:
            errors.print("out of distribution: the model was not trained on scans like this one")


def similar(
    volume_id: Annotated[str, typer.Argument(help="The volume, embedded with the model.")],
    model: Annotated[str, typer.Option(help="models:/name@alias, name/version or name.")],
    region: Annotated[str, typer.Option(help="Compare this label instead of whole scans.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many at most.")] = 10,
    modality: Annotated[str | None, typer.Option(help="Only of this one, such as CT.")] = None,
    same_subject: Annotated[bool, typer.Option(help="Also its own subject's volumes.")] = False,
    url: Url = DEFAULT_URL,
    token: Secret = "",
) -> None:
    """List the volumes that are most like a volume, by the cosine of their embeddings.

    Prints rank, volume, cosine, modality and subject, with tabs between.
    """
    with talk(url, token) as client:
        found = client.similar(
            volume_id,
            model,
            region=region,
            limit=limit,
            modality=modality,
            exclude_same_subject=not same_subject,
        )
        for one in found.items:
            facts = (one.rank, one.volume_id, f"{one.cosine:.6f}", one.modality, one.subject)
            typer.echo("\t".join(str(fact) for fact in facts))


@contextmanager
def upload_progress(path: Path) -> Iterator[Callable[[int], None]]:
    """A bar of the bytes that were sent, without the file's name; yields what takes their total."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=errors
    ) as progress:
        task = progress.add_task("upload", total=path.stat().st_size)
        yield lambda sent: progress.update(task, completed=sent)


@contextmanager
def run_progress(title: str) -> Iterator[Callable[[Event], None]]:
    """A bar that follows a run's events, with its newest loss or Dice beside it."""
    with Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=errors,
    ) as progress:
        task = progress.add_task(title, total=1.0, note="")

        def show(event: Event) -> None:
            if event.type == "progress":
                note = str(event.data.get("stage", ""))
                progress.update(task, completed=event.data.get("fraction") or 0.0, note=note)
            elif event.type == "metric":
                values: dict[str, float] = event.data.get("values", {})
                shown = [name for name in values if name == "loss" or name.startswith("dice")]
                if shown:
                    note = "  ".join(f"{name} {values[name]:.3f}" for name in shown)
                    progress.update(task, note=note)
            elif event.type == "state":
                is_done = event.data.get("state") == "succeeded"
                done: dict[str, Any] = {"completed": 1.0} if is_done else {}
                progress.update(task, note=str(event.data.get("state")), **done)

        yield show


@contextmanager
def talk(url: str, token: str) -> Iterator[Client]:
    """A client whose refusals end the command with one line."""
    from service.client import ApiError, Client

    if not token:
        fail("no token: set PCRL_TOKEN or give --token (`pcrl token NAME` makes one)")
    try:
        with Client(url, token, project=os.environ.get("PCRL_PROJECT")) as client:
            yield client
    except ApiError as error:
        fail(f"{error.code}: {error.detail}")


def _follow(client: Client, run: Run, *, wait: bool) -> None:
    console.print(run.id, highlight=False)
    if not wait:
        return
    with run_progress(run.kind) as show:
        ended = client.wait(run.id, on_event=show)
    if ended.state != "succeeded":
        fail(f"{ended.state}: {ended.error.code}: {ended.error.detail}" if ended.error else "")
    if ended.model is not None:
        console.print(f"models:/{ended.model.name}/{ended.model.version}", highlight=False)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}")
    if not isinstance(value, dict):
        fail(f"{path}: a recipe is a JSON object")
    return value


def fail(message: str) -> NoReturn:
    """End the command with one line on the error output."""
    errors.print(message, style="red", highlight=False, soft_wrap=True)
    raise typer.Exit(os.EX_DATAERR)
