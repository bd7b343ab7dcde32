"""SEG and RTSTRUCT read again, with none of the writers' code: the certificate's reader.

highdicom writes SEG and contourpy draws the outlines; here the data elements alone are taken from
the file (pydicom), and bits, planes and polygons are worked out from the standard's text. That LPS
becomes RAS here a second time is on purpose: a shared error would go unseen.

Axes: F frames, R rows, C columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from imaging.geometry import GeometryError
from imaging.results.certificate import (
    Certificate,
    Labels,
    PlaneReading,
    certificate,
    compare_planes,
)
from imaging.results.source import SourceSeries
from imaging.volume import Affine

READER = f"imaging.results.readback (pydicom {pydicom.__version__})"


def certify_segmentation(
    path: Path, source: SourceSeries, mask: Labels, names: Mapping[str, int]
) -> Certificate:
    """Prove that a SEG holds the mask on its source's slices.

    Args:
        path: The written file.
        source: What it must refer to.
        mask: (A, B, C) on the source's grid.
        names: Value of each label, by the name that segments carry.

    Raises:
        GeometryError: It does not.
    """
    with path.open("rb") as file:
        seg = pydicom.dcmread(file)
    _require_references(seg, source, seg.get("ReferencedSeriesSequence"))
    planes = read_segmentation(seg, names)
    return _certify("dicom-seg", path, planes, source=source, mask=mask, names=names)


def certify_structure_set(
    path: Path, source: SourceSeries, mask: Labels, names: Mapping[str, int]
) -> Certificate:
    """Prove that the pixel centres inside an RTSTRUCT's contours are the mask; see above."""
    with path.open("rb") as file:
        structures = pydicom.dcmread(file)
    study = structures.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    _require_references(structures, source, study.RTReferencedSeriesSequence)
    planes = read_structure_set(structures, source, names)
    return _certify("rtstruct", path, planes, source=source, mask=mask, names=names)


def _certify(
    form: str,
    path: Path,
    planes: Iterator[PlaneReading],
    *,
    source: SourceSeries,
    mask: Labels,
    names: Mapping[str, int],
) -> Certificate:
    error, voxels = compare_planes(
        planes,
        source_planes=[plane.affine for plane in source.planes],
        plane_shape=(source.rows, source.columns),
        source=source.grid,
        mask=mask,
        names=names,
        mapping=source.mapping,
    )
    return certificate(
        form,
        path,
        source.grid,
        readers=[READER],
        error_mm=error,
        voxels=voxels,
        mapping=source.mapping,
    )


def read_segmentation(seg: Dataset, names: Mapping[str, int]) -> Iterator[PlaneReading]:
    """The label of every pixel, plane by plane, of a BINARY segmentation.

    Args:
        seg: The data set.
        names: Value of each label, by the name that segments carry.

    Raises:
        GeometryError: Segments overlap, are unknown or empty, or the frames do not fit the header.
    """
    values = _segment_values(seg, names)
    frames = _frames(seg)
    places: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for frame in range(len(seg.PerFrameFunctionalGroupsSequence)):
        position = _group(seg, frame, "PlanePositionSequence").ImagePositionPatient
        places[tuple(float(value) for value in position)].append(frame)
    filled: set[int] = set()
    for same_place in places.values():
        labels = np.zeros((int(seg.Rows), int(seg.Columns)), dtype=np.uint8)
        for frame in same_place:
            segment = _group(seg, frame, "SegmentIdentificationSequence")
            number = int(segment.ReferencedSegmentNumber)
            inside = frames(frame)
            if (labels[inside] != 0).any():
                raise GeometryError("two segments share a voxel")
            if inside.any():
                filled.add(number)
            labels[inside] = values[number]
        yield PlaneReading(_affine_of(seg, same_place[0]), labels)
    if filled != set(values):
        raise GeometryError(f"segments without a voxel: {sorted(set(values) - filled)}")


def _segment_values(seg: Dataset, names: Mapping[str, int]) -> dict[int, int]:
    values: dict[int, int] = {}
    for item in seg.SegmentSequence:
        name = str(item.SegmentLabel)
        if name not in names:
            raise GeometryError(f"segment {item.SegmentNumber} names no label of the mask")
        values[int(item.SegmentNumber)] = names[name]
    if len(set(values.values())) != len(values):
        raise GeometryError("two segments name one label")
    return values


def _frames(seg: Dataset) -> Any:
    """A function from a frame's index to its pixels (R, C), bool.

    One bit a pixel, the first in the lowest bit, frame after frame without padding (PS3.5, 8.1.1).
    """
    if (seg.SegmentationType, int(seg.BitsAllocated)) != ("BINARY", 1):
        raise GeometryError("not a BINARY segmentation of one bit a pixel")
    size, data = int(seg.Rows) * int(seg.Columns), np.frombuffer(seg.PixelData, np.uint8)
    if len(data) * 8 < size * int(seg.NumberOfFrames):
        raise GeometryError("the segmentation holds fewer pixels than its header says")

    def frame(index: int) -> NDArray[np.bool_]:
        first, end = index * size, (index + 1) * size
        bits = np.unpackbits(data[first // 8 : (end + 7) // 8], bitorder="little")
        start = first % 8
        return bits[start : start + size].reshape(int(seg.Rows), int(seg.Columns)).astype(bool)

    return frame


def _group(seg: Dataset, frame: int, name: str) -> Dataset:
    """A functional group of a frame: its own, else the shared one (PS3.3, C.7.6.16)."""
    own, shared = seg.PerFrameFunctionalGroupsSequence[frame], seg.SharedFunctionalGroupsSequence[0]
    found = own.get(name) or shared.get(name)
    if not found:
        raise GeometryError(f"a frame without {name}")
    item: Dataset = found[0]
    return item


def _affine_of(seg: Dataset, frame: int) -> Affine:
    position = _group(seg, frame, "PlanePositionSequence").ImagePositionPatient
    orientation = _group(seg, frame, "PlaneOrientationSequence").ImageOrientationPatient
    spacing = _group(seg, frame, "PixelMeasuresSequence").PixelSpacing
    x, y = np.array(orientation[:3], dtype=float), np.array(orientation[3:], dtype=float)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = x * float(spacing[1]), y * float(spacing[0])
    affine[:3, 2], affine[:3, 3] = np.cross(x, y), np.array(position, dtype=float)
    affine[:2] *= -1.0  # Left is minus Right, Posterior is minus Anterior
    return affine


def read_structure_set(
    structures: Dataset, source: SourceSeries, names: Mapping[str, int]
) -> Iterator[PlaneReading]:
    """The label of every pixel whose centre is inside the contours of its slice, even-odd.

    The slice is found by the contours' place, not by their references. The affine of a reading is
    the slice's, moved along its normal by as much as the contours lie off it.

    Raises:
        GeometryError: Structures overlap, are unknown or empty, or lie on no slice.
    """
    values = {}
    for roi in structures.StructureSetROISequence:
        if str(roi.ROIName) not in names:
            raise GeometryError(f"structure {roi.ROINumber} names no label of the mask")
        values[int(roi.ROINumber)] = names[str(roi.ROIName)]
    to_pixels = np.linalg.inv(np.stack([plane.affine for plane in source.planes]))  # (S, 4, 4)
    polygons: dict[int, dict[int, list[NDArray[np.float64]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    off_mm: dict[int, float] = defaultdict(float)
    for roi in structures.ROIContourSequence:
        if not roi.get("ContourSequence"):
            raise GeometryError(f"structure {roi.ReferencedROINumber} has no contour")
        for contour in roi.ContourSequence:
            points = _numbers(contour.get_item("ContourData").value).reshape(-1, 3)
            points[:, :2] *= -1.0
            flat = np.column_stack([points, np.ones(len(points))])
            place = int(np.abs(to_pixels[:, 2] @ flat[0]).argmin())
            at = flat @ to_pixels[place].T  # (N, 4): column, row, mm off the slice
            off_mm[place] = max(off_mm[place], float(np.abs(at[:, 2]).max()))
            polygons[place][int(roi.ReferencedROINumber)].append(at[:, :2])
    for place, by_roi in polygons.items():
        labels = np.zeros((source.rows, source.columns), dtype=np.uint8)
        for number, outlines in by_roi.items():
            inside = even_odd(outlines, source.rows, source.columns)
            if (labels[inside] != 0).any():
                raise GeometryError("two structures share a voxel")
            labels[inside] = values[number]
        affine = source.planes[place].affine.copy()
        affine[:3, 3] += off_mm[place] * affine[:3, 2]
        yield PlaneReading(affine, labels)


def _numbers(value: Any) -> NDArray[np.float64]:
    """Decimal strings as they stand in the file (pydicom would look at each by itself)."""
    parts = value.decode("ascii").split("\\") if isinstance(value, bytes) else value
    return np.array(parts, dtype=float)


def even_odd(polygons: list[NDArray[np.float64]], rows: int, columns: int) -> NDArray[np.bool_]:
    """Pixels (R, C) whose centre lies inside an odd number of polygons' crossings to its left.

    Args:
        polygons: Closed outlines, each (N, 2) of column and row.
        rows: R.
        columns: C.
    """
    toggles = np.zeros((rows, columns + 1), dtype=np.int64)
    for polygon in polygons:
        x0, y0 = polygon.T
        x1, y1 = np.roll(polygon, -1, axis=0).T
        first, end = np.ceil(np.minimum(y0, y1)), np.ceil(np.maximum(y0, y1))
        for step in range(int((end - first).max(initial=0))):  # rows that an edge crosses
            row = first + step
            crosses = (row < end) & (row >= 0) & (row < rows)
            share = (row[crosses] - y0[crosses]) / (y1 - y0)[crosses]
            x = x0[crosses] + share * (x1 - x0)[crosses]
            column = np.clip(np.ceil(x), 0, columns).astype(int)
            np.add.at(toggles, (row[crosses].astype(int), column), 1)
    return (np.cumsum(toggles, axis=1)[:, :columns] % 2).astype(bool)


def _require_references(made: Dataset, source: SourceSeries, series: Any) -> None:
    """The result belongs to the source's study and frame of reference, and names its images."""
    first = source.images[0]
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if made.get(keyword) != first.get(keyword):
            raise GeometryError(f"the result's {keyword} is not the source's")
    if not series or series[0].SeriesInstanceUID != first.SeriesInstanceUID:
        raise GeometryError("the result refers to another series")
    items = series[0].get("ReferencedInstanceSequence") or series[0].get("ContourImageSequence")
    named = {str(item.ReferencedSOPInstanceUID) for item in items or ()}
    if named != {str(image.SOPInstanceUID) for image in source.images}:
        raise GeometryError("the result refers to other images than the source's")
