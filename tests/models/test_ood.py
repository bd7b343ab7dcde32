"""The distance to a training set, and its threshold: against a slow definition."""

import math

import numpy as np
import pytest

from models import ood


def cluster(count, *, centre=0, seed=0, spread=0.1):
    vectors = spread * np.random.default_rng(seed).standard_normal((count, 8))
    vectors[:, centre] += 1.0
    return vectors


def slow_distance(vector, others, k):
    cosines = sorted(
        sum(a * b for a, b in zip(vector, other, strict=True))
        / (math.hypot(*vector) * math.hypot(*other))
        for other in others
    )
    return 1.0 - sum(cosines[-k:]) / k


@pytest.mark.parametrize("count", [5, 12])
def test_score_and_threshold_are_the_slow_definition(count):
    vectors = cluster(count)
    k = min(5, count - 1)
    own = sorted(
        slow_distance(vector, [*vectors[:n], *vectors[n + 1 :]], k)
        for n, vector in enumerate(vectors)
    )

    reference = ood.reference_of(vectors, quantile=0.5)
    found = ood.score(3.0 * cluster(1, seed=9)[0], reference)

    assert reference.threshold == pytest.approx(own[math.ceil(0.5 * (count - 1))], abs=1e-12)
    assert found.score == pytest.approx(slow_distance(cluster(1, seed=9)[0], vectors, k), abs=1e-12)
    assert found.n_reference == count


def test_another_direction_is_out_and_the_same_one_is_not():
    reference = ood.reference_of(cluster(40))

    assert ood.score(cluster(1, centre=3)[0], reference).is_out
    assert ood.score(-cluster(1, seed=5)[0], reference).is_out
    inside = [ood.score(one, reference).is_out for one in cluster(200, seed=7)]
    assert np.mean(inside) < 0.25  # the quantile is 0.95, of 40 scans


def test_leaving_a_scan_in_would_make_the_threshold_too_small():
    """The negative control of leaving out: every scan is nearest to itself."""
    vectors = cluster(10)
    left_in = [slow_distance(vector, vectors, 5) for vector in vectors]

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
