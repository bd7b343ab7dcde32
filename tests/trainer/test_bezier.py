"""Non-linear intensities equal an interpolation of each view's own Bezier curve."""

import numpy as np
import torch

from trainer.data import bezier
from trainer.data.bezier import Curves


def a_view(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 1, 6, 5, 4, generator=torch.Generator().manual_seed(seed))


def curves(**given: torch.Tensor) -> Curves:
    drawn = bezier.draw(4, 1.0, 0.5, torch.Generator().manual_seed(3))
    fields = {name: given.get(name, getattr(drawn, name)) for name in ("inner", "falls", "applies")}
    return Curves(**fields)


def slowly(view: np.ndarray, inner: np.ndarray, falls: bool) -> np.ndarray:
    """The official code's way: many points of the curve, sorted, then `numpy.interp`."""
    t = np.linspace(0, 1, 100_000)
    points = np.array([[0, 0], *inner, [1, 1]])
    weights = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    x, y = points.T @ weights
    x, y = np.sort(x), np.sort(y)[::-1] if falls else np.sort(y)
    return np.interp(view, x, y)


def test_every_view_goes_through_the_curve_that_the_official_code_would_sort_and_interpolate() -> (
    None
):
    views, drawn = a_view(), curves(falls=torch.tensor([True, False, True, False]))

    out = bezier.apply(views, drawn)

    for view, got, inner, falls in zip(views, out, drawn.inner, drawn.falls, strict=True):
        expected = slowly(view.numpy(), inner.double().numpy(), bool(falls))
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-3)


def test_control_points_on_the_diagonal_change_nothing_and_falling_ones_invert() -> None:
    straight = torch.tensor([[1 / 3, 1 / 3], [2 / 3, 2 / 3]]).repeat(4, 1, 1)
    views = a_view()

    rising = bezier.apply(views, curves(inner=straight, falls=torch.zeros(4, dtype=torch.bool)))
    falling = bezier.apply(views, curves(inner=straight, falls=torch.ones(4, dtype=torch.bool)))

    torch.testing.assert_close(rising, views, atol=1e-6, rtol=0)
    torch.testing.assert_close(falling, 1 - views, atol=1e-6, rtol=0)


def test_a_view_that_is_not_chosen_stays_and_its_neighbour_does_not() -> None:
    views = a_view()

    out = bezier.apply(views, curves(applies=torch.tensor([False, True, False, True])))

    assert torch.equal(out[[0, 2]], views[[0, 2]])
    assert not torch.equal(out[[1, 3]], views[[1, 3]])


def test_limits_shift_and_scale_the_curve() -> None:
    views, drawn = a_view(), curves()
    low, high = torch.tensor([-3.0, 0.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 3.0, 9.0])
    span = (high - low)[:, None, None, None, None]
    shifted = low[:, None, None, None, None] + span * views

    out = bezier.apply(shifted, drawn, (low, high))

    expected = low[:, None, None, None, None] + span * bezier.apply(views, drawn)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_shares_are_those_asked_for() -> None:
    drawn = bezier.draw(4000, 0.9, 0.25, torch.Generator().manual_seed(0))

    assert abs(drawn.applies.float().mean() - 0.9) < 0.02
    assert abs(drawn.falls.float().mean() - 0.25) < 0.02
    assert drawn.inner.min() >= 0 and drawn.inner.max() <= 1
