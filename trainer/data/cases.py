"""Every scan of a fine-tuning, read and judged before the first step.

What cannot be trained on is refused here, with the scan's id: minutes after the start, not hours
later. What can, but should be known, is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from trainer.data.cache import Case
from trainer.data.resident import Size
from trainer.data.scan_set import SPLITS, ScanFile, ScanSet, Split
from trainer.errors import DataError
from trainer.report import Report

Read = TypeVar("Read")
_SHOWN = 5
"""Scans that a log line names; the others it counts."""


def read_all(
    scans: ScanSet,
    read: Callable[[ScanFile], Read],
    has_truth: Callable[[ScanFile], bool],
    report: Report,
) -> dict[Split, list[Read]]:
    """Read the scans whose truth is known, split by split; the others are counted in the log.

    Raises:
        DataError: `unusable_labels` if no training scan has a truth, or what `read` raises.
    """
    known = [scan for scan in scans.scans if has_truth(scan)]
    if without := len(scans.scans) - len(known):
        report.log("info", f"{without} scans without labels are not used")
    cases: dict[Split, list[Read]] = {split: [] for split in SPLITS}
    for done, scan in enumerate(known, start=1):
        cases[scan.split].append(read(scan))
        report.progress("prepare", done, len(known))
    if not cases["train"]:
        raise DataError("unusable_labels", "no training scan has labels")
    if not cases["val"]:
        report.log("warning", "no validation scans: the training scans choose the best checkpoint")
    return cases


def check_extents(cases: Iterable[Case], patch: Size, report: Report) -> None:
    """Refuse scans that are mostly padding; tell of those that need some.

    A scan shorter than half the patch along an axis would be more padding than scan there: the
    patch is wrong for it, or the scan is not what it is taken for (a localiser, a single slab).

    Raises:
        DataError: `unusable_scan`.
    """
    padded = []
    for case in cases:
        shape = case.image.shape
        if any(2 * have < want for have, want in zip(shape, patch, strict=True)):
            raise DataError(
                "unusable_scan",
                f"scan {case.id} is {shape} voxels at the recipe's spacing, less than half of "
                f"{tuple(patch)} along an axis; choose a smaller size or leave the scan out",
            )
        if any(have < want for have, want in zip(shape, patch, strict=True)):
            padded.append(case.id)
    if padded:
        more = f" and {len(padded) - _SHOWN} more" if len(padded) > _SHOWN else ""
        named = ", ".join(padded[:_SHOWN]) + more
        report.log("info", f"smaller than {tuple(patch)} and padded with air: scan {named}")


def check_members(
    name: str, members: Mapping[Split, Sequence[str]], *, at_least: int, report: Report
) -> None:
    """Whether each split has enough of a class to learn it and to measure it.

    Args:
        name: Of the class.
        members: Scan ids, one for each member of the class in each split.
        at_least: How many the training needs; from one to that many they are refused, naming them.
        report: Told of a class with a single member to learn from, or none to measure by.

    Raises:
        DataError: `unusable_labels`.
    """
    train = members["train"]
    if not train:
        raise DataError("unusable_labels", f"no training example of {name}")
    if len(train) < at_least:
        raise DataError(
            "unusable_labels",
            f"{name} has {len(train)} training example (scan {train[0]}); "
            f"at least {at_least} are needed",
        )
    if len(train) == 1:
        report.log("warning", f"{name} has a single training example: scan {train[0]}")
    for split in SPLITS[1:]:
        if len(members[split]) == 1:
            report.log(
                "warning", f"{name} has a single example in {split}: scan {members[split][0]}"
            )
