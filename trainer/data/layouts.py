"""A public data set in its maker's layout to a list of scans that a training reads.

Files are named where they lie; only channels of 4D files are written out, once.

    OUT/scans.json    for `--scans`
    OUT/files.csv     every file of the data set: used, or why not
    OUT/channels/     volumes of one channel
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

from imaging.datasets import LayoutError, Options, read_layout
from imaging.datasets.channels import extract
from imaging.datasets.plan import Case, Image, Plan
from imaging.errors import ScanError
from models.recipe import SplitShares
from models.splits import SPLITS, split_by_subject
from trainer.data.scan_set import Example, ScanFile, facts_of
from trainer.errors import DataError
from trainer.report import Report

SCANS, FILES, CHANNELS = "scans.json", "files.csv", "channels"


def write_list(
    kind: str,
    folder: Path,
    out: Path,
    *,
    options: Options,
    shares: SplitShares,
    report: Report,
) -> dict[str, object]:
    """Write the list of a data set's scans.

    Patients whose split the data set does not give are split by `shares`; where it comes with a
    test split of its own, none of them goes there.

    Args:
        kind: One of `imaging.datasets.READERS`.
        folder: The data set.
        out: Made if it is not there.
        options: What the reader cannot know.
        shares: Of patients.
        report: Told of the scans that are done.

    Returns:
        What was found, JSON-able: with the names that a recipe needs.

    Raises:
        DataError: `bad_dataset`, `unusable_scan`.
    """
    try:
        plan = read_layout(kind, folder.absolute(), options)
    except LayoutError as error:
        raise DataError("bad_dataset", f"{error.code}: {error.detail}") from error
    (out / CHANNELS).mkdir(parents=True, exist_ok=True)
    placed = _splits(plan, shares)
    scans = []
    for done, case in enumerate(plan.cases, start=1):
        scans.append(_scan(case, placed[case.patient], plan.channels, out / CHANNELS))
        report.progress("dataset", done, len(plan.cases))
    facts = sorted(facts_of(scan) for scan in scans)
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    _write(out / SCANS, json.dumps({"digest": digest, "scans": [_entry(scan) for scan in scans]}))
    _write_files(plan, folder.absolute(), out / FILES)
    for note in plan.notes:
        report.log("info", note)
    return _summary(plan, scans, out, digest)


def _splits(plan: Plan, shares: SplitShares) -> dict[str, str]:
    """Split of every patient."""
    given: dict[str, str] = {}
    is_known: dict[str, bool] = defaultdict(bool)
    for case in plan.cases:
        has_finding = any(1 in finding.classes.values() for finding in case.findings)
        is_known[case.patient] |= has_finding or case.labels is not None
        if case.split is not None:
            given[case.patient] = case.split
    left = {patient: known for patient, known in is_known.items() if patient not in given}
    by_name = {name: float(getattr(shares, name)) for name in SPLITS}
    if plan.has_test:
        by_name["test"] = 0.0
    return given | split_by_subject(left, by_name, shares.seed, taken=Counter(given.values()))


def _scan(case: Case, split: str, channels: tuple[str, ...], folder: Path) -> ScanFile:
    assert split in SPLITS
    return ScanFile(
        id=case.id,
        images=tuple(
            _on_disk(image, case.id, name, folder)
            for image, name in zip(case.images, channels, strict=True)
        ),
        labels=None if case.labels is None else case.labels.path,
        subject=case.patient,
        split=split,  # type: ignore[arg-type]  # one of SPLITS
        examples=tuple(Example(finding.classes, finding.centre_mm) for finding in case.findings),
    )


def _on_disk(image: Image, case: str, channel: str, folder: Path) -> Path:
    """The image's file; a channel of a 4D one is written when it is not there, or older."""
    if image.channel is None:
        return image.path
    target = folder / f"{case}_{channel}.nii.gz"
    if target.is_file() and target.stat().st_mtime >= image.path.stat().st_mtime:
        return target
    try:
        extract(image.path, image.channel, target)
    except ScanError as error:
        detail = f"scan {case}, channel {channel}: {error.code}: {error.detail}"
        raise DataError("unusable_scan", detail) from error
    return target


def _entry(scan: ScanFile) -> dict[str, object]:
    entry: dict[str, object] = {
        "id": scan.id,
        "image": [str(image.absolute()) for image in scan.images],
        "subject": scan.subject,
        "split": scan.split,
    }
    if scan.labels is not None:
        entry["labels"] = str(scan.labels)
    if scan.examples:
        entry["examples"] = [asdict(example) for example in scan.examples]
    return entry


def _write_files(plan: Plan, folder: Path, target: Path) -> None:
    whys = {**dict.fromkeys(plan.consumed, ""), **plan.explained}
    draft = target.with_name(f".draft-{target.name}")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "used", "reason"])
        for path, why in sorted(whys.items()):
            writer.writerow([path.relative_to(folder).as_posix(), int(not why), why])
    draft.rename(target)


def _write(target: Path, text: str) -> None:
    draft = target.with_name(f".draft-{target.name}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(target)


def _summary(plan: Plan, scans: list[ScanFile], out: Path, digest: str) -> dict[str, object]:
    return {
        "kind": plan.kind,
        "scans": str(out / SCANS),
        "digest": digest,
        "channels": plan.channels,
        "labels": dict(plan.labels),
        "regions": dict(plan.regions),
        "classes": plan.classes,
        "num_scans": dict(Counter(scan.split for scan in scans)),
        "num_labelled": sum(case.has_truth for case in plan.cases),
        "num_files_used": len(plan.consumed),
        "files_not_used": dict(Counter(plan.explained.values())),
        "notes": plan.notes,
    }
