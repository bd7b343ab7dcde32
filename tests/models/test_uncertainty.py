import numpy as np
import pytest

from imaging.resample import resample, resampled_grid
from imaging.volume import Grid
from models.bundle import Quality
from models.uncertainty import EntropyMeter, Uncertainty, calibrated, entropy, judged

LIMIT = Quality(max_foreground_entropy=0.3, min_dice=0.7, num_cases=3, num_good=2, split="val")


def slow_entropy(logits):
    """Of one voxel, in float64."""
    powers = np.exp(logits.astype(np.float64))
    p = powers / powers.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(len(p)))


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_the_entropy_is_that_of_the_textbook(num_classes):
    logits = np.random.default_rng(0).normal(size=(num_classes, 4, 3)).astype(np.float32) * 4

    got = entropy(logits)

    for place in np.ndindex(4, 3):
        assert got[place] == pytest.approx(slow_entropy(logits[:, *place]), abs=1e-5)


def test_equal_logits_know_nothing_and_a_large_one_knows_all():
    logits = np.array([[5.0, 900.0], [5.0, -900.0], [5.0, 0.0]], np.float32)

    np.testing.assert_allclose(entropy(logits), [1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("with_map", [False, True])
def test_means_over_slabs_are_those_over_the_whole(with_map):
    logits = np.random.default_rng(1).normal(size=(3, 6, 5, 9)).astype(np.float32) * 2
    winner, values = logits.argmax(axis=0), entropy(logits)
    meter = EntropyMeter(["a", "b"], (6, 5, 9) if with_map else None)

    for first, stop in ((0, 4), (4, 5), (5, 9)):
        meter.add(logits[..., first:stop], plane=first)

    found = meter.result()
    assert found.mean_foreground_entropy == pytest.approx(values[winner > 0].mean(), rel=1e-5)
    assert found.label_entropies["a"] == pytest.approx(values[winner == 1].mean(), rel=1e-5)
    assert found.label_entropies["b"] == pytest.approx(values[winner == 2].mean(), rel=1e-5)
    assert abs(values.mean() - values[winner > 0].mean()) > 1e-3  # background would be seen


def test_a_scan_without_labels_has_no_mean():
    meter = EntropyMeter(["a"])
    meter.add(np.stack([np.ones((2, 2, 2)), np.zeros((2, 2, 2))]).astype(np.float32))

    assert meter.result() == Uncertainty(None, {})


def test_the_map_is_the_entropy_resampled(monkeypatch):
    monkeypatch.setattr("models.uncertainty._SLAB_VOXELS", 500)  # several slabs
    network = Grid((9, 8, 11), np.diag([2.0, 2.0, 2.0, 1.0]))
    target = resampled_grid(network, (1.1, 0.9, 1.4))
    logits = np.random.default_rng(2).normal(size=(3, *network.shape)).astype(np.float32)
    meter = EntropyMeter(["a", "b"], network.shape)
    meter.add(logits)

    got = meter.map_on(network, target)

    expected = 255 * resample(entropy(logits), network, target, order=1)
    assert got.dtype == np.uint8
    assert np.abs(got - expected).max() <= 1.01  # two roundings
    assert np.ptp(got) > 100


def test_the_threshold_is_the_highest_entropy_of_a_scan_that_came_out_well():
    cases = [(0.10, 0.91), (0.22, 0.74), (0.35, 0.40), (None, 0.9), (0.05, 0.69)]

    found = calibrated(cases, min_dice=0.7, split="val")

    assert (found.max_foreground_entropy, found.num_cases, found.num_good) == (0.22, 5, 2)
    assert calibrated(cases, min_dice=0.99, split="val").max_foreground_entropy == 0.0


@pytest.mark.parametrize(
    ("value", "quality", "concerns", "flag", "reasons"),
    [
        (0.30, LIMIT, [], "ok", ()),
        (0.31, LIMIT, [], "review", ("uncertain",)),
        (None, LIMIT, [], "review", ("nothing_found",)),
        (0.31, None, [], "unknown", ()),
        (0.10, LIMIT, ["box_reaches_edge"], "review", ("box_reaches_edge",)),
        (0.10, None, ["stages_disagree"], "review", ("stages_disagree",)),
    ],
)
def test_a_result_is_flagged_by_its_bundles_threshold(value, quality, concerns, flag, reasons):
    got = judged(Uncertainty(value, {}), quality, concerns)

    assert (got.flag, got.reasons) == (flag, reasons)
