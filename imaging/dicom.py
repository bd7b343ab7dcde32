"""A DICOM series to a volume; the only place where LPS becomes RAS (in `dicom_stack.arrange`).

Two passes over the files: headers first, then pixels of the one series, a file at a time, so the
peak is about one volume. Every file that is not used is explained.

Axes: C columns, R rows, S slices as in the files; I J K in RAS+ after `canonical`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from imaging.checks import check_affine, narrowed
from imaging.dicom_header import Header, looks_like_dicom, read_header, read_pixels
from imaging.dicom_stack import Plane, arrange, stacks
from imaging.errors import ScanError
from imaging.limits import MAX_FILE_BYTES, MAX_VOXELS, read_capped, shared_reads
from imaging.volume import Array, Grid, Volume, canonical

Source = Path | Callable[[], BinaryIO]
"""A file, or a function that opens one (the member of an archive)."""

_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True, slots=True)
class Unused:
    """A file that does not take part in the volume, and why."""

    member: int
    reason: str


@dataclass(frozen=True, slots=True)
class Series:
    """A series as a volume, with what its headers say."""

    volume: Volume
    source: Grid
    """Columns, rows, slices of the files."""
    modality: str
    series_uid: str
    patient_key: str
    unused: tuple[Unused, ...]


def read_series(files: Sequence[Source], *, series_uid: str | None = None) -> Series:
    """Read the one image series among the files, or the one asked for.

    Voxels are int16 where that holds every value, else float32.

    Args:
        files: DICOM files of any kind in any order; a file's place is its `member` in reports.
        series_uid: Which series, where there are several.

    Raises:
        ScanError: `not_a_scan`, `several_series`, `no_such_series`, `not_three_dimensional`,
            `duplicate_slices`, `gantry_tilt`, `missing_slices`, `uneven_spacing`, `bad_geometry`,
            `unsupported_transfer_syntax`, `unsupported_format`, `truncated_file`, `too_large`.
    """
    with shared_reads(len(files)):
        headers, unused = _headers(files)
    chosen = _choose(headers, series_uid)
    others = [header for header in headers if header.series_uid != chosen[0].series_uid]
    unused += [Unused(header.member, "part of another series") for header in others]
    planes, left_over = _one_stack(chosen)
    unused += left_over
    ordered, affine = arrange(planes)
    check_affine(affine, "slice geometry")
    voxels = _voxels(files, ordered)
    first = ordered[0].header
    return Series(
        volume=canonical(voxels, affine),
        source=Grid((voxels.shape[0], voxels.shape[1], voxels.shape[2]), affine),
        modality=first.modality,
        series_uid=first.series_uid,
        patient_key=first.patient_key,
        unused=tuple(sorted(unused, key=lambda one: one.member)),
    )


def _headers(files: Sequence[Source]) -> tuple[list[Header], list[Unused]]:
    headers: list[Header] = []
    unused: list[Unused] = []
    refusals: list[ScanError] = []
    seen: set[tuple[str, str, tuple[float, ...]]] = set()
    for member, file in enumerate(files):
        try:
            header = read_header(_content(file, only_dicom=True), member)
        except ScanError as error:
            if error.code == "too_large":
                raise
            refusals.append(error)
            unused.append(Unused(member, error.detail))
            continue
        identity = (header.series_uid, header.sop_uid, header.frames[0].position_mm)
        if header.sop_uid and identity in seen:
            unused.append(Unused(member, "the same image as another file"))
            continue
        seen.add(identity)
        headers.append(header)
    if not headers:
        raise _none_usable(refusals)
    return headers, unused


def _none_usable(refusals: list[ScanError]) -> ScanError:
    """The most telling of the reasons why no file is an image."""
    for refusal in refusals:
        if refusal.code != "not_a_scan":
            return refusal
    reasons = sorted({refusal.detail for refusal in refusals})
    found = "; ".join(reasons[:5]) or "no files"
    return ScanError("not_a_scan", f"no CT, MR or PET images among {len(refusals)} files: {found}")


def _content(file: Source, *, only_dicom: bool = False) -> bytes:
    with file.open("rb") if isinstance(file, Path) else file() as stream:
        start = stream.read(132)
        if only_dicom and not looks_like_dicom(start):
            raise ScanError("not_a_scan", "not a DICOM object")
        return read_capped(stream, MAX_FILE_BYTES, start=start)


def _choose(headers: list[Header], series_uid: str | None) -> list[Header]:
    by_series: dict[str, list[Header]] = {}
    for header in headers:
        by_series.setdefault(header.series_uid, []).append(header)
    found: list[object] = [
        {"series_uid": uid, "modality": group[0].modality, "num_files": len(group)}
        for uid, group in by_series.items()
    ]
    if series_uid is None and len(by_series) == 1:
        return headers
    if series_uid is None:
        detail = f"{len(by_series)} image series; say which by series_uid"
        raise ScanError("several_series", detail, {"series": found})
    if series_uid not in by_series:
        detail = f"no image series with the asked series_uid among {len(by_series)}"
        raise ScanError("no_such_series", detail, {"series": found})
    return by_series[series_uid]


def _one_stack(headers: list[Header]) -> tuple[list[Plane], list[Unused]]:
    """The planes of the series that lie parallel; a lone plane across them is left out."""
    groups = stacks([Plane(header, frame) for header in headers for frame in header.frames])
    largest, others = groups[0], groups[1:]
    if len(largest) < 2:
        raise ScanError(
            "not_three_dimensional",
            "a single slice; expected a volume" if not others else "no two slices are parallel",
        )
    if any(len(group) > 1 for group in others):
        sizes = ", ".join(str(len(group)) for group in groups)
        raise ScanError(
            "bad_geometry",
            f"the series holds stacks of {sizes} slices that differ in direction or size",
        )
    used = {plane.header.member for plane in largest}
    reason = "a single slice of another direction or size"
    return largest, [
        Unused(group[0].header.member, reason)
        for group in others
        if group[0].header.member not in used
    ]


def _voxels(files: Sequence[Source], planes: list[Plane]) -> Array:
    """Pixels of the planes in order, rescaled: (C, R, S) in Fortran order."""
    header = planes[0].header
    shape = (header.columns, header.rows, len(planes))
    if int(np.prod(shape)) > MAX_VOXELS:
        raise ScanError("too_large", f"{shape} voxels; at most {MAX_VOXELS} are read")
    places: dict[int, list[tuple[int, Plane]]] = {}
    for s, plane in enumerate(planes):
        places.setdefault(plane.header.member, []).append((s, plane))

    voxels: Array = np.empty(shape, dtype=np.int16, order="F")
    for member, wanted in places.items():
        indices = [plane.frame.index for _, plane in wanted]
        frames = read_pixels(_content(files[member]), wanted[0][1].header, indices)
        for (s, plane), stored in zip(wanted, frames, strict=True):
            values = _rescaled(stored, plane.frame.slope, plane.frame.intercept)
            if values.dtype == np.float32 and voxels.dtype == np.int16:
                voxels = voxels.astype(np.float32)
            voxels[:, :, s] = values.T
    return narrowed(voxels)


def _rescaled(stored: Array, slope: float, intercept: float) -> Array:
    """Stored values (R, C) times slope plus intercept: int16 where that is exact, else float32."""
    if slope.is_integer() and intercept.is_integer():
        values = stored.astype(np.float64) * slope + intercept
        if values.min() >= _INT16.min and values.max() <= _INT16.max:
            return values.astype(np.int16)
        return values.astype(np.float32)
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32)
