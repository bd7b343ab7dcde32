"""`make demo`: the whole chain, driven through the public REST API as a user would drive it.

Starts an embedded stack in `demo-output/service`, uploads scans (half as zipped DICOM, half as
NIfTI), pretrains on all of them, fine-tunes on the labelled ones, segments a scan that was not
trained on, embeds it, and compares the mask with the truth. The last line printed is one JSON
object: `{"dice": {label: value}, "seconds": {step: seconds}}`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from imaging import nifti, phantom, phantom_dicom
from service.cli_client import run_progress
from service.client import Client
from service.schemas import Run, SplitCreate
from service.settings import Settings
from service.stack import Stack

NUM_PHANTOMS = 8
"""The last, held out, has a tumour large enough to judge (1800 voxels)."""
PHANTOM_SHAPE = (96, 96, 56)
PHANTOM_SPACING_MM = (4.0, 4.0, 5.0)
PHANTOM_LABELS = {"liver": phantom.LIVER, "tumour": phantom.TUMOUR}
BTCV_LABELS = {"liver": 6}
MAX_PAIRS = 12
"""Of a folder of real pairs so many are used, the last for testing."""

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Case:
    """A scan with its truth: the file to upload, the label file, and who it is."""

    subject: str
    image: Path
    labels: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """What the demo trains on and how much."""

    labels: dict[str, int]
    pretrain: dict[str, Any]
    finetune: dict[str, Any]


def main() -> None:
    """Run the demo; exit status 0 when everything succeeded."""
    parser = argparse.ArgumentParser(prog="python -m service.demo", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of *_image.nii.gz and *_label.nii.gz")
    parser.add_argument("--labels", help='names and values, for example "liver=1 tumour=2"')
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    seconds: dict[str, float] = {}
    with _timed("prepare", seconds):
        if arguments.data is None:
            cases, plan = _phantoms(out / "scans"), _phantom_plan()
        else:
            cases = _pairs(arguments.data)
            plan = _real_plan(_labels(arguments.labels, cases))
    settings = Settings(data_dir=out / "service", host="127.0.0.1", port=_free_port())
    stack = Stack(settings)
    with _timed("start", seconds):
        stack.start()
    try:
        if stack.admin_token is None:
            sys.exit("a fresh installation gave no admin token")
        with Client(stack.url, stack.admin_token) as client:
            dice = drive(client, cases, plan, out, seconds)
    finally:
        with _timed("stop", seconds):
            stack.stop()
    _summary(dice, seconds, out)


def drive(
    client: Client, cases: list[Case], plan: Plan, out: Path, seconds: dict[str, float]
) -> dict[str, float]:
    """Go through the chain over REST; the last case is held out.

    Returns:
        Dice per label of the held-out scan.
    """
    *known, held_out = cases
    with _timed("upload", seconds):
        pairs = [_upload(client, case) for case in known]
        unseen, _ = _upload(client, held_out, with_labels=False)
    with _timed("dataset", seconds):
        dataset = client.create_dataset(
            "demo", pairs, split=SplitCreate(train=0.8, val=0.2, test=0.0)
        )
        console.print(f"dataset {dataset.id}: {len(pairs)} scans, digest {dataset.digest[:12]}")
    with _timed("pretrain", seconds):
        encoder = _trained(
            client, client.pretrain(dataset.id, plan.pretrain, model_name="demo-encoder")
        )
    with _timed("finetune", seconds):
        segmenter = _trained(
            client,
            client.finetune(dataset.id, plan.finetune, model_name="demo-liver", parent=encoder),
        )
        version = int(segmenter.rpartition("/")[2])
        client.set_alias("demo-liver", "champion", version)
    with _timed("segment", seconds), run_progress("segment") as show:
        made = client.segment(unseen, "models:/demo-liver@champion", on_event=show)
        if made.result is None:
            sys.exit(f"the segmentation ended {made.state}: {made.error}")
        client.download_mask(made.id, out / "mask.nii.gz")
        client.download_preview(made.id, out / "overlay.png")
        console.print(f"volumes in ml: {made.result.volumes_ml}")
        for name, lesions in made.result.lesions.items():
            sizes = ", ".join(f"{one.volume_ml:.1f} ml" for one in lesions.largest[:3])
            console.print(f"{name}: {lesions.num} ({sizes or 'none'})")
    with _timed("embed", seconds), run_progress("embed") as show:
        embedded = client.embed(unseen, "demo-encoder", on_event=show)
        if embedded.result is None:
            sys.exit(f"the embedding ended {embedded.state}: {embedded.error}")
        vector = np.asarray(embedded.result.vector)
        console.print(f"embedding: {vector.size} numbers, length {np.linalg.norm(vector):.3f}")
    return _dice(out / "mask.nii.gz", held_out.labels, plan.labels)


def _upload(client: Client, case: Case, *, with_labels: bool = True) -> tuple[str, str | None]:
    image = client.upload(case.image, subject=case.subject).id
    if not with_labels:
        return image, None
    return image, client.upload(case.labels, kind="labels", subject=case.subject).id


def _trained(client: Client, run: Run) -> str:
    """Watch a training to its end; the reference of the model version it made."""
    with run_progress(run.kind) as show:
        ended = client.wait(run.id, on_event=show)
    if ended.state != "succeeded" or ended.model is None:
        sys.exit(f"the {run.kind} run ended {ended.state}: {ended.error}")
    return f"models:/{ended.model.name}/{ended.model.version}"


def _phantoms(folder: Path) -> list[Case]:
    """Phantoms; the even ones as zipped DICOM series, the odd ones as NIfTI."""
    cases: list[Case] = []
    for seed in range(NUM_PHANTOMS):
        made = phantom.make(seed, shape=PHANTOM_SHAPE, spacing_mm=PHANTOM_SPACING_MM)
        image, labels = phantom.write_pair(made, folder, f"phantom_{seed:02d}")
        if seed % 2 == 0:
            image.unlink()
            series = folder / f"phantom_{seed:02d}"
            phantom_dicom.write_dicom_series(made.volume, series, seed=seed)
            image = Path(shutil.make_archive(str(series), "zip", series))
            shutil.rmtree(series)
        cases.append(Case(f"phantom-{seed:02d}", image, labels))
    return cases


def _phantom_plan() -> Plan:
    network = {"base_width": 8}
    preprocessing = {"spacing_mm": [5.0, 5.0, 5.0]}
    return Plan(
        labels=PHANTOM_LABELS,
        pretrain={
            "network": network,
            "preprocessing": preprocessing,
            "method": {"name": "pcrl", "queue_size": 256},
            "crops": {"crop_sizes": [[32, 32, 32], [48, 48, 32]], "input_size": [32, 32, 32]},
            "num_steps": 40,
            "batch_size": 4,
            "learning_rate": 0.01,
            "checkpoint_every": 20,
            "log_every": 2,
        },
        finetune={
            "labels": PHANTOM_LABELS,
            "network": network,
            "preprocessing": {
                **preprocessing,
                "intensity": {"kind": "window", "low_hu": -50, "high_hu": 200},
            },
            "patch_size": [32, 32, 32],
            "class_weights": {"tumour": 15},
            "postprocess": _postprocess(PHANTOM_LABELS),
            "transfer": "encoder_decoder",
            "num_steps": 240,
            "batch_size": 4,
            "learning_rate": 0.001,
            "schedule": "cosine",
            "validate_every": 120,
            "checkpoint_every": 120,
            "log_every": 5,
        },
    )


def _postprocess(labels: dict[str, int]) -> dict[str, Any]:
    """One liver, with the tumours in it; each tumour counted."""
    asked: dict[str, Any] = {}
    if "liver" in labels:
        asked["keep_largest"] = ["liver"]
    if "tumour" in labels:
        asked["lesions"] = ["tumour"]
    if {"liver", "tumour"} <= labels.keys():
        asked["parts"] = {"liver": ["tumour"]}
    return asked


def _real_plan(labels: dict[str, int]) -> Plan:
    """More steps, a finer grid; label values that are not asked for count as background."""
    phantoms = _phantom_plan()
    preprocessing = {"spacing_mm": [4.0, 4.0, 4.0]}
    return Plan(
        labels=labels,
        pretrain={**phantoms.pretrain, "preprocessing": preprocessing, "num_steps": 100},
        finetune={
            **phantoms.finetune,
            "labels": labels,
            "unlisted_labels": "background",
            "class_weights": {"tumour": 4} if "tumour" in labels else {},
            "postprocess": _postprocess(labels),
            "patch_size": [48, 48, 48],
            "batch_size": 2,
            "preprocessing": {
                **preprocessing,
                "intensity": {"kind": "window", "low_hu": -125, "high_hu": 275},
            },
            "num_steps": 400,
            "validate_every": 100,
            "checkpoint_every": 100,
        },
    )


def _pairs(folder: Path) -> list[Case]:
    """Pairs of a folder, sorted by name, at most `MAX_PAIRS`."""
    cases: list[Case] = []
    for image in sorted(folder.glob("*_image.nii*")):
        stem, _, suffix = image.name.partition("_image")
        labels = image.with_name(f"{stem}_label{suffix}")
        if labels.exists():
            cases.append(Case(f"case-{len(cases):02d}", image.absolute(), labels.absolute()))
    if len(cases) < 3:
        sys.exit(f"{folder} has {len(cases)} pairs of *_image.nii.gz and *_label.nii.gz; 3 needed")
    return cases[-MAX_PAIRS:]


def _labels(asked: str | None, cases: list[Case]) -> dict[str, int]:
    """Names and values, as asked for or guessed from the first label file."""
    if asked:
        pairs = (part.partition("=") for part in asked.replace(",", " ").split())
        return {name: int(value) for name, _, value in pairs}
    highest = int(nifti.read(cases[0].labels)[0].voxels.max())
    labels = PHANTOM_LABELS if highest == 2 else {"liver": 1} if highest == 1 else BTCV_LABELS
    console.print(f"labels in the files go up to {highest}; taking {labels} (LABELS=... to change)")
    return labels


def _dice(mask: Path, truth: Path, labels: dict[str, int]) -> dict[str, float]:
    """Dice of each label between two files, which must lie on the same grid."""
    (found, found_grid), (expected, expected_grid) = nifti.read(mask), nifti.read(truth)
    if found_grid.shape != expected_grid.shape:
        sys.exit(f"the mask is {found_grid.shape}, the truth {expected_grid.shape}")
    dice = {}
    for index, (name, value) in enumerate(labels.items(), start=1):
        a, b = np.rint(found.voxels) == index, np.rint(expected.voxels) == value
        total = int(a.sum()) + int(b.sum())
        dice[name] = round(2 * int((a & b).sum()) / total, 4) if total else 1.0
    return dice


def _summary(dice: dict[str, float], seconds: dict[str, float], out: Path) -> None:
    console.print()
    for step, taken in seconds.items():
        console.print(f"  {step:<9} {taken:7.1f} s")
    for name, value in dice.items():
        console.print(f"  Dice {name}: {value:.3f}")
    console.print(f"  {out / 'overlay.png'}\n  {out / 'mask.nii.gz'}\n")
    rounded = {step: round(taken, 1) for step, taken in seconds.items()}
    print(json.dumps({"dice": dice, "seconds": rounded}), flush=True)  # noqa: T201 - the result


@contextlib.contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    console.print(f"[bold]{step}[/]")
    begun = time.monotonic()
    yield
    seconds[step] = time.monotonic() - begun


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
