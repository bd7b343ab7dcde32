"""What a run trains on: scans on disk, what is known of them, and who is in which split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from models.bundle import sha256_of

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Point = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Example:
    """What is known of a scan, or of one place in it.

    Attributes:
        classes: 1 or 0 for each label; a label that is not in it is not known.
        centre_mm: Where, in RAS+ world coordinates; None is the whole scan.
    """

    classes: Mapping[str, int]
    centre_mm: Point | None = None


@dataclass(frozen=True, slots=True)
class ScanFile:
    """One scan on disk; `id` names it in messages, `images` has one file or folder a channel."""

    id: str
    images: tuple[Path, ...]
    labels: Path | None
    subject: str
    split: Split
    examples: tuple[Example, ...] = field(default=())

    @property
    def image(self) -> Path:
        """The first channel."""
        return self.images[0]


@dataclass(frozen=True, slots=True)
class ScanSet:
    """The scans of a run, and a SHA-256 over what they are."""

    digest: str
    scans: tuple[ScanFile, ...]

    def of(self, split: Split) -> tuple[ScanFile, ...]:
        """The scans of one split."""
        return tuple(scan for scan in self.scans if scan.split == split)


def voxels_beside(path: Path) -> Path | None:
    """The voxels of a `.mhd` header: the file of its name that ends in `.raw` or `.zraw`.

    Where the header itself says that they are is not followed; LUNA16 keeps to these names.
    """
    if path.suffix.lower() != ".mhd":
        return None
    beside = (path.with_suffix(ending) for ending in (".raw", ".zraw"))
    return next((file for file in beside if file.is_file()), None)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of several files (a folder, a detached header with its voxels)."""
    beside = voxels_beside(path)
    if path.is_file() and beside is None:
        return sha256_of(path)
    files = [path, beside] if beside else [file for file in path.rglob("*") if file.is_file()]
    parts = sorted(sha256_of(file) for file in files)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def facts_of(scan: ScanFile) -> str:
    """Everything of a scan that training sees, its content rather than its names."""
    images = " ".join(digest_of(image) for image in scan.images)
    labels = digest_of(scan.labels) if scan.labels else "-"
    known = [f"{sorted(e.classes.items())} {e.centre_mm}" for e in scan.examples]
    return " ".join([images, labels, scan.split, *known])
