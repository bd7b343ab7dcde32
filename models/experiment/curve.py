"""The label-efficiency curve as SVG: score over the share of labels, a line and band a method.

Drawn by hand, since a plotting library for one picture would be the largest dependency of the API.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from models.experiment.plan import ratio_name
from models.experiment.render import MEASURES
from models.experiment.report import Point, Report

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 200, 28, 52
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c6d31")
"""Okabe and Ito's, told apart by the colour-blind; the yellow, faint on white, replaced."""
DASHES = ("none", "6 3", "2 3", "8 3 2 3")


def svg(report: Report) -> str:
    """The picture; a ratio without a result is left out of its line."""
    points = [point for point in report.points if point.value is not None]
    low, high = _range(points)
    ratios = sorted(report.plan.ratios)

    def x(ratio: float) -> float:  # logarithmic: ratios halve and halve again
        if len(ratios) == 1:
            return LEFT + (WIDTH - LEFT - RIGHT) / 2
        along = math.log(ratio / ratios[0]) / math.log(ratios[-1] / ratios[0])
        return LEFT + along * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(report.name)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in _ticks(low, high):
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value), "#dddddd"))
        parts.append(_text(LEFT - 8, y(value) + 4, f"{100 * value:g}", "end"))
    for ratio in ratios:
        parts.append(_line(x(ratio), HEIGHT - BOTTOM, x(ratio), HEIGHT - BOTTOM + 5, "#444444"))
        parts.append(_text(x(ratio), HEIGHT - BOTTOM + 19, ratio_name(ratio), "middle"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "#444444"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 12, "labelled training patients (log scale)", "middle"))
    parts.append(_text(LEFT, TOP - 10, f"{MEASURES[report.measure]} (%)", "start"))
    for at, method in enumerate(report.plan.methods):
        colour, dash = COLOURS[at % len(COLOURS)], DASHES[at // len(COLOURS) % len(DASHES)]
        mine = sorted((p for p in points if p.method == method.name), key=lambda p: p.ratio)
        if mine:
            upper = [(x(p.ratio), y(_or(p.high, p.value))) for p in mine]
            lower = [(x(p.ratio), y(_or(p.low, p.value))) for p in mine]
            middle_line = [(x(p.ratio), y(_or(p.value, None))) for p in mine]
            parts.append(_band(upper + lower[::-1], colour))
            parts.append(_polyline(middle_line, colour, dash))
            parts += [_dot(*place, colour) for place in middle_line]
        top = TOP + 18 * at
        parts.append(
            _polyline([(WIDTH - RIGHT + 16, top), (WIDTH - RIGHT + 40, top)], colour, dash)
        )
        parts.append(_text(WIDTH - RIGHT + 46, top + 4, method.name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def _range(points: Sequence[Point]) -> tuple[float, float]:
    """From a twentieth below the lowest band to one above the highest, within [0, 1]."""
    values = [v for p in points for v in (p.low, p.value, p.high) if v is not None]
    if not values:
        return 0.0, 1.0
    low, high = max(0.0, min(values)), min(1.0, max(values))
    low, high = math.floor(20 * low) / 20, math.ceil(20 * high) / 20
    return (low, high) if low < high else (low - 0.05, high + 0.05)


def _ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 2) for at in range(first, last + 1)]


def _or(value: float | None, other: float | None) -> float:
    found = value if value is not None else other
    assert found is not None
    return found


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _listed(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _band(places: Sequence[tuple[float, float]], colour: str) -> str:
    return f'<polygon points="{_listed(places)}" fill="{colour}" fill-opacity="0.12"/>'


def _polyline(places: Sequence[tuple[float, float]], colour: str, dash: str) -> str:
    return (
        f'<polyline points="{_listed(places)}" fill="none" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dash}"/>'
    )


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
