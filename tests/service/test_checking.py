"""How a golden case is judged: Dice and cosine against their definitions."""

import numpy as np
import pytest

from service.checking import cosine, dice


def slow_dice(found, expected):
    both = one = other = 0
    for a, b in zip(found.ravel(), expected.ravel(), strict=True):
        both, one, other = both + (a and b), one + a, other + b
    return 2.0 * both / (one + other)


def test_dice_is_that_of_the_definition():
    random = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        found, expected = random.random((2, 5, 6, 7)) < share

        assert dice(found, expected) == pytest.approx(slow_dice(found, expected))


def test_dice_at_its_ends():
    none, some = np.zeros((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    some[0, 0, 0] = True
    other = np.roll(some, 1, axis=2)

    assert (dice(none, none), dice(some, some)) == (1.0, 1.0)
    assert (dice(none, some), dice(some, none), dice(some, other)) == (0.0, 0.0, 0.0)


def test_cosine_is_that_of_the_definition_whatever_the_lengths_of_the_arrows():
    one, other = np.array([3.0, 4.0], np.float32), np.array([4.0, 3.0], np.float32)

    assert cosine(one, other) == pytest.approx(24 / 25)
    assert cosine(7 * one, 0.1 * other) == pytest.approx(24 / 25)
    assert cosine(one, one) == pytest.approx(1.0) and cosine(one, -one) == pytest.approx(-1.0)


def test_vectors_that_cannot_be_compared_are_not_alike():
    one = np.array([1.0, 0.0])

    assert (cosine(one, np.zeros(2)), cosine(one, np.ones(3))) == (0.0, 0.0)
