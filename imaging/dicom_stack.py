"""From image planes to a grid: which belong together, in which order, and whether they fit.

Planes that do not fill a box evenly are refused by name; nothing is guessed or filled in.

Axes: C columns, R rows, S slices in the order of their position along the slice normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imaging.checks import MAX_SHEAR
from imaging.dicom_header import Frame, Header
from imaging.errors import ScanError
from imaging.volume import Affine

MAX_UNEVENNESS = 0.05
"""Largest distance of a slice from its even place, as a share of the gap."""

_SAME_DIRECTION = 1e-3
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, slots=True)
class Plane:
    """A frame with the object that it is in."""

    header: Header
    frame: Frame

    def is_parallel_to(self, other: Plane) -> bool:
        """Whether both have the same matrix, pixel size, direction and frame of reference."""
        mine, theirs = self.header, other.header
        return (
            (mine.rows, mine.columns) == (theirs.rows, theirs.columns)
            and mine.frame_of_reference == theirs.frame_of_reference
            and np.allclose(self.frame.spacing_mm, other.frame.spacing_mm, rtol=1e-4, atol=0)
            and np.allclose(
                self.frame.orientation, other.frame.orientation, rtol=0, atol=_SAME_DIRECTION
            )
        )


def stacks(planes: list[Plane]) -> list[list[Plane]]:
    """Group planes that may lie on one grid, largest group first."""
    groups: list[list[Plane]] = []
    for plane in planes:
        for group in groups:
            if plane.is_parallel_to(group[0]):
                group.append(plane)
                break
        else:
            groups.append([plane])
    return sorted(groups, key=len, reverse=True)


def arrange(planes: list[Plane]) -> tuple[list[Plane], Affine]:
    """Sort parallel planes along their normal and find the grid (C, R, S) that they fill.

    Returns:
        The planes in order, and the affine from (C, R, S) to RAS+ mm.

    Raises:
        ScanError: `bad_geometry`, `duplicate_slices`, `gantry_tilt`, `missing_slices`,
            `uneven_spacing`; `extra` holds the members concerned.
    """
    first = planes[0].frame
    along_columns, along_rows, normal = _directions(first)
    positions = np.array([plane.frame.position_mm for plane in planes], dtype=np.float64)  # (S, 3)
    depth = positions @ normal
    order = np.argsort(depth, kind="stable")
    planes, positions, depth = [planes[s] for s in order], positions[order], depth[order]
    gaps = np.diff(depth)

    _refuse_duplicates(planes, gaps)
    _refuse_tilt(positions, depth)
    _refuse_unevenness(planes, depth, gaps)
    step = (positions[-1] - positions[0]) / (len(planes) - 1)
    even = positions[0] + np.arange(len(planes))[:, None] * step
    if np.abs(positions - even).max() > max(0.1, MAX_UNEVENNESS * np.linalg.norm(step)):
        raise ScanError("bad_geometry", "the slices are shifted against each other in plane")

    row_gap, column_gap = first.spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = along_columns * column_gap
    affine[:3, 1] = along_rows * row_gap
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return planes, _LPS_TO_RAS @ affine


Direction = NDArray[np.float64]


def _directions(frame: Frame) -> tuple[Direction, Direction, Direction]:
    """Unit vectors of growing column index, growing row index, and of the slice normal."""
    axes = np.asarray(frame.orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > 1e-2 or abs(axes[0] @ axes[1]) > _SAME_DIRECTION:
        raise ScanError("bad_geometry", "ImageOrientationPatient is not two unit vectors at 90 deg")
    along_columns, along_rows = axes / lengths[:, None]
    normal = np.cross(along_columns, along_rows)
    return along_columns, along_rows, normal / np.linalg.norm(normal)


def _refuse_duplicates(planes: list[Plane], gaps: Direction) -> None:
    same = np.flatnonzero(gaps < 1e-3)
    if same.size:
        raise ScanError(
            "duplicate_slices",
            f"{same.size + 1 if same.size == len(gaps) else same.size} of {len(planes)} slices lie "
            "on top of another one (several volumes in one series?); expected one a position",
            {"members": _members(planes, {int(s + d) for s in same for d in (0, 1)})},
        )


def _refuse_tilt(positions: NDArray[np.float64], depth: Direction) -> None:
    length = float(np.linalg.norm(positions[-1] - positions[0]))
    cosine = min(1.0, (depth[-1] - depth[0]) / length)
    sine = float(np.sqrt(1 - cosine**2))
    if sine > MAX_SHEAR:
        angle = float(np.degrees(np.arcsin(sine)))
        raise ScanError(
            "gantry_tilt",
            f"the slices are stacked at {angle:.1f} degrees to their normal; expected 0",
            {"angle_deg": round(angle, 2)},
        )


def _refuse_unevenness(planes: list[Plane], depth: Direction, gaps: Direction) -> None:
    gap = float(np.median(gaps))
    even = np.linspace(depth[0], depth[-1], len(depth))
    mean_gap = (depth[-1] - depth[0]) / len(gaps)
    if np.abs(depth - even).max() <= MAX_UNEVENNESS * mean_gap:
        return
    smallest = float(gaps.min())
    num_steps = gaps / smallest
    wide = {int(s) for s in np.flatnonzero(gaps > 1.5 * smallest)}
    beside = {"members": _members(planes, {s + d for s in wide for d in (0, 1)})}
    if wide and np.abs(num_steps - np.round(num_steps)).max() < 0.1:
        missing = int(np.round(num_steps).sum()) - len(gaps)
        raise ScanError(
            "missing_slices",
            f"{missing} slices are missing: gaps of {smallest:.3f} mm and of {gaps.max():.3f} mm",
            beside,
        )
    raise ScanError(
        "uneven_spacing",
        f"gaps between slices run from {smallest:.3f} to {gaps.max():.3f} mm, median {gap:.3f}; "
        "expected one gap throughout",
        beside,
    )


def _members(planes: list[Plane], slices: set[int]) -> list[int]:
    return sorted({planes[s].header.member for s in slices})
