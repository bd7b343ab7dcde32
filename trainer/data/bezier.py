"""Non-linear intensities of Models Genesis: every view through a monotone curve of its own.

Zhou et al., "Models Genesis", 2019, section 3.1. A cubic Bezier curve runs from (0, 0) to (1, 1)
through two control points drawn in the unit square; intensities are its abscissas, what becomes of
them its ordinates. With control points in the unit square both coordinates rise along the whole
curve, so the map is a function and monotone without the sorting of the official code.

B batch, T knots, I J K voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.to_device import to_device

NUM_KNOTS = 1025
"""Points at which a curve is computed; between them it is linear."""


@dataclass(frozen=True, slots=True)
class Curves:
    """What is drawn for each view.

    Attributes:
        inner: Abscissa and ordinate of the two inner control points, in [0, 1], (B, 2, 2).
        falls: Whether the map falls from 1 to 0 instead of rising, bool (B,).
        applies: Whether the view goes through its curve at all, bool (B,).
    """

    inner: Tensor
    falls: Tensor
    applies: Tensor


def draw(
    batch_size: int, probability: float, falling_share: float, random: torch.Generator
) -> Curves:
    """Curves on the host: `probability` of applying one, `falling_share` of those that fall."""
    return Curves(
        inner=torch.rand(batch_size, 2, 2, generator=random),
        falls=torch.rand(batch_size, generator=random) < falling_share,
        applies=torch.rand(batch_size, generator=random) < probability,
    )


def apply(views: Tensor, curves: Curves, limits: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Send every voxel through its view's curve.

        for each view with `applies`, each voxel of value x (in [0, 1] between the limits):
            find s with X(s) = x
            out = Y(1 - s) if the curve falls else Y(s)

    Args:
        views: (B, 1, I, J, K).
        curves: What was drawn, for B views.
        limits: Least and greatest intensity of each view, (B,) each; None is 0 and 1. What lies
            beyond takes the value at the limit.
    """
    device = views.device
    inner = to_device(curves.inner, device)
    x_knots, y_knots = bezier(inner).unbind(dim=2)  # (B, T)
    y_knots = torch.where(to_device(curves.falls, device)[:, None], y_knots.flip(1), y_knots)
    by_slice = views.permute(0, 1, 4, 2, 3)  # as views lie in memory (`augment`)
    flat = by_slice.flatten(1)
    low, span = torch.zeros_like(flat[:, :1]), torch.ones_like(flat[:, :1])
    if limits is not None:
        low = limits[0][:, None]
        span = (limits[1][:, None] - low).clamp(min=1e-6)
    mapped = low + span * interpolate((flat - low) / span, x_knots, y_knots)
    applies = to_device(curves.applies, device)[:, None]
    return torch.where(applies, mapped, flat).reshape(by_slice.shape).permute(0, 1, 3, 4, 2)


def bezier(inner: Tensor) -> Tensor:
    """Points of the curves from (0, 0) to (1, 1), (B, T, 2), for inner control points (B, 2, 2)."""
    s = torch.linspace(0, 1, NUM_KNOTS, device=inner.device, dtype=inner.dtype)[:, None]
    first, second = inner[:, :1], inner[:, 1:]  # (B, 1, 2)
    return 3 * (1 - s) ** 2 * s * first + 3 * (1 - s) * s**2 * second + s**3


def interpolate(x: Tensor, x_knots: Tensor, y_knots: Tensor) -> Tensor:
    """`numpy.interp` for a batch: (B, n) at knots (B, T) whose abscissas do not fall."""
    after = torch.searchsorted(x_knots.contiguous(), x.contiguous()).clamp(1, x_knots.shape[1] - 1)
    x0, x1 = x_knots.gather(1, after - 1), x_knots.gather(1, after)
    y0, y1 = y_knots.gather(1, after - 1), y_knots.gather(1, after)
    share = ((x - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)
    return torch.lerp(y0, y1, share)
