"""The distance to a training set, and its threshold: against a slow definition."""

import math

import numpy as np
import pytest

from models import ood


def cluster(count, *, centre=0, seed=0, spread=0.1):
    vectors = spread * np.random.default_rng(seed).standard_normal((count, 8))
    vectors[:, centre] += 1.0
    return vectors


def slow_covariance(vectors):
    """Ledoit and Wolf (2004), sum by sum."""
    count, dims = vectors.shape
    centred = vectors - vectors.mean(axis=0)
    sample = sum(np.outer(row, row) for row in centred) / count
    target = np.trace(sample) / dims * np.eye(dims)
    spread = ((sample - target) ** 2).sum()
    error = sum(((np.outer(row, row) - sample) ** 2).sum() for row in centred) / count**2
    share = min(error, spread) / spread
    return share * target + (1 - share) * sample


def slow_distance(vector, others):
    units = np.stack([other / math.hypot(*other) for other in others])
    away = vector / math.hypot(*vector) - units.mean(axis=0)
    return math.sqrt(away @ np.linalg.solve(slow_covariance(units), away))


def slow_cosine_distance(vector, others, k):
    cosines = sorted(
        sum(a * b for a, b in zip(vector, other, strict=True))
        / (math.hypot(*vector) * math.hypot(*other))
        for other in others
    )
    return 1.0 - sum(cosines[-k:]) / k


@pytest.mark.parametrize("count", [5, 12])
def test_score_and_threshold_are_the_slow_definition(count):
    vectors = cluster(count)
    own = sorted(
        slow_distance(vector, [*vectors[:n], *vectors[n + 1 :]]) for n, vector in enumerate(vectors)
    )

    reference = ood.reference_of(vectors, quantile=0.5)
    found = ood.score(3.0 * cluster(1, seed=9)[0], reference)

    assert reference.threshold == pytest.approx(own[math.ceil(0.5 * (count - 1))], rel=1e-6)
    assert found.score == pytest.approx(slow_distance(cluster(1, seed=9)[0], vectors), rel=1e-6)
    assert (found.n_reference, found.method) == (count, "mahalanobis")


def test_a_reference_of_before_is_judged_by_its_cosine():
    vectors = cluster(12)

    reference = ood.restored(vectors, num_neighbours=5, threshold=0.01)
    found = ood.score(cluster(1, seed=9)[0], reference)

    expected = slow_cosine_distance(cluster(1, seed=9)[0], vectors, 5)
    assert found.score == pytest.approx(expected, abs=1e-12)
    assert (found.threshold, found.method) == (0.01, "cosine")


def test_what_the_training_scans_never_do_is_far_however_small():
    """A direction without variance: the cosine hardly sees it, Mahalanobis does."""
    vectors = cluster(150)
    vectors[:, 7] *= 0.01
    strange = vectors[0].copy()
    strange[7] = 0.2

    now = ood.score(strange, ood.reference_of(vectors))
    before = ood.score(strange, ood.restored(vectors, num_neighbours=5, threshold=1.0))

    assert now.is_out and now.score > 1.5 * now.threshold
    own = [slow_cosine_distance(one, np.delete(vectors, n, 0), 5) for n, one in enumerate(vectors)]
    assert before.score < 1.5 * max(own)


def test_scans_that_are_all_the_same_have_a_threshold():
    reference = ood.reference_of(np.ones((6, 4)))

    assert 0.0 <= reference.threshold < 1e-3
    assert not ood.score(np.ones(4), reference).is_out
    assert ood.score(np.array([1.0, 1.0, 1.0, 1.1]), reference).is_out


def test_another_direction_is_out_and_the_same_one_is_not():
    reference = ood.reference_of(cluster(40))

    assert ood.score(cluster(1, centre=3)[0], reference).is_out
    assert ood.score(-cluster(1, seed=5)[0], reference).is_out
    inside = [ood.score(one, reference).is_out for one in cluster(200, seed=7)]
    assert np.mean(inside) < 0.25  # the quantile is 0.95, of 40 scans


def test_leaving_a_scan_in_would_make_the_threshold_too_small():
    """The negative control of leaving out: every scan is nearest to itself."""
    vectors = cluster(10)
    left_in = [slow_distance(vector, vectors) for vector in vectors]

    assert ood.reference_of(vectors, quantile=1.0).threshold > 1.05 * max(left_in)


def test_of_few_scans_the_largest_distance_is_the_threshold():
    vectors = cluster(6)
    assert ood.reference_of(vectors).threshold == ood.reference_of(vectors, quantile=1.0).threshold


@pytest.mark.parametrize(
    "vectors", [np.ones((4, 3)), np.zeros((6, 3)), np.full((6, 3), np.nan), np.ones(6)]
)
def test_what_is_no_set_of_embeddings_is_refused(vectors):
    with pytest.raises(ValueError, match=r"scans|finite"):
        ood.reference_of(vectors)


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(ValueError, match="fit"):
        ood.score(np.ones(3), ood.reference_of(cluster(6)))
