"""DICOM SEG (PS3.3, A.51), written with highdicom: one BINARY segment for each label found.

A segment exists only where its label has voxels: viewers hang on empty ones. Frames without any
label are kept, since some viewers count frames (protocols.md, complaint 15), unless that would make
the object large (many labels on many slices).

Axes: S slices, R rows, C columns of the source.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.color import CIELabColor
from highdicom.enum import ContentQualificationValues
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from highdicom.seg.enum import SegmentationTypeValues
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from imaging.results.certificate import Labels
from imaging.results.facts import MANUFACTURER, RESEARCH_USE_ONLY, Facts, Label, colour_of
from imaging.results.label_codes import PRIVATE_SCHEME, Terms, terms_of
from imaging.results.source import SourceSeries

SERIES_NUMBER = 901
MAX_PIXELS_WITH_EMPTY_FRAMES = 512 << 20
"""64 MiB of one-bit pixels: 2,048 frames of 512 x 512."""


def write_segmentation(path: Path, source: SourceSeries, mask: Labels, facts: Facts) -> Dataset:
    """Write a SEG of the labels that were found.

    Args:
        path: Where to write.
        source: The series it refers to.
        mask: (A, B, C) on the source's grid.
        facts: Model and labels; one label at least has voxels.

    Returns:
        The data set written.

    Raises:
        ValueError: No label has voxels.
    """
    if not facts.found:
        raise ValueError("no label has voxels: a segmentation without segments is not written")
    numbers = np.zeros(256, dtype=np.uint8)
    for number, label in enumerate(facts.found, start=1):
        numbers[label.value] = number
    slices = source.slices_of(mask)
    np.take(numbers, slices, out=slices)
    num_pixels = len(facts.found) * slices.size
    seg = Segmentation(
        source_images=list(source.images),
        pixel_array=slices,  # (S, R, C)
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _describe(number, label, facts) for number, label in enumerate(facts.found, start=1)
        ],
        series_instance_uid=facts.uid("seg series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=facts.uid("seg"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=facts.model_name[:64],
        software_versions=facts.software_version[:64],
        device_serial_number=facts.model_digest[:64],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label="SEGMENTATION",
        content_description=RESEARCH_USE_ONLY,
        series_description=facts.series_description,
        omit_empty_frames=num_pixels > MAX_PIXELS_WITH_EMPTY_FRAMES,
        content_qualification=ContentQualificationValues.RESEARCH,
        coding_schemes=_schemes(facts),
    )
    _add_laterality(seg, facts)
    seg.save_as(path, enforce_file_format=True)
    return seg


def algorithm_of(facts: Facts) -> AlgorithmIdentificationSequence:
    """The model by name, version and digest (PS3.3, 10.16)."""
    return AlgorithmIdentificationSequence(
        name=facts.model_name[:64],
        family=codes.DCM.ArtificialIntelligence,
        version=facts.model_version[:64],
        source=MANUFACTURER,
        parameters={"bundle_sha256": facts.model_digest},
    )


def _describe(number: int, label: Label, facts: Facts) -> SegmentDescription:
    terms = terms_of(label.name)
    return SegmentDescription(
        segment_number=number,
        segment_label=label.shown,
        segmented_property_category=CodedConcept.from_code(terms.category),
        segmented_property_type=CodedConcept.from_code(terms.type),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm_of(facts),
        tracking_uid=facts.uid(f"tracking {label.value}"),
        tracking_id=f"{facts.result_id} {label.value}",
        display_color=CIELabColor.from_rgb(*colour_of(number)),
    )


def _schemes(facts: Facts) -> list[CodingSchemeIdentificationItem] | None:
    """Who is responsible for the private codes, where there are any (PS3.3, C.12.1)."""
    if all(terms_of(label.name).is_standard for label in facts.found):
        return None
    return [
        CodingSchemeIdentificationItem(
            PRIVATE_SCHEME, name="Labels of PCRL bundles", responsible_organization=MANUFACTURER
        )
    ]


def _add_laterality(seg: Segmentation, facts: Facts) -> None:
    """Left and right as modifiers of the property type (PS3.3, C.8.20.4)."""
    for item, label in zip(seg.SegmentSequence, facts.found, strict=True):
        terms: Terms = terms_of(label.name)
        if terms.laterality is not None:
            modifier = CodedConcept.from_code(terms.laterality)
            kind = item.SegmentedPropertyTypeCodeSequence[0]
            kind.SegmentedPropertyTypeModifierCodeSequence = Sequence([modifier])
