import numpy as np
import pytest

from models.flips import AXES, subsets_of, with_flips
from models.session import open_session


@pytest.fixture
def session(make_bundle, random_conv_model):
    return open_session(make_bundle(random_conv_model, labels=("a", "b")), num_threads=1)


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("axes", [(), ("i",), ("k",), ("i", "j"), AXES])
def test_probabilities_are_the_mean_over_all_mirror_images(session, axes):
    batch = np.random.default_rng(0).normal(size=(2, 1, 6, 5, 4)).astype(np.float32)
    views = [
        (flip_i, flip_j, flip_k)
        for flip_i in ([False, True] if "i" in axes else [False])
        for flip_j in ([False, True] if "j" in axes else [False])
        for flip_k in ([False, True] if "k" in axes else [False])
    ]
    total = np.zeros((2, 3, 6, 5, 4))
    for view in views:
        at = (slice(None), slice(None), *(slice(None, None, -1 if f else 1) for f in view))
        total += softmax(session.run(np.ascontiguousarray(batch[at])))[at]

    got = softmax(with_flips(session, axes).run(batch))

    np.testing.assert_allclose(got, total / len(views), atol=1e-6)
    if axes:  # the control: one view is another answer
        assert np.abs(got - softmax(session.run(batch))).max() > 1e-2
    assert len(subsets_of(axes)) == len(views)


def test_a_network_that_does_not_care_about_flips_stays_as_it_is(make_bundle, thresholds):
    session = open_session(make_bundle(thresholds()), num_threads=1)
    batch = np.random.default_rng(1).normal(size=(1, 1, 4, 4, 4)).astype(np.float32)

    got = with_flips(session, AXES).run(batch)

    np.testing.assert_allclose(softmax(got), softmax(session.run(batch)), atol=1e-6)
