"""Negative controls: whatever is wrong with a result, no certificate is given for it."""

from __future__ import annotations

import itertools

import numpy as np
import pydicom
import pytest

from imaging import nifti
from imaging.dicom_header import quiet
from imaging.geometry import GeometryError
from imaging.intake import read_scan
from imaging.results import readback
from imaging.results.certificate import Reading, certify_nifti, compare
from imaging.results.source import read_source
from imaging.results.structure_set import outlines
from imaging.volume import Grid

NAMES = {"liver": 1, "tumour": 2}


@pytest.fixture(scope="module")
def made(series, small_zip, tmp_path_factory):
    """Results of a phantom, their source, and the mask: (folder, source, mask)."""
    out = tmp_path_factory.mktemp("results")
    series.results_of(small_zip, series.boxes, out)
    scan = read_scan(small_zip, kind="image")
    with quiet():
        source = read_source(
            small_zip, scan.series_uid, scan.source, [one.sop_uid for one in scan.used]
        )
    mask, _ = nifti.read_stored(out / "mask.nii.gz")
    return out, source, mask


def bits_of(seg) -> np.ndarray:
    size = seg.Rows * seg.Columns * seg.NumberOfFrames
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")[:size]
    return bits.reshape(seg.NumberOfFrames, seg.Rows, seg.Columns)


def put_bits(seg, bits: np.ndarray) -> None:
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    seg.PixelData = packed + b"\0" * (len(packed) % 2)


def flipped(seg):
    put_bits(seg, bits_of(seg)[:, ::-1])


def shifted_by_half_a_pixel(seg):
    spacing = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    for group in seg.PerFrameFunctionalGroupsSequence:
        position = group.PlanePositionSequence[0].ImagePositionPatient
        position[0] = float(position[0]) + float(spacing[1]) / 2


def shifted_by_half_a_slice(seg):
    for group in seg.PerFrameFunctionalGroupsSequence:
        position = group.PlanePositionSequence[0].ImagePositionPatient
        position[2] = float(position[2]) + 6.0


def swapped(seg):
    one, two = seg.SegmentSequence
    one.SegmentLabel, two.SegmentLabel = two.SegmentLabel, one.SegmentLabel


def lost(seg):
    numbers = [
        group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for group in seg.PerFrameFunctionalGroupsSequence
    ]
    bits = bits_of(seg).copy()
    bits[np.array(numbers) == 2] = 0
    put_bits(seg, bits)


def overlapping(seg):
    bits = bits_of(seg).copy()
    bits[:] = bits.max(axis=0)
    put_bits(seg, bits)


def of_another_study(seg):
    seg.StudyInstanceUID = "2.25.1"


def of_another_frame_of_reference(seg):
    seg.FrameOfReferenceUID = "2.25.1"


def referring_to_another_image(seg):
    series = seg.ReferencedSeriesSequence[0]
    series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID = "2.25.1"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (flipped, "differ"),
        (shifted_by_half_a_pixel, "corner"),
        (shifted_by_half_a_slice, "corner"),
        (swapped, "differ"),
        (lost, "differ|without a voxel"),
        (overlapping, "share a voxel"),
        (of_another_study, "StudyInstanceUID"),
        (of_another_frame_of_reference, "FrameOfReferenceUID"),
        (referring_to_another_image, "other images"),
    ],
)
def test_a_segmentation_that_is_wrong_is_not_certified(made, tmp_path, change, found):
    folder, source, mask = made
    right = readback.certify_segmentation(folder / "seg.dcm", source, mask, NAMES)
    assert right.max_corner_error_mm < 1e-3, "without the change it is certified"
    seg = pydicom.dcmread(folder / "seg.dcm")
    change(seg)
    seg.save_as(tmp_path / "wrong.dcm")

    with pytest.raises(GeometryError, match=found):
        readback.certify_segmentation(tmp_path / "wrong.dcm", source, mask, NAMES)


def contours(structures):
    return [c for roi in structures.ROIContourSequence for c in roi.ContourSequence]


def moved_in_plane(structures):
    for contour in contours(structures):
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        contour.ContourData = [f"{v:.4f}" for v in (points + np.array([8.5, 0, 0])).ravel()]


def moved_off_plane(structures):
    for contour in contours(structures):
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        contour.ContourData = [f"{v:.4f}" for v in (points + np.array([0, 0, 0.01])).ravel()]


def renamed(structures):
    one, two = structures.StructureSetROISequence
    one.ROIName, two.ROIName = two.ROIName, one.ROIName


def without_a_structure(structures):
    del structures.ROIContourSequence[1]


def without_a_contour(structures):
    del structures.ROIContourSequence[0].ContourSequence[0]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (moved_in_plane, "differ"),
        (moved_off_plane, "corner"),
        (renamed, "differ"),
        (without_a_structure, "differ|missing"),
        (without_a_contour, "differ|missing|share a voxel"),
    ],
)
def test_a_structure_set_that_is_wrong_is_not_certified(made, tmp_path, change, found):
    folder, source, mask = made
    right = readback.certify_structure_set(folder / "rtstruct.dcm", source, mask, NAMES)
    assert right.max_corner_error_mm < 1e-3, "without the change it is certified"
    structures = pydicom.dcmread(folder / "rtstruct.dcm")
    change(structures)
    structures.save_as(tmp_path / "wrong.dcm")

    with pytest.raises(GeometryError, match=found):
        readback.certify_structure_set(tmp_path / "wrong.dcm", source, mask, NAMES)


@pytest.mark.parametrize("seed", range(6))
def test_the_centres_inside_the_outlines_are_the_labelled_pixels(seed):
    inside = np.random.default_rng(seed).random((14, 11)) > (0.3, 0.5, 0.8)[seed % 3]
    inside[4:9, 3:8] = True
    inside[6, 5] = False  # a hole

    lines = outlines(inside)

    assert np.array_equal(readback.even_odd(lines, *inside.shape), inside)
    assert inside.any() and not inside.all()


def test_a_long_outline_is_kept_whole(series, tmp_path):
    """More than the 64 KiB that an explicit DS may have."""
    comb = np.zeros((9, 700, 3), dtype=np.int16)
    comb[1:8, ::2] = 100
    comb[4] = 100
    series.write_series(comb, np.diag([0.7, 0.7, 2.0, 1.0]), tmp_path / "in")

    made = series.results_of(tmp_path / "in", lambda v: v.voxels // 100, tmp_path / "out")

    structures = pydicom.dcmread(tmp_path / "out/rtstruct.dcm")
    longest = max(len(c.get_item("ContourData").value) for c in contours(structures))
    assert longest > 1 << 16
    assert series.judged(tmp_path / "out/rtstruct.dcm") == []
    assert made["not_made"] == []


def test_the_certificate_of_a_nifti_names_its_readers_and_what_they_found(made):
    folder, source, mask = made

    def other(path):
        return Reading("another 1.0", source.grid, mask)

    proven = certify_nifti(folder / "mask.nii.gz", source.grid, mask, NAMES, [other])

    assert proven.readers[1] == "another 1.0"
    assert proven.voxels == {name: int((mask == value).sum()) for name, value in NAMES.items()}
    assert proven.num_labelled == np.count_nonzero(mask)
    assert len(proven.sha256) == 64


GRID = Grid((6, 5, 4), np.diag([1.0, 2.0, 3.0, 1.0]))


def labelled() -> np.ndarray:
    labels = np.zeros(GRID.shape, dtype=np.uint8)
    labels[0, 0, 0], labels[1:3, 2, 1:] = 2, 1
    return labels


def moved(affine):
    affine = affine.copy()
    affine[0, 3] += 0.5
    return affine


@pytest.mark.parametrize(
    ("affine", "labels", "found"),
    [
        (GRID.affine, labelled()[::-1], "differ"),
        (moved(GRID.affine), labelled(), "corner"),
        (GRID.affine, np.array([0, 2, 1], np.uint8)[labelled()], "'liver'"),
        (GRID.affine, np.where(labelled() == 2, 0, labelled()), "'tumour' has 0"),
    ],
    ids=["flipped", "half a voxel", "swapped labels", "lost label"],
)
def test_a_reading_that_is_wrong_is_named(affine, labels, found):
    assert compare(Reading("r", GRID, labelled()), GRID, labelled(), NAMES) == 0.0

    with pytest.raises(GeometryError, match=found):
        compare(Reading("r", Grid(GRID.shape, affine), labels), GRID, labelled(), NAMES)


def test_flipping_any_axes_of_a_mask_is_found():
    for axes in itertools.product((1, -1), repeat=3):
        turned = labelled()[tuple(slice(None, None, step) for step in axes)]
        if axes == (1, 1, 1):
            continue
        with pytest.raises(GeometryError):
            compare(Reading("r", GRID, turned), GRID, labelled(), NAMES)
