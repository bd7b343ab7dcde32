"""A DICOM series to a volume; the only place where LPS becomes RAS (in `dicom_stack.arrange`).

Two passes over the files: headers first, each from the start of its file, then pixels of the one
series, a file at a time, so the peak is about one volume. Every file ends as used or explained.

Axes: C columns, R rows, S slices as in the files; I J K in RAS+ after `canonical`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from imaging.checks import check_affine
from imaging.dicom_file import describe, looks_like_dicom
from imaging.dicom_header import Header, read_header_start
from imaging.dicom_stack import Arranged, Plane, arrange, stacks
from imaging.dicom_voxels import Source, read_voxels, stored_frames
from imaging.errors import ScanError
from imaging.limits import MAX_FILE_BYTES, read_capped, shared_reads
from imaging.orientation import canonical_affine, empty_canonical, on_source_grid
from imaging.slices import Slices, regular_grid, to_grid
from imaging.volume import Array, Grid, Volume

__all__ = ["Series", "Source", "Unused", "Used", "read_series"]

_HEADER_BYTES = (16 << 10, 256 << 10, 4 << 20)
"""How much of a file is read for its header, in turn, before all of it is."""

_MAX_EXPLAINED = 1000
"""Files that a refusal explains one by one."""


@dataclass(frozen=True, slots=True)
class Unused:
    """A file that does not take part in the volume, and why."""

    member: int
    reason: str
    sop_uid: str = ""


@dataclass(frozen=True, slots=True)
class Used:
    """A file that the volume is made of."""

    member: int
    sop_uid: str


@dataclass(frozen=True, slots=True)
class Series:
    """A series as a volume, with what its headers say."""

    volume: Volume
    source: Grid
    """Columns, rows, slices of the files; the regular grid where they fill none (`slices`)."""
    modality: str
    series_uid: str
    patient_key: str
    unused: tuple[Unused, ...]
    used: tuple[Used, ...] = ()
    slices: Slices | None = None
    """Where the files' slices lie, if they were resampled: the way back for a mask."""
    slice_files: tuple[Used, ...] = ()
    """The file of each of `slices`, in their order."""
    notes: tuple[str, ...] = ()
    """What was done that a reader of the volume should know."""


def read_series(
    files: Sequence[Source], *, series_uid: str | None = None, may_resample: bool = True
) -> Series:
    """Read the one image series among the files, or the one asked for.

    Voxels are int16 where that holds every value, else float32.

    Args:
        files: DICOM files of any kind in any order; a file's place is its `member` in reports.
        series_uid: Which series, where there are several.
        may_resample: Put a tilted or unevenly spaced series on a regular grid; else refuse it.

    Raises:
        ScanError: `not_a_scan`, `several_series`, `no_such_series`, `mixed_patients`,
            `not_three_dimensional`, `duplicate_slices`, `gantry_tilt`, `missing_slices`,
            `uneven_spacing`, `bad_geometry`, `unsupported_transfer_syntax`, `unsupported_format`,
            `truncated_file`, `too_large`. Its `extra` explains the files that are at fault, and
            under `files` those that would not have been used anyway.
    """
    headers: list[Header] = []
    unused: list[Unused] = []
    try:
        with shared_reads(len(files)):
            _read_headers(files, headers, unused)
        return _read(files, headers, unused, series_uid, may_resample)
    except ScanError as error:
        if unused:
            shown = sorted(unused, key=lambda one: one.member)[:_MAX_EXPLAINED]
            error.extra.setdefault(
                "files",
                [{"member": u.member, "reason": u.reason, "sop_uid": u.sop_uid} for u in shown],
            )
        raise


def _read(
    files: Sequence[Source],
    headers: list[Header],
    unused: list[Unused],
    series_uid: str | None,
    may_resample: bool,
) -> Series:
    chosen = _choose(headers, series_uid)
    unused += [
        Unused(header.member, "part of another series", header.sop_uid)
        for header in headers
        if header.series_uid != chosen[0].series_uid
    ]
    if len({header.patient_key for header in chosen}) > 1:
        raise ScanError("mixed_patients", "one series_uid stands in files of several patients")
    planes, left_over = _one_stack(chosen)
    unused += left_over
    planes, twins = _without_twins(files, planes)
    unused += twins
    arranged = arrange(planes)
    notes: tuple[str, ...] = ()
    slices: Slices | None = None
    if arranged.grid is not None:
        source = arranged.grid
        check_affine(source.affine, "slice geometry")
        voxels = read_voxels(files, arranged.planes, source)
    else:
        source, notes = _regular(arranged, may_resample)
        slices = arranged.slices
        voxels = _resampled(files, arranged, source)
    first = arranged.planes[0].header
    in_order = tuple(Used(p.header.member, p.header.sop_uid) for p in arranged.planes)
    return Series(
        volume=Volume(voxels, canonical_affine(source)),
        source=source,
        modality=first.modality,
        series_uid=first.series_uid,
        patient_key=first.patient_key,
        unused=tuple(sorted(unused, key=lambda one: one.member)),
        used=tuple(sorted(set(in_order), key=lambda one: one.member)),
        slices=slices,
        slice_files=() if slices is None else in_order,
        notes=notes,
    )


def _read_headers(files: Sequence[Source], headers: list[Header], unused: list[Unused]) -> None:
    """Fill the two lists, so that they hold what was learned when something is raised."""
    refusals: list[ScanError] = []
    seen: set[tuple[str, str, tuple[float, ...]]] = set()
    for member, file in enumerate(files):
        try:
            header = _header_of(file, member)
        except ScanError as error:
            if error.code == "too_large":
                raise
            refusals.append(error)
            unused.append(Unused(member, error.detail, str(error.extra.get("sop_uid", ""))))
            continue
        identity = (header.series_uid, header.sop_uid, header.frames[0].position_mm)
        if header.sop_uid and identity in seen:
            unused.append(Unused(member, "the same image as another file", header.sop_uid))
            continue
        seen.add(identity)
        headers.append(header)
    if not headers:
        raise _none_usable(refusals)


def _none_usable(refusals: list[ScanError]) -> ScanError:
    """The most telling of the reasons why no file is an image."""
    for refusal in refusals:
        if refusal.code != "not_a_scan":
            return refusal
    reasons = sorted({refusal.detail for refusal in refusals})
    found = "; ".join(reasons[:5]) or "no files"
    return ScanError("not_a_scan", f"no CT, MR or PET images among {len(refusals)} files: {found}")


def _header_of(file: Source, member: int) -> Header:
    """The header, from as much of the start of the file as it takes."""
    with file.open("rb", buffering=0) if isinstance(file, Path) else file() as stream:
        content = _more(stream, b"", _HEADER_BYTES[0])
        if not looks_like_dicom(content):
            raise ScanError("not_a_scan", "not a DICOM object")
        try:
            for wanted in _HEADER_BYTES:
                content = _more(stream, content, wanted)
                if len(content) < wanted:
                    break
                header = read_header_start(content, member, is_whole=False)
                if header is not None:
                    return header
            content = read_capped(stream, MAX_FILE_BYTES, start=content)
            header = read_header_start(content, member, is_whole=True)
        except ScanError as error:
            error.extra.setdefault("sop_uid", describe(content)[0])
            raise
    assert header is not None
    return header


def _more(stream: BinaryIO, start: bytes, wanted: int) -> bytes:
    """At least `wanted` bytes of a file, of which the first are known, unless it is shorter."""
    content = start
    while len(content) < wanted and (chunk := stream.read(wanted - len(content))):
        content += chunk
    return content


def _choose(headers: list[Header], series_uid: str | None) -> list[Header]:
    by_series: dict[str, list[Header]] = {}
    for header in headers:
        by_series.setdefault(header.series_uid, []).append(header)
    found: list[object] = [_summary(uid, group) for uid, group in by_series.items()]
    if series_uid is None and len(by_series) == 1:
        return headers
    if series_uid is None:
        detail = f"{len(by_series)} image series; say which by series_uid"
        raise ScanError("several_series", detail, {"series": found})
    if series_uid not in by_series:
        detail = f"no image series with the asked series_uid among {len(by_series)}"
        raise ScanError("no_such_series", detail, {"series": found})
    return by_series[series_uid]


def _summary(series_uid: str, group: list[Header]) -> dict[str, object]:
    """What helps to choose, and nothing of the patient."""
    return {
        "series_uid": series_uid,
        "modality": group[0].modality,
        "num_files": len(group),
        "num_images": sum(len(header.frames) for header in group),
        "columns": group[0].columns,
        "rows": group[0].rows,
    }


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
        Unused(group[0].header.member, reason, group[0].header.sop_uid)
        for group in others
        if group[0].header.member not in used
    ]


def _without_twins(
    files: Sequence[Source], planes: list[Plane]
) -> tuple[list[Plane], list[Unused]]:
    """Leave out a slice sent twice under two names: the same place, pixels and scale."""
    places: dict[tuple[float, ...], list[Plane]] = {}
    for plane in planes:
        places.setdefault(plane.frame.position_mm, []).append(plane)
    kept: list[Plane] = []
    twins: list[Unused] = []
    for group in places.values():
        seen: set[bytes] = set()
        for plane in group:
            content = _digest(files, plane) if len(group) > 1 else b""
            if content in seen and len(plane.header.frames) == 1:
                reason = "the same pixels at the same place as another file"
                twins.append(Unused(plane.header.member, reason, plane.header.sop_uid))
                continue
            seen.add(content)
            kept.append(plane)
    return kept, twins


def _digest(files: Sequence[Source], plane: Plane) -> bytes:
    (stored,) = stored_frames(files[plane.header.member], plane.header, [plane])
    scale = np.array([plane.frame.slope, plane.frame.intercept])
    whole = np.ascontiguousarray(stored, dtype=np.int64)
    return hashlib.sha256(whole.tobytes() + scale.tobytes()).digest()


def _regular(arranged: Arranged, may_resample: bool) -> tuple[Grid, tuple[str, ...]]:
    """The grid for slices that fill none, and a note that says so; or the refusal."""
    assert arranged.irregularity is not None
    if not may_resample:
        raise arranged.irregularity
    grid = regular_grid(arranged.slices)
    check_affine(grid.affine, "slice geometry")
    found = arranged.irregularity
    return grid, (f"resampled to a regular grid ({found.code}): {found.detail}",)


def _resampled(files: Sequence[Source], arranged: Arranged, grid: Grid) -> Array:
    """Voxels (I, J, K) in RAS+ on the regular grid."""
    as_sent = Grid(arranged.slices.shape, grid.affine)  # for its directions alone
    stacked = on_source_grid(read_voxels(files, arranged.planes, as_sent), as_sent)
    voxels, on_grid = empty_canonical(grid, stacked.dtype)
    to_grid(stacked, arranged.slices, grid, out=on_grid)
    return voxels
