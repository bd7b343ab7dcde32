"""Which subjects train, validate and test: the same answer for the same seed, everywhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

SPLITS = ("train", "val", "test")


def split_by_subject(
    subjects: Mapping[str, bool],
    shares: Mapping[str, float],
    seed: int,
    *,
    taken: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """Put every subject into `train`, `val` or `test`.

    The subjects that count and the others are split apart from each other, each by the shares, so
    a few labelled subjects (or a few patients with a finding) do not end up in one split by
    chance. Among those that count (or, when nobody does, all) at least one is in `train`, and from
    two on at least one is in `val`, unless its share is 0; `test` may stay empty.

    Args:
        subjects: Every subject that is to be placed, and whether it counts: it has labels, or it
            has a finding.
        shares: Of `train`, `val` and `test`; they are scaled to sum to one.
        seed: Another seed is another split.
        taken: How many subjects the caller has already put into each split by hand.

    Raises:
        ValueError: The shares sum to 0.
    """
    groups = [[name for name in subjects if subjects[name]], []]
    groups[1] = [name for name in subjects if not subjects[name]]
    placed: dict[str, str] = {}
    needs = dict(taken or {})
    for group in groups:
        order = sorted(group, key=lambda name: _shuffle_key(seed, name))
        sizes = _sizes(len(order), shares, needs)
        if order:
            needs = {"train": 1, "val": 1}  # the guarantee is met by the first group
        for name in SPLITS:
            chosen, order = order[: sizes[name]], order[sizes[name] :]
            placed.update(dict.fromkeys(chosen, name))
    return placed


def nested_subset(subjects: Mapping[str, bool], ratio: float, seed: int) -> frozenset[str]:
    """A share of the subjects, such that a smaller share of the same seed lies in a larger one.

    Those that count and the others are taken by the share each, and at least one of either where
    there is one, so a tenth of the labels has the findings of a tenth.

    Args:
        subjects: Every subject, and whether it counts; see `split_by_subject`.
        ratio: Above 0, at most 1, which is all of them.
        seed: Another seed is another order in which subjects come in.
    """
    chosen: set[str] = set()
    for counts in (True, False):
        group = sorted(
            (name for name in subjects if subjects[name] is counts),
            key=lambda name: _shuffle_key(f"labelled {seed}", name),
        )
        number = math.floor(len(group) * ratio + 0.5)
        chosen.update(group[: max(number, min(1, len(group)))])
    return frozenset(chosen)


def _sizes(number: int, shares: Mapping[str, float], taken: Mapping[str, int]) -> dict[str, int]:
    """How many of `number` subjects go into each split, by largest remainder."""
    positive = {name: max(0.0, shares[name]) for name in SPLITS}
    total = sum(positive.values())
    if total <= 0.0:
        raise ValueError("the shares of the split sum to 0")
    exact = {name: number * share / total for name, share in positive.items()}
    sizes = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(SPLITS, key=lambda name: (sizes[name] - exact[name], SPLITS.index(name)))
    for name in by_remainder[: number - sum(sizes.values())]:
        sizes[name] += 1
    for needed, from_number in (("train", 1), ("val", 2)):
        if number < from_number or sizes[needed] or taken.get(needed) or not positive[needed]:
            continue
        giver = max(
            (name for name in SPLITS if name != needed),
            key=lambda name: sizes[name] - (name == "train" and sizes[name] == 1) * number,
        )
        sizes[giver] -= 1
        sizes[needed] += 1
    return sizes


def _shuffle_key(seed: int | str, subject: str) -> bytes:
    return hashlib.sha256(f"{seed}:{subject}".encode()).digest()
