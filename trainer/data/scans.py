"""Which scans a run trains on: a folder as people have it, or the service's JSON list.

What a folder looks like is told in `trainer.data.scan_folder`. Where neither subfolders nor the
list say who trains, validates and tests, subjects are split by the shares of the recipe.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from models.recipe import LabelledShare, SplitShares
from models.splits import nested_subset, split_by_subject
from trainer.data.scan_folder import from_folder
from trainer.data.scan_set import SPLITS, Example, Point, ScanFile, ScanSet, Split
from trainer.errors import DataError

__all__ = ["SPLITS", "Example", "ScanFile", "ScanSet", "Split", "discover", "with_labelled"]


def discover(
    path: Path,
    *,
    channels: Sequence[str] = ("image",),
    shares: SplitShares | None = None,
    dims: Literal[2, 3] = 3,
) -> ScanSet:
    """Find the scans of a folder or a JSON list (docs/architecture.md, trainer).

    Args:
        path: The folder, or the list.
        channels: The images that a scan of a folder consists of.
        shares: How to split subjects where nothing else says; None leaves all for training.
        dims: Whether scans of a folder are volumes or 2D images.

    Raises:
        DataError: `no_scans`, `bad_scan_list`, `split_leaks_subject`.
    """
    if path.is_file():
        found, is_split = _from_json(path)
    elif path.is_dir():
        found, is_split = from_folder(path, channels, dims)
    else:
        raise DataError("no_scans", "the --scans path does not exist")
    if shares is not None and not is_split:
        found = _split(found, shares)
    _refuse_leaks(found)
    if not found.of("train"):
        raise DataError("no_scans", f"{len(found.scans)} scans found, none of them for training")
    return found


def with_labelled(scans: ScanSet, share: LabelledShare) -> ScanSet:
    """The scans without those of labelled training patients beyond a share.

    Scans without labels or examples stay, and so do validation and test.
    """
    if share.ratio == 1.0:
        return scans
    known = [scan for scan in scans.of("train") if scan.labels is not None or scan.examples]
    kept = nested_subset(_counts(known), share.ratio, share.seed)
    dropped = {scan.id for scan in known if scan.subject not in kept}
    facts = [scans.digest, *sorted(dropped)]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return ScanSet(digest, tuple(scan for scan in scans.scans if scan.id not in dropped))


def _counts(scans: Iterable[ScanFile]) -> dict[str, bool]:
    """Whether each subject has labels or a finding: such are split apart from the others."""
    counts: dict[str, bool] = defaultdict(bool)
    for scan in scans:
        has_finding = any(1 in example.classes.values() for example in scan.examples)
        counts[scan.subject] |= has_finding or scan.labels is not None
    return counts


def _split(scans: ScanSet, shares: SplitShares) -> ScanSet:
    """Subjects by the shares; those that count apart from the others."""
    by_name: dict[str, float] = {name: getattr(shares, name) for name in SPLITS}
    placed = split_by_subject(_counts(scans.scans), by_name, shares.seed)
    moved = [
        dataclasses.replace(scan, split=split)
        for scan in scans.scans
        for split in SPLITS
        if placed[scan.subject] == split
    ]
    facts = [scans.digest, *sorted(f"{subject} {split}" for subject, split in placed.items())]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return ScanSet(digest, tuple(moved))


def _refuse_leaks(scans: ScanSet) -> None:
    """A subject who trains and tests would make the test worthless."""
    split_of: dict[str, Split] = {}
    for scan in scans.scans:
        other = split_of.setdefault(scan.subject, scan.split)
        if other != scan.split:
            raise DataError(
                "split_leaks_subject",
                f"scan {scan.id}: its subject is in {scan.split} and in {other}",
            )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Example(_Strict):
    classes: dict[str, Literal[0, 1]]
    centre_mm: Point | None = None


class _Entry(_Strict):
    id: str
    image: Path | tuple[Path, ...]
    labels: Path | None = None
    subject: str = ""
    split: Split | None = None
    examples: tuple[_Example, ...] = ()


class _ScanList(_Strict):
    digest: str
    scans: tuple[_Entry, ...]


def _from_json(path: Path) -> tuple[ScanSet, bool]:
    """The scans, and whether the list says how they are split."""
    try:
        listed = _ScanList.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError("bad_scan_list", f"{where}: {first['msg']}") from error
    scans = tuple(
        ScanFile(
            id=entry.id,
            images=tuple(path.parent / image for image in _paths(entry.image)),
            labels=None if entry.labels is None else path.parent / entry.labels,
            subject=entry.subject or entry.id,
            split=entry.split or "train",
            examples=tuple(Example(e.classes, e.centre_mm) for e in entry.examples),
        )
        for entry in listed.scans
    )
    for scan in scans:
        if not scan.images:
            raise DataError("bad_scan_list", f"scan {scan.id}: it has no image")
        for file in (*scan.images, scan.labels):
            if file is not None and not file.exists():
                raise DataError("bad_scan_list", f"scan {scan.id}: a file of it does not exist")
    is_split = any(entry.split is not None for entry in listed.scans)
    return ScanSet(listed.digest, scans), is_split


def _paths(image: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    return (image,) if isinstance(image, Path) else image
