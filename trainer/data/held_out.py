"""Scans to pretrain on, without those of the patients that the target validates and tests on.

Both sets may be the same folder, a part of it, or a copy under other names: a patient is known by
`subject`, and, as names are not to be trusted, by the content of the images.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

from trainer.data.scan_set import ScanFile, ScanSet, digest_of
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left to pretrain on, and how many scans were left out and why."""

    scans: ScanSet
    num_by_subject: int = 0
    num_by_content: int = 0
    """Of those whose subject is not held out."""


def without_held_out(source: ScanSet, target: ScanSet) -> Kept:
    """The source without every scan that the target validates or tests on.

    A scan is left out if its subject is in the target's `val` or `test`, or an image of its subject
    has the content of one there: the same bytes, gzip aside. The same voxels in another format are
    not recognised, nor a DICOM folder that was zipped.

    Args:
        source: What is to be pretrained on, in any split.
        target: What is to be fine-tuned on, split.

    Returns:
        The source itself where nothing is left out, else a set with a digest of its own.

    Raises:
        DataError: `no_scans` if nothing is left to train on.
    """
    held_out = (*target.of("val"), *target.of("test"))
    subjects = {scan.subject for scan in held_out}
    others = [scan for scan in source.scans if scan.subject not in subjects]
    contents = {content for scan in held_out for content in _contents(scan)}
    renamed = {scan.subject for scan in others if not contents.isdisjoint(_contents(scan))}
    kept = tuple(scan for scan in others if scan.subject not in renamed)
    if len(kept) == len(source.scans):
        return Kept(source)
    if not any(scan.split == "train" for scan in kept):
        detail = f"none of the source's {len(source.scans)} scans is left to pretrain on: "
        raise DataError("no_scans", detail + "the target validates or tests on these patients")
    facts = [source.digest, *(scan.id for scan in kept)]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    by_subject = len(source.scans) - len(others)
    return Kept(ScanSet(digest, kept), by_subject, len(others) - len(kept))


def _contents(scan: ScanFile) -> set[str]:
    return {_content_of(image) for image in scan.images}


def _content_of(image: Path) -> str:
    """SHA-256 of an image's bytes; gzip writes names and times beside them, so it is undone.

    A file that only claims to be gzip is taken as it is: reading it will be refused later.
    """
    if image.suffix.lower() != ".gz" or not image.is_file():
        return digest_of(image)
    try:
        with gzip.open(image) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, EOFError, zlib.error):
        return digest_of(image)
