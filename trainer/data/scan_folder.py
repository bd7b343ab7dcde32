"""A folder of scans as people have it.

    X.nii.gz, X.zip, X/             a scan; a zip or a folder holds DICOM
    X_image.nii.gz X_label.nii.gz   a scan with its label volume
    X_image_flair.nii.gz ...        a scan of several channels, one file each
    labels.csv                      what is known of scans: `id`, then any of `subject`,
                                    `x_mm`, `y_mm`, `z_mm` (a place, in RAS+), and one column a
                                    label with 1, 0 or nothing; a scan may have several lines

For a recipe in 2D:

    X.png, X.jpg, X.dcm, X          a 2D image; without one of these endings, DICOM

With subfolders `train`, `val` and `test` the split is theirs; `labels.csv` lies above or in them.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.data.scan_set import SPLITS, Example, Point, ScanFile, ScanSet, Split, facts_of
from trainer.errors import DataError

TABLE = "labels.csv"
_PLACE = ("x_mm", "y_mm", "z_mm")
_VOLUMES = (".nii.gz", ".nii", ".zip")
_PICTURES = (".png", ".jpg", ".jpeg")
_ENDINGS = (*_VOLUMES, *_PICTURES, ".dcm", ".dicom")


def from_folder(
    folder: Path, channels: Sequence[str], dims: Literal[2, 3] = 3
) -> tuple[ScanSet, bool]:
    """The folder's scans, and whether its subfolders say how they are split.

    Raises:
        DataError: `bad_scan_list` for a table that contradicts itself or the files,
            `unusable_scan` for a scan that lacks a channel, or a 2D image where volumes are asked
            for or the other way round.
    """
    is_split = (folder / "train").is_dir()
    table = _read_table(folder)
    scans: list[ScanFile] = []
    for split in SPLITS if is_split else SPLITS[:1]:
        inside = folder / split if is_split else folder
        known = {**table, **_read_table(inside)}
        scans += _scans_in(inside, split, channels, known, dims)
    ids = [scan.id for scan in scans]
    if missing := sorted(table.keys() - set(ids)):
        raise DataError("bad_scan_list", f"{TABLE} names scan {missing[0]}, which is not there")
    facts = sorted(facts_of(scan) for scan in scans)
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return ScanSet(digest, tuple(scans)), is_split


@dataclass(slots=True)
class _Row:
    subject: str
    examples: list[Example] = field(default_factory=list)


def _scans_in(
    folder: Path,
    split: Split,
    channels: Sequence[str],
    table: dict[str, _Row],
    dims: Literal[2, 3],
) -> Iterator[ScanFile]:
    if not folder.is_dir():
        return
    for name, images in sorted(_images_in(folder, channels, dims).items()):
        labels = [folder / f"{name}_label{ending}" for ending in (".nii.gz", ".nii")]
        row = table.get(name, _Row(name))
        yield ScanFile(
            id=name,
            images=images,
            labels=next((label for label in labels if label.is_file()), None),
            subject=row.subject,
            split=split,
            examples=tuple(row.examples),
        )


def _images_in(
    folder: Path, channels: Sequence[str], dims: Literal[2, 3]
) -> dict[str, tuple[Path, ...]]:
    """Files of each scan by its name, in the order of the channels."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        stem, ending = _stem(path)
        if path.name.startswith(".") or stem.endswith("_label"):
            continue
        if not _may_be_a_scan(path, ending, dims):
            continue
        if len(channels) == 1:
            name, channel = stem.removesuffix("_image"), channels[0]
        else:
            name, _, channel = stem.partition("_image_")
        of_scan = found.setdefault(name, {})
        if channel in of_scan:
            detail = f"two scans are called {name}: {of_scan[channel].name} and {path.name}"
            raise DataError("bad_scan_list", detail)
        of_scan[channel] = path
    for name, by_channel in found.items():
        for channel in channels:
            if channel not in by_channel:
                raise DataError("unusable_scan", f"scan {name} has no channel {channel}")
    return {name: tuple(by_channel[c] for c in channels) for name, by_channel in found.items()}


def _may_be_a_scan(path: Path, ending: str, dims: Literal[2, 3]) -> bool:
    """Whether to read it; the pixels are judged when it is read.

    Raises:
        DataError: `unusable_scan`: of the other dimensions, as its ending says.
    """
    if dims == 2:
        if ending in _VOLUMES or path.is_dir():
            what = "a folder" if path.is_dir() else "a volume"
            raise DataError(
                "unusable_scan", f"scan {path.name} is {what}; the recipe's network reads 2D images"
            )
        # DICOM files often bear a UID, whose last number is no ending.
        return bool(ending) or not path.suffix.strip(".0123456789")
    if ending in _PICTURES:
        raise DataError(
            "unusable_scan", f"scan {path.name} is a 2D image; the recipe's network reads volumes"
        )
    return path.is_dir() or ending in _VOLUMES


def _stem(path: Path) -> tuple[str, str]:
    for ending in _ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)], ending
    return path.name, ""


def _read_table(folder: Path) -> dict[str, _Row]:
    """Subject and examples of each scan that the folder's table names; empty without a table."""
    path = folder / TABLE
    if not path.is_file():
        return {}
    rows: dict[str, _Row] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        if "id" not in names:
            raise DataError("bad_scan_list", f"{TABLE} has no column id; it has {', '.join(names)}")
        for number, cells in enumerate(reader, start=2):
            if None in cells or None in cells.values():
                raise DataError("bad_scan_list", f"{TABLE}, line {number}: not {len(names)} cells")
            name = cells.pop("id")
            subject = cells.pop("subject", "") or name
            place = [cells.pop(axis, "") for axis in _PLACE]
            row = rows.setdefault(name, _Row(subject))
            if row.subject != subject:
                raise DataError("bad_scan_list", f"{TABLE}: scan {name} has two subjects")
            classes = {label: _class_of(text, number) for label, text in cells.items() if text}
            if classes or any(place):
                row.examples.append(Example(classes, _point_of(place, number)))
    return rows


def _class_of(text: str, line: int) -> int:
    if text not in ("0", "1"):
        raise DataError(
            "bad_scan_list", f"{TABLE}, line {line}: a label is {text!r}, not 1, 0 or empty"
        )
    return int(text)


def _point_of(place: Sequence[str], line: int) -> Point | None:
    if not any(place):
        return None
    try:
        x, y, z = (float(text) for text in place)
    except ValueError:
        x = y = z = math.nan
    if not all(math.isfinite(value) for value in (x, y, z)):
        raise DataError("bad_scan_list", f"{TABLE}, line {line}: no place in mm: {list(place)}")
    return x, y, z
