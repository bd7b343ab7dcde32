"""Subjects are split completely, fairly, and the same way again."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.splits import SPLITS, nested_subset, split_by_subject

PAPER = {"train": 0.7, "val": 0.1, "test": 0.2}


@given(
    labelled=st.lists(st.booleans(), min_size=1, max_size=30),
    seed=st.integers(0, 5),
    shares=st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0.5, 0.0), (0.34, 0.33, 0.33)]),
)
def test_every_split_is_complete_fair_and_repeatable(labelled, seed, shares):
    subjects = {f"s{number}": has for number, has in enumerate(labelled)}
    by_name = dict(zip(SPLITS, shares, strict=True))

    placed = split_by_subject(subjects, by_name, seed)

    assert set(placed) == set(subjects)
    assert placed == split_by_subject(dict(reversed(subjects.items())), by_name, seed)
    group = [name for name, has in subjects.items() if has] or list(subjects)
    counts = Counter(placed[name] for name in group)
    assert counts["train"] >= 1
    assert counts["val"] >= (1 if len(group) >= 2 else 0)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, (1, 0, 0)),
        (2, (1, 1, 0)),
        (3, (1, 1, 1)),
        (4, (2, 1, 1)),
        (5, (3, 1, 1)),
        (10, (7, 1, 2)),
    ],
)
def test_few_labelled_subjects_still_train_and_validate(number, expected):
    counts = Counter(split_by_subject({f"s{i}": True for i in range(number)}, PAPER, 0).values())

    assert counts["train"] >= expected[0]
    assert counts["val"] == expected[1]


def test_splits_made_by_hand_count_for_the_guarantee():
    placed = split_by_subject({"a": True}, PAPER, 0, taken={"train": 1, "val": 1, "test": 0})

    assert placed == {"a": "train"}


def test_another_seed_is_another_split_and_no_shares_are_refused():
    subjects = {f"s{number}": True for number in range(30)}

    assert split_by_subject(subjects, PAPER, 0) != split_by_subject(subjects, PAPER, 1)
    with pytest.raises(ValueError, match="sum to 0"):
        split_by_subject(subjects, dict.fromkeys(SPLITS, 0.0), 0)


@given(counts=st.lists(st.booleans(), min_size=1, max_size=40), seed=st.integers(0, 5))
def test_a_smaller_share_of_the_labels_lies_in_a_larger_one(counts, seed):
    subjects = {f"s{number}": has for number, has in enumerate(counts)}
    ratios = (0.01, 0.1, 0.2, 0.5, 0.9, 1.0)

    subsets = [nested_subset(subjects, ratio, seed) for ratio in ratios]

    for smaller, larger in itertools.pairwise(subsets):
        assert smaller <= larger
    assert subsets[0] and subsets[-1] == set(subjects)
    for ratio, subset in zip(ratios, subsets, strict=True):
        for value in (True, False):
            group = [name for name in subjects if subjects[name] is value]
            taken = sum(name in subset for name in group)
            assert abs(taken - ratio * len(group)) <= 0.5 or taken == 1
    assert subsets[2] == nested_subset(dict(reversed(subjects.items())), 0.2, seed)


def test_another_seed_is_another_subset():
    subjects = dict.fromkeys((f"s{number}" for number in range(40)), True)

    assert len({nested_subset(subjects, 0.2, seed) for seed in range(8)}) == 8
