"""From image planes to a grid: which belong together, in which order, and whether they fit.

Planes that fill a box evenly are its slices as they are. A tilted gantry and uneven gaps are told
by name, so that the caller may put the slices on a regular grid (`imaging.slices`) by their places
or refuse them; where that would be guessing, they are refused here.

Axes: C columns, R rows, S slices in the order of their position along the slice normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imaging.checks import MAX_SHEAR
from imaging.dicom_header import Frame, Header
from imaging.errors import ScanError
from imaging.slices import Slices
from imaging.volume import Grid

MAX_UNEVENNESS = 0.05
"""Largest distance of a slice from its even place, as a share of the gap."""

MAX_TILT_DEG = 45.0
"""Gantries tilt by 30 degrees at most; what lies further over is no tilt."""

MAX_GAP_MM = 10.0
"""Uneven gaps wider than this would be filled with what nobody measured."""

MIN_GAP_MM = 0.1
"""Uneven gaps narrower than this are positions written carelessly."""

_SAME_DIRECTION = 1e-3
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


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


@dataclass(frozen=True, slots=True)
class Arranged:
    """Parallel planes in the order of their depth, and where they lie (RAS+)."""

    planes: list[Plane]
    slices: Slices
    grid: Grid | None
    """(C, R, S); None where the slices fill no box."""
    irregularity: ScanError | None
    """`gantry_tilt` or `uneven_spacing`, where they do not."""


def arrange(planes: list[Plane]) -> Arranged:
    """Sort parallel planes along their normal and find the grid (C, R, S) that they fill.

    Raises:
        ScanError: `bad_geometry`, `duplicate_slices`, `missing_slices`, and `gantry_tilt` or
            `uneven_spacing` where no safe way leads to a grid; `extra` holds the members and the
            SOP instance UIDs concerned.
    """
    first = planes[0].frame
    along_columns, along_rows, normal = _directions(first)
    positions = np.array([plane.frame.position_mm for plane in planes], dtype=np.float64)  # (S, 3)
    depth = positions @ normal
    order = np.argsort(depth, kind="stable")
    planes, positions, depth = [planes[s] for s in order], positions[order], depth[order]
    gaps = np.diff(depth)

    _refuse_duplicates(planes, gaps)
    uneven = _unevenness(planes, depth, gaps)
    if uneven is not None and uneven.code == "missing_slices":
        raise uneven
    tilt = _tilt(positions, depth)
    _refuse_disorder(positions, depth)
    row_gap, column_gap = first.spacing_mm
    slices = Slices(
        (planes[0].header.columns, planes[0].header.rows, len(planes)),
        _LPS_TO_RAS @ (along_columns * column_gap),
        _LPS_TO_RAS @ (along_rows * row_gap),
        positions @ _LPS_TO_RAS,
    )
    if tilt is not None or uneven is not None:
        return Arranged(planes, slices, None, tilt or uneven)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = slices.column_step_mm, slices.row_step_mm
    affine[:3, 2] = (slices.positions_mm[-1] - slices.positions_mm[0]) / (len(planes) - 1)
    affine[:3, 3] = slices.positions_mm[0]
    return Arranged(planes, slices, Grid(slices.shape, affine), None)


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
            _concerned(planes, {int(s + d) for s in same for d in (0, 1)}),
        )


def _tilt(positions: NDArray[np.float64], depth: Direction) -> ScanError | None:
    length = float(np.linalg.norm(positions[-1] - positions[0]))
    cosine = min(1.0, (depth[-1] - depth[0]) / length)
    sine = float(np.sqrt(1 - cosine**2))
    if sine <= MAX_SHEAR:
        return None
    angle = float(np.degrees(np.arcsin(sine)))
    error = ScanError(
        "gantry_tilt",
        f"the slices are stacked at {angle:.1f} degrees to their normal; expected 0",
        {"angle_deg": round(angle, 2)},
    )
    if angle > MAX_TILT_DEG:
        raise error
    return error


def _unevenness(planes: list[Plane], depth: Direction, gaps: Direction) -> ScanError | None:
    gap = float(np.median(gaps))
    even = np.linspace(depth[0], depth[-1], len(depth))
    mean_gap = (depth[-1] - depth[0]) / len(gaps)
    if np.abs(depth - even).max() <= MAX_UNEVENNESS * mean_gap:
        return None
    smallest, widest = float(gaps.min()), float(gaps.max())
    num_steps = gaps / smallest
    wide = {int(s) for s in np.flatnonzero(gaps > 1.5 * smallest)}
    beside = _concerned(planes, {s + d for s in wide for d in (0, 1)})
    if wide and np.abs(num_steps - np.round(num_steps)).max() < 0.1:
        missing = int(np.round(num_steps).sum()) - len(gaps)
        return ScanError(
            "missing_slices",
            f"{missing} slices are missing: gaps of {smallest:.3f} mm and of {widest:.3f} mm",
            beside,
        )
    error = ScanError(
        "uneven_spacing",
        f"gaps between slices run from {smallest:.3f} to {widest:.3f} mm, median {gap:.3f}; "
        "expected one gap throughout",
        beside,
    )
    if widest > MAX_GAP_MM or smallest < MIN_GAP_MM:
        raise error
    return error


def _refuse_disorder(positions: NDArray[np.float64], depth: Direction) -> None:
    """First pixels must lie on one line, whatever the gaps and the tilt."""
    share = (depth - depth[0]) / (depth[-1] - depth[0])
    line = positions[0] + share[:, None] * (positions[-1] - positions[0])
    mean_gap = (depth[-1] - depth[0]) / (len(depth) - 1)
    if np.abs(positions - line).max() > max(0.1, MAX_UNEVENNESS * mean_gap):
        raise ScanError("bad_geometry", "the slices are shifted against each other in plane")


def _concerned(planes: list[Plane], slices: set[int]) -> dict[str, object]:
    """Members and SOP instance UIDs of some slices."""
    headers = {planes[s].header.member: planes[s].header for s in sorted(slices)}
    return {
        "members": sorted(headers),
        "sop_uids": [headers[member].sop_uid for member in sorted(headers)],
    }
