"""The statistics of experiments against slow definitions, scipy, and simulated truths."""

import itertools

import numpy as np
import pytest
from scipy import stats

from models.experiment import statistics
from models.experiment.cases import CaseResult, CaseResults, CaseTable, weighted_auc
from models.experiment.statistics import difference, holm, interval, paired_test


def dice(values, subjects=None) -> CaseTable:
    """A run of one label on cases with these Dice values."""
    values = np.asarray(values, float)
    names = tuple(f"c{at:04d}" for at in range(len(values)))
    blank = np.full((len(values), 1), np.nan)
    return CaseTable("dice", names, tuple(subjects or names), values[:, None], blank)


def scored(scores, truth, subjects=None) -> CaseTable:
    scores, truth = np.asarray(scores, float), np.asarray(truth, float)
    names = tuple(f"c{at:04d}" for at in range(len(scores)))
    return CaseTable("auc", names, tuple(subjects or names), scores[:, None], truth[:, None])


@pytest.fixture
def few(monkeypatch):
    """Fewer resamples, where hundreds of intervals are made."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 400)
    monkeypatch.setattr(statistics, "NUM_PERMUTATIONS", 99)


def simulated(random, *, effect=0.0, num_seeds=3, patients=20, seed_sd=0.03, interaction=0.02):
    """Two methods in two-way layouts: patient, seed and interaction effects."""
    by_patient = random.normal(0.7, 0.08, patients)

    def runs(mean):
        offsets = random.normal(mean, seed_sd, num_seeds)
        noise = random.normal(0.0, interaction, (num_seeds, patients))
        return [dice(by_patient + offset + one) for offset, one in zip(offsets, noise, strict=True)]

    return runs(effect), runs(0.0)


def test_the_value_of_a_split_is_the_mean_over_labels_of_the_mean_over_cases_that_have_them():
    results = CaseResults(
        measure="dice",
        labels=("liver", "tumour"),
        cases=(
            CaseResult(case_id="b", subject="p2", values={"liver": 0.8}),
            CaseResult(case_id="a", subject="p1", values={"liver": 0.6, "tumour": 0.2}),
        ),
    )

    table = CaseTable.of(results)

    assert table.case_ids == ("a", "b")
    assert table.value()[0] == pytest.approx(((0.6 + 0.8) / 2 + 0.2) / 2)
    twice_b = table.value(np.array([[0.0, 2.0]]))
    assert twice_b[0] == pytest.approx(0.8)  # no case with a tumour is left
    np.testing.assert_allclose(table.case_values(), [0.4, 0.8])


def test_a_weighted_auc_counts_the_pairs_that_are_won():
    random = np.random.default_rng(0)
    scores = random.integers(0, 5, 30).astype(float)  # with ties
    truth = random.integers(0, 2, 30).astype(float)
    truth[3] = np.nan
    weights = random.integers(0, 4, (6, 30)).astype(float)

    fast = weighted_auc(scores, truth, weights)

    for row, found in zip(weights, fast, strict=True):
        won = total = 0.0
        for p, n in itertools.product(np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)):
            won += row[p] * row[n] * (float(scores[p] > scores[n]) + 0.5 * (scores[p] == scores[n]))
            total += row[p] * row[n]
        assert found == pytest.approx(won / total)
    assert np.isnan(weighted_auc(scores, np.ones(30), weights)).all()


def test_the_interval_of_one_seed_is_the_bootstrap_over_patients():
    values = np.random.default_rng(1).uniform(0.4, 0.9, 25)

    found = interval([dice(values)])

    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_cases_of_one_patient_are_drawn_together():
    values = np.repeat(np.random.default_rng(3).uniform(0.4, 0.9, 12), 10)
    patients = [f"p{at // 10}" for at in range(120)]

    together, apart = interval([dice(values, patients)]), interval([dice(values)])

    once = interval([dice(values[::10])])
    assert together.high - together.low == pytest.approx(once.high - once.low, rel=0.1)
    assert apart.high - apart.low < 0.5 * (together.high - together.low)  # what it would pretend


def test_intervals_hold_the_truth_as_often_as_they_say(few):
    random = np.random.default_rng(4)

    held = [
        found.low <= 0.1 <= found.high
        for found in (difference(*simulated(random, effect=0.1)) for _ in range(300))
    ]

    assert 0.92 <= np.mean(held) <= 1.0
    without_seeds = [  # the control: patients alone, and seeds that are not
        found.low <= 0.1 <= found.high
        for found in (
            difference(runs[:1], others[:1])
            for runs, others in (simulated(random, effect=0.1) for _ in range(100))
        )
    ]
    assert np.mean(without_seeds) < 0.5


def test_two_seeds_of_the_same_method_are_not_called_different():
    random = np.random.default_rng(5)

    tests = [paired_test(*simulated(random)) for _ in range(200)]

    assert np.mean([one.p < 0.05 for one in tests]) <= 0.07
    assert np.mean([one.p_patients < 0.05 for one in tests]) > 0.3  # the control: patients alone


def test_without_noise_of_seeds_the_level_is_kept_too():
    random = np.random.default_rng(6)

    tests = [paired_test(*simulated(random, seed_sd=0.0)) for _ in range(200)]

    assert np.mean([one.p < 0.05 for one in tests]) <= 0.07
    assert np.mean([one.p_patients < 0.05 for one in tests]) <= 0.08


def test_a_real_effect_is_found():
    random = np.random.default_rng(7)

    tests = [paired_test(*simulated(random, effect=0.15, num_seeds=5)) for _ in range(40)]

    assert np.mean([one.p < 0.05 for one in tests]) > 0.9


def test_the_tests_are_scipys():
    random = np.random.default_rng(8)
    runs, others = simulated(random, effect=0.02)

    found = paired_test(runs, others)

    by_patient = np.mean([a.values - b.values for a, b in zip(runs, others, strict=True)], axis=0)
    by_seed = [a.values.mean() for a in runs], [b.values.mean() for b in others]
    assert found.p_patients == pytest.approx(stats.wilcoxon(by_patient[:, 0]).pvalue)
    assert found.p_seeds == pytest.approx(stats.ttest_rel(*by_seed).pvalue)
    assert found.p == max(found.p_patients, found.p_seeds)
    assert paired_test(runs[:1], others[:1]).p_seeds is None


def test_a_method_against_itself_differs_by_nothing():
    runs, _ = simulated(np.random.default_rng(9))

    found = paired_test(runs, runs)

    assert (found.p_patients, found.p_seeds, found.p) == (1.0, 1.0, 1.0)
    none = difference(runs, runs)
    assert (none.value, none.low, none.high) == (0.0, 0.0, 0.0)


def test_classifiers_are_compared_by_swapping_patients(few):
    random = np.random.default_rng(10)
    truth = np.repeat([0.0, 1.0], 40)
    patients = [f"p{at // 2}" for at in range(80)]

    def method(strength):  # scales differ on purpose: ranks alone count
        return scored(np.exp(truth * strength + random.normal(0, 1, 80)) * 9, truth, patients)

    better = paired_test([method(3.0)], [method(0.3)])
    nulls = [paired_test([method(1.0)], [method(1.0)]).p for _ in range(30)]

    assert better.p == pytest.approx(1 / 100)
    assert np.mean([p <= 0.05 for p in nulls]) <= 0.15
    assert np.mean(nulls) > 0.3
    same = method(1.0)
    scaled = CaseTable(same.measure, same.case_ids, same.subjects, same.values * 7, same.truth)
    assert paired_test([same], [scaled]).p == 1.0


def test_holm_is_the_step_down_procedure():
    random = np.random.default_rng(11)
    for _ in range(20):
        p_values = random.uniform(0, 0.2, 6).tolist()

        corrected = holm(p_values)

        for level in (0.01, 0.05, 0.1, 0.3):
            rejected = set()
            for rank, at in enumerate(np.argsort(p_values)):  # stop at the first that is kept
                if p_values[at] > level / (6 - rank):
                    break
                rejected.add(int(at))
            assert {at for at in range(6) if corrected[at] <= level} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_runs_judged_on_different_cases_are_not_compared():
    with pytest.raises(ValueError, match="different cases"):
        difference([dice([0.5, 0.6])], [dice([0.5, 0.6, 0.7])])


def test_resamples_taken_in_blocks_are_the_same(monkeypatch):
    run = dice(np.random.default_rng(12).uniform(0.4, 0.9, 15))
    whole = interval([run])

    monkeypatch.setattr(statistics, "BLOCK_VALUES", 15 * 7)

    blocks = interval([run])
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), abs=1e-12)
