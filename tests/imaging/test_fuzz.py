"""T-H2: mutated files at the parsers; `python -m benchmarks.fuzz_intake` takes more of them."""

from __future__ import annotations

import json

import pytest

from benchmarks.fuzz_intake import FAMILIES, family_of, fuzz, input_of, judged


@pytest.mark.parametrize("inputs", [1000, pytest.param(3000, marks=pytest.mark.nightly)])
def test_t_h2_mutated_files_end_in_a_scan_or_in_our_own_error(inputs: int) -> None:
    found = fuzz(inputs, 20)

    assert found.is_clean, json.dumps(found.as_json())
    assert found.peak_rss_mib < 512
    assert sum(found.outcomes.values()) == inputs
    assert len(found.outcomes) > 8
    assert found.outcomes["read"] > inputs / 30


def test_the_harness_sees_a_foreign_error_a_crash_and_a_hang() -> None:
    found = fuzz(24, 4, families=("leaks", "crashes", "hangs"))

    assert [one["family"] for one in found.foreign] == ["leaks"]
    assert [one["family"] for one in found.crashes] == ["crashes"] * 2
    assert {one["exit"] for one in found.crashes} == {-6}
    assert [one["family"] for one in found.hangs] == ["hangs"]
    assert not found.is_clean


def test_an_input_follows_from_its_number_and_every_seed_is_read(tmp_path) -> None:
    for name in FAMILIES:
        family = family_of(name, tmp_path)
        assert input_of(family, 0, 7) == input_of(family, 0, 7) != input_of(family, 0, 8)
        outcomes = [judged(family.parse, seed) for seed in family.seeds]
        assert {outcome for outcome, _ in outcomes} - {"read"} <= {
            "empty_archive", "labels_not_integers", "unsupported_format", "several_series",
            "not_three_dimensional",
        }, (name, outcomes)  # fmt: skip
        assert ("read", "") in outcomes, name
