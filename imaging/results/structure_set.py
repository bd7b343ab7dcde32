"""RTSTRUCT (PS3.3, A.19): the outline of each label on each slice.

Contours are where marching squares (contourpy) cross 0.5 between a labelled pixel and its
neighbour, half a pixel outside the outermost centres. They run through the midpoints, so corners
are cut: an *approximation* of the voxels, and each ROI says so. The pixel centres inside the
contours, by the even-odd rule (a hole is a contour within a contour), are exactly the labelled
pixels.

Axes: S slices, R rows, C columns of the source. Contours are in LPS+ mm.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
from contourpy import LineType, contour_generator
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage
from pydicom.valuerep import DSfloat

from imaging.results.certificate import Labels
from imaging.results.facts import MANUFACTURER, RESEARCH_USE_ONLY, Facts, Label, colour_of
from imaging.results.label_codes import terms_of
from imaging.results.source import SourcePlane, SourceSeries

SERIES_NUMBER = 903
APPROXIMATION = "Approximation: marching squares at 0.5; holes by even-odd"
_REPEATED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID", "StudyDescription",
    "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence",
    "FrameOfReferenceUID", "PositionReferenceIndicator",
)  # fmt: skip
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management, what RT Referenced Study Sequence names (PS3.3, C.8.8.5)."""

_CONTOUR_DATA = Tag("ContourData")

Polygon = NDArray[np.float64]


def write_structure_set(path: Path, source: SourceSeries, mask: Labels, facts: Facts) -> None:
    """Write an RTSTRUCT of the labels that were found.

    Args:
        path: Where to write.
        source: The series it refers to.
        mask: (A, B, C) on the source's grid.
        facts: Model and labels; one label at least has voxels.

    Raises:
        ValueError: No label has voxels.
    """
    if not facts.found:
        raise ValueError("no label has voxels: a structure set without structures is not written")
    made = _header(source, facts)
    slices = source.slices_of(mask)
    made.ReferencedFrameOfReferenceSequence = Sequence([_frame_of_reference(source)])
    numbered = list(enumerate(facts.found, start=1))
    made.StructureSetROISequence = Sequence(
        [_roi(number, label, source) for number, label in numbered]
    )
    made.ROIContourSequence = Sequence(
        [_contours(number, slices == label.value, source) for number, label in numbered]
    )
    made.RTROIObservationsSequence = Sequence(
        [_observation(number, label) for number, label in numbered]
    )
    made.ApprovalStatus = "UNAPPROVED"
    made.save_as(path, enforce_file_format=True)


def outlines(inside: NDArray[np.bool_]) -> list[Polygon]:
    """Closed outlines of a plane's pixels, each (N, 2) of column and row; holes too."""
    padded = np.pad(inside.astype(np.float64), 1)
    generator = contour_generator(z=padded, line_type=LineType.Separate)
    lines = [np.asarray(line, dtype=np.float64) - 1.0 for line in generator.lines(0.5)]
    return [_bends(line[:-1]) for line in lines if len(line) > 3]  # the last repeats the first


def _bends(line: Polygon) -> Polygon:
    """Without the points along straight edges, which say nothing; halves are exact in binary."""
    before, after = line - np.roll(line, 1, axis=0), np.roll(line, -1, axis=0) - line
    bends: Polygon = line[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    return bends


def _header(source: SourceSeries, facts: Facts) -> FileDataset:
    first, now = source.images[0], datetime.datetime.now(datetime.UTC)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = RTStructureSetStorage
    meta.MediaStorageSOPInstanceUID = facts.uid("rtstruct")
    meta.TransferSyntaxUID = ImplicitVRLittleEndian  # explicit DS ends at 64 KiB: 2,400 points
    meta.ImplementationClassUID = facts.uid("implementation")
    made = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    made.SpecificCharacterSet = first.SpecificCharacterSet
    for keyword in _REPEATED:
        if keyword in first:
            made[keyword] = first[keyword]
    made.SOPClassUID = RTStructureSetStorage
    made.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    made.InstanceCreationDate = made.StructureSetDate = now.strftime("%Y%m%d")
    made.InstanceCreationTime = made.StructureSetTime = now.strftime("%H%M%S")
    made.Modality = "RTSTRUCT"
    made.SeriesInstanceUID = facts.uid("rtstruct series")
    made.SeriesNumber, made.InstanceNumber = SERIES_NUMBER, 1
    made.SeriesDescription = facts.series_description
    made.OperatorsName = ""
    made.Manufacturer = MANUFACTURER
    made.ManufacturerModelName = facts.model_name[:64]
    made.SoftwareVersions = facts.software_version[:64]
    made.DeviceSerialNumber = facts.model_digest[:64]
    made.StructureSetLabel = "PCRL"
    made.StructureSetName = facts.series_description
    made.StructureSetDescription = RESEARCH_USE_ONLY
    return made


def _frame_of_reference(source: SourceSeries) -> Dataset:
    first = source.images[0]
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    series.ContourImageSequence = Sequence([_reference(source, one) for one in source.planes])
    study.ReferencedSOPClassUID = _DETACHED_STUDY
    study.ReferencedSOPInstanceUID = first.StudyInstanceUID
    study.RTReferencedSeriesSequence = Sequence([series])
    frame.FrameOfReferenceUID = first.FrameOfReferenceUID
    frame.RTReferencedStudySequence = Sequence([study])
    return frame


def _reference(source: SourceSeries, plane: SourcePlane) -> Dataset:
    image, reference = source.images[plane.image], Dataset()
    reference.ReferencedSOPClassUID = image.SOPClassUID
    reference.ReferencedSOPInstanceUID = image.SOPInstanceUID
    if source.is_multi_frame:
        reference.ReferencedFrameNumber = plane.frame + 1
    return reference


def _roi(number: int, label: Label, source: SourceSeries) -> Dataset:
    roi = Dataset()
    roi.ROINumber = number
    roi.ReferencedFrameOfReferenceUID = source.images[0].FrameOfReferenceUID
    roi.ROIName = label.shown
    roi.ROIVolume = DSfloat(label.volume_ml, auto_format=True)  # cm3
    roi.ROIGenerationAlgorithm = "AUTOMATIC"
    roi.ROIGenerationDescription = APPROXIMATION
    return roi


def _contours(number: int, inside: NDArray[np.bool_], source: SourceSeries) -> Dataset:
    """The contours of one label; `inside` is (S, R, C)."""
    roi = Dataset()
    roi.ROIDisplayColor = list(colour_of(number))
    roi.ReferencedROINumber = number
    contours = []
    for plane, labelled in zip(source.planes, inside, strict=True):
        if not labelled.any():
            continue
        for outline in outlines(labelled):
            contour = Dataset()
            contour.ContourImageSequence = Sequence([_reference(source, plane)])
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(outline)
            _put_points(contour, outline, plane)
            contours.append(contour)
    roi.ContourSequence = Sequence(contours)
    return roi


def _put_points(contour: Dataset, outline: Polygon, plane: SourcePlane) -> None:
    """LPS+ mm to a tenth of a micrometre, x y z after x y z, as the bytes that the file holds.

    pydicom would check every number by itself: half a minute for a scan.
    """
    flat = np.zeros((len(outline), 4))
    flat[:, :2], flat[:, 3] = outline, 1.0
    placed = (flat @ (_RAS_TO_LPS @ plane.affine).T)[:, :3] + 0.0  # (N, 3)
    data = "\\".join(f"{value:.4f}" for value in placed.ravel()).encode("ascii")
    data += b" " * (len(data) % 2)
    contour[_CONTOUR_DATA] = RawDataElement(
        _CONTOUR_DATA, "DS", len(data), data, 0, is_implicit_VR=True, is_little_endian=True
    )


def _observation(number: int, label: Label) -> Dataset:
    terms, one = terms_of(label.name), Dataset()
    one.ObservationNumber = one.ReferencedROINumber = number
    one.RTROIIdentificationCodeSequence = Sequence([CodedConcept.from_code(terms.type)])
    one.RTROIInterpretedType = ""
    one.ROIInterpreter = ""
    return one
