"""SR of measurements (PS3.16, TID 1500 "Measurement Report"): the volume of each label in ml.

A label with voxels refers to its segment of the SEG. A label without any is reported as absent with
0 ml: "none found" is a finding, and there is no empty segment that could say it.
"""

from __future__ import annotations

from pathlib import Path

from highdicom.enum import ContentQualificationValues
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    ReferencedSegment,
    SourceSeriesForSegmentation,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from imaging.results.facts import MANUFACTURER, Facts, Label
from imaging.results.label_codes import terms_of
from imaging.results.segmentation import algorithm_of
from imaging.results.source import SourceSeries

SERIES_NUMBER = 902
Group = VolumetricROIMeasurementsAndQualitativeEvaluations | MeasurementsAndQualitativeEvaluations
MILLILITRE = Code("ml", "UCUM", "milliliter")
PRESENCE = Code("705057003", "SCT", "Presence")
ABSENT = Code("272519000", "SCT", "Absent")
_PROCEDURES = {
    "CT": Code("25045-6", "LN", "CT unspecified body region"),
    "MR": Code("25056-3", "LN", "MR unspecified body region"),
    "PT": Code("44136-0", "LN", "PET unspecified body region"),
}


def write_report(path: Path, source: SourceSeries, seg: Dataset | None, facts: Facts) -> None:
    """Write the measurement report.

    Args:
        path: Where to write.
        source: The series that was measured.
        seg: The segmentation that the volumes are of; None where no label was found.
        facts: Model and labels.
    """
    groups: list[Group] = []
    for label in facts.labels:
        if label.num_voxels and seg is not None:
            number = facts.found.index(label) + 1
            groups.append(_present(number, label, source, seg, facts))
        else:
            groups.append(_absent(label, facts))
    report = ComprehensiveSR(
        evidence=[*([seg] if seg is not None else []), *source.images],
        content=_content(groups, source, facts)[0],
        series_instance_uid=facts.uid("sr series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=facts.uid("sr"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=facts.model_name[:64],
        software_versions=facts.software_version[:64],
        device_serial_number=facts.model_digest[:64],
        series_description=facts.series_description,
        is_complete=True,
        is_final=False,
        is_verified=False,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_qualification=ContentQualificationValues.RESEARCH,
    )
    report.save_as(path, enforce_file_format=True)


def _content(groups: list[Group], source: SourceSeries, facts: Facts) -> MeasurementReport:
    observer = ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=facts.uid(f"device {facts.model_digest}"),
            name=MANUFACTURER,
            manufacturer_name=MANUFACTURER,
            model_name=facts.model_name[:64],
            serial_number=facts.model_digest[:64],
        ),
    )
    return MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer),
        procedure_reported=CodedConcept.from_code(
            _PROCEDURES.get(source.modality, _PROCEDURES["CT"])
        ),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )


def _present(
    number: int, label: Label, source: SourceSeries, seg: Dataset, facts: Facts
) -> VolumetricROIMeasurementsAndQualitativeEvaluations:
    segment = ReferencedSegment(
        sop_class_uid=seg.SOPClassUID,
        sop_instance_uid=seg.SOPInstanceUID,
        segment_number=number,
        source_series=SourceSeriesForSegmentation(source.images[0].SeriesInstanceUID),
    )
    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=segment,
        tracking_identifier=_tracking(label, facts),
        finding_category=CodedConcept.from_code(terms_of(label.name).category),
        finding_type=CodedConcept.from_code(terms_of(label.name).type),
        finding_sites=_sites(label),
        measurements=[_volume(label, facts)],
    )


def _absent(label: Label, facts: Facts) -> MeasurementsAndQualitativeEvaluations:
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(label, facts),
        finding_category=CodedConcept.from_code(terms_of(label.name).category),
        finding_type=CodedConcept.from_code(terms_of(label.name).type),
        measurements=[_volume(label, facts)],
        qualitative_evaluations=[
            QualitativeEvaluation(CodedConcept.from_code(PRESENCE), CodedConcept.from_code(ABSENT))
        ],
    )


def _sites(label: Label) -> list[FindingSite] | None:
    """Left or right of a paired organ, which the type's code does not say."""
    terms = terms_of(label.name)
    if terms.laterality is None:
        return None
    return [
        FindingSite(
            CodedConcept.from_code(terms.type), laterality=CodedConcept.from_code(terms.laterality)
        )
    ]


def _tracking(label: Label, facts: Facts) -> TrackingIdentifier:
    return TrackingIdentifier(uid=facts.uid(f"tracking {label.value}"), identifier=label.shown)


def _volume(label: Label, facts: Facts) -> Measurement:
    algorithm = algorithm_of(facts)[0]
    return Measurement(
        name=codes.SCT.Volume,
        value=round(label.volume_ml, 4),
        unit=CodedConcept.from_code(MILLILITRE),
        algorithm_id=AlgorithmIdentification(
            name=algorithm.AlgorithmName,
            version=algorithm.AlgorithmVersion,
            parameters=[f"bundle_sha256={facts.model_digest}"],
        ),
    )
