"""Which scans a run trains on: a folder as people have it, or the service's JSON list.

A folder holds NIfTI files, DICOM folders or zips; `X_image.nii.gz` belongs with `X_label.nii.gz`.
With subfolders `train`, `val` and `test` the split is theirs, else every scan is for training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from models.bundle import sha256_of
from trainer.errors import DataError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ScanFile:
    """One scan on disk; `id` names it in messages."""

    id: str
    image: Path
    labels: Path | None
    subject: str
    split: Split


@dataclass(frozen=True, slots=True)
class ScanSet:
    """The scans of a run, and a SHA-256 over what they are."""

    digest: str
    scans: tuple[ScanFile, ...]

    def of(self, split: Split) -> tuple[ScanFile, ...]:
        """The scans of one split."""
        return tuple(scan for scan in self.scans if scan.split == split)


def discover(path: Path) -> ScanSet:
    """Find the scans of a folder or a JSON list (docs/architecture.md, trainer).

    Raises:
        DataError: `no_scans`, `bad_scan_list`.
    """
    if path.is_file():
        found = _from_json(path)
    elif path.is_dir():
        found = _from_folder(path)
    else:
        raise DataError("no_scans", "the --scans path does not exist")
    if not found.of("train"):
        raise DataError("no_scans", f"{len(found.scans)} scans found, none of them for training")
    return found


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files in the order of their own digests."""
    if path.is_file():
        return sha256_of(path)
    parts = sorted(sha256_of(file) for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    image: Path
    labels: Path | None = None
    subject: str = ""
    split: Split | None = None


class _ScanList(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    scans: tuple[_Entry, ...]


def _from_json(path: Path) -> ScanSet:
    try:
        listed = _ScanList.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError("bad_scan_list", f"{where}: {first['msg']}") from error
    scans = tuple(
        ScanFile(
            id=entry.id,
            image=path.parent / entry.image,
            labels=None if entry.labels is None else path.parent / entry.labels,
            subject=entry.subject or entry.id,
            split=entry.split or "train",
        )
        for entry in listed.scans
    )
    for scan in scans:
        for file in (scan.image, scan.labels):
            if file is not None and not file.exists():
                raise DataError("bad_scan_list", f"scan {scan.id}: a file of it does not exist")
    return ScanSet(listed.digest, scans)


def _from_folder(folder: Path) -> ScanSet:
    if (folder / "train").is_dir():
        scans = [s for split in SPLITS for s in _scans_in(folder / split, split)]
    else:
        scans = list(_scans_in(folder, "train"))
    facts = sorted(
        f"{digest_of(s.image)} {digest_of(s.labels) if s.labels else '-'} {s.split}" for s in scans
    )
    return ScanSet(hashlib.sha256("\n".join(facts).encode()).hexdigest(), tuple(scans))


def _scans_in(folder: Path, split: Split) -> Iterator[ScanFile]:
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        stem, suffix = _stem(path)
        if path.name.startswith(".") or stem.endswith("_label"):
            continue
        if path.is_dir() or suffix in (".nii", ".nii.gz", ".zip"):
            name = stem.removesuffix("_image")
            labels = [folder / f"{name}_label{ending}" for ending in (".nii.gz", ".nii")]
            found = next((label for label in labels if label.is_file()), None)
            yield ScanFile(id=name, image=path, labels=found, subject=name, split=split)


def _stem(path: Path) -> tuple[str, str]:
    for suffix in (".nii.gz", ".nii", ".zip"):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix), suffix
    return path.name, ""


