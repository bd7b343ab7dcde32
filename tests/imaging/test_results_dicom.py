"""What stands in DICOM results, on phantoms and on real series, by an independent judge."""

from __future__ import annotations

import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.uid import (
    ComprehensiveSRStorage,
    RTStructureSetStorage,
    SegmentationStorage,
)

from imaging import nifti
from imaging.errors import ScanError
from imaging.geometry import GeometryError
from imaging.intake import read_scan
from imaging.results.child import FORMATS, write_results
from imaging.results.label_codes import PRIVATE_SCHEME, TERMS, terms_of
from imaging.sandbox import Limits
from imaging.volume import Volume

FILES = {"dicom-seg": "seg.dcm", "dicom-sr": "sr.dcm", "rtstruct": "rtstruct.dcm"}


@pytest.fixture(scope="module")
def made(series, small_zip, tmp_path_factory):
    """The results of a phantom, by format."""
    out = tmp_path_factory.mktemp("results")
    answer = series.results_of(small_zip, series.boxes, out)
    assert [one["format"] for one in answer["files"]] == list(FORMATS)
    return {form: pydicom.dcmread(out / name) for form, name in FILES.items()}, out


def test_a_segment_has_coded_terms_and_the_model_that_made_it(made):
    seg = made[0]["dicom-seg"]

    liver, tumour = seg.SegmentSequence
    assert seg.SOPClassUID == SegmentationStorage
    assert [one.SegmentNumber for one in seg.SegmentSequence] == [1, 2]
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert liver.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    assert tumour.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    for segment in (liver, tumour):
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("liver-tumour", "3")
        assert "a" * 64 in algorithm.AlgorithmParameters


def test_every_result_belongs_to_the_study_and_says_what_it_is_for(made, small_series):
    source = pydicom.dcmread(small_series[0])

    for form, one in made[0].items():
        assert one.StudyInstanceUID == source.StudyInstanceUID
        assert one.PatientID == source.PatientID
        assert one.SeriesInstanceUID != source.SeriesInstanceUID
        assert "research use only" in one.SeriesDescription.lower(), form
    seg, structures = made[0]["dicom-seg"], made[0]["rtstruct"]
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert "Research use only" in seg.ContentDescription
    assert "Research use only" in structures.StructureSetDescription
    assert made[0]["dicom-sr"].SOPClassUID == ComprehensiveSRStorage


def test_a_structure_set_says_that_it_is_an_approximation(made):
    structures = made[0]["rtstruct"]

    assert structures.SOPClassUID == RTStructureSetStorage
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == ["liver", "tumour"]
    for roi in structures.StructureSetROISequence:
        assert roi.ROIGenerationDescription.startswith("Approximation")
    assert structures.ApprovalStatus == "UNAPPROVED"


def test_uids_follow_from_the_result(series, small_zip, made, tmp_path):
    series.results_of(small_zip, series.boxes, tmp_path)

    for form, name in FILES.items():
        again = pydicom.dcmread(tmp_path / name)
        assert again.SOPInstanceUID == made[0][form].SOPInstanceUID


@pytest.mark.parametrize("form", FORMATS)
def test_the_judge_finds_no_error_in_results_of_a_phantom(series, made, form):
    assert series.judged(made[1] / FILES[form]) == []


def test_the_judge_does_find_errors(series, made, tmp_path):
    seg = pydicom.dcmread(made[1] / "seg.dcm")
    del seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence
    seg.save_as(tmp_path / "wrong.dcm")

    assert series.judged(tmp_path / "wrong.dcm")


def only_tumour(volume: Volume) -> np.ndarray:
    labels = np.zeros(volume.shape, dtype=np.uint8)
    labels[3, 4, 5] = 2
    return labels


def test_a_label_without_a_voxel_has_no_segment_and_is_reported_absent(series, small_zip, tmp_path):
    answer = series.results_of(small_zip, only_tumour, tmp_path)

    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    (segment,) = seg.SegmentSequence
    assert (segment.SegmentNumber, segment.SegmentLabel) == (1, "tumour")
    assert answer["files"][0]["certificate"]["voxels"] == {"liver": 0, "tumour": 1}
    text = str(pydicom.dcmread(tmp_path / "sr.dcm"))
    assert "Absent" in text and "705057003" in text
    assert [series.judged(tmp_path / name) for name in FILES.values()] == [[], [], []]


def test_nothing_found_is_said_and_makes_no_segmentation(series, small_zip, tmp_path):
    answer = series.results_of(small_zip, lambda volume: np.zeros(volume.shape), tmp_path)

    assert [one["format"] for one in answer["files"]] == ["dicom-sr"]
    assert {(one["format"], one["code"]) for one in answer["not_made"]} == {
        ("dicom-seg", "nothing_found"),
        ("rtstruct", "nothing_found"),
    }
    assert not (tmp_path / "seg.dcm").exists()
    assert series.judged(tmp_path / "sr.dcm") == []
    assert str(pydicom.dcmread(tmp_path / "sr.dcm")).count("Absent") == 2


def test_a_report_alone_still_refers_to_a_segmentation_by_its_uid(
    series, small_zip, made, tmp_path
):
    answer = series.results_of(small_zip, series.boxes, tmp_path, formats=["dicom-sr"])

    assert [one["format"] for one in answer["files"]] == ["dicom-sr"]
    seg_uid = made[0]["dicom-seg"].SOPInstanceUID
    assert seg_uid in str(pydicom.dcmread(tmp_path / "sr.dcm"))


def test_a_large_segmentation_leaves_its_empty_frames_out(series, small_zip, tmp_path, monkeypatch):
    from imaging.results import segmentation

    series.results_of(small_zip, series.boxes, tmp_path / "all")
    monkeypatch.setattr(segmentation, "MAX_PIXELS_WITH_EMPTY_FRAMES", 1000)
    answer = series.results_of(small_zip, series.boxes, tmp_path / "few")

    every = pydicom.dcmread(tmp_path / "all/seg.dcm").NumberOfFrames
    few = pydicom.dcmread(tmp_path / "few/seg.dcm").NumberOfFrames
    assert (every, few < every) == (2 * 21, True)
    assert answer["files"][0]["certificate"]["voxels"]["tumour"] > 0
    assert series.judged(tmp_path / "few/seg.dcm") == []


@pytest.mark.parametrize(
    ("name", "code", "laterality"),
    [
        ("liver", "10200004", None),
        ("Tumour", "108369006", None),
        ("liver_tumor", "108369006", None),
        ("right kidney", "64033007", "24028007"),
        ("kidney_left", "64033007", "7771000"),
        ("inferior vena cava", "64131007", None),
    ],
)
def test_known_names_get_snomed_codes(name, code, laterality):
    terms = terms_of(name)

    assert (terms.type.value, terms.type.scheme_designator) == (code, "SCT")
    assert (terms.laterality.value if terms.laterality else None) == laterality


def test_other_names_get_a_private_code_that_claims_no_organ(series, small_zip, tmp_path):
    names = {"left kidney": 1, "portal vein and splenic vein": 2}

    series.results_of(small_zip, series.boxes, tmp_path, names=names)

    kidney, vein = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
    (kind,) = kidney.SegmentedPropertyTypeCodeSequence
    (modifier,) = kind.get("SegmentedPropertyTypeModifierCodeSequence") or kidney.get(
        "SegmentedPropertyTypeModifierCodeSequence"
    )
    assert modifier.CodeMeaning == "Left"
    (kind,) = vein.SegmentedPropertyTypeCodeSequence
    assert kind.CodingSchemeDesignator == PRIVATE_SCHEME
    assert kind.CodeMeaning == "portal vein and splenic vein"
    assert [series.judged(tmp_path / name) for name in FILES.values()] == [[], [], []]
    assert all(code.scheme_designator == "SCT" for code in TERMS.values())


CANARY = "CANARY7391"


def spoil(files) -> None:
    """Headers as real senders have them: wrong values, long ones, private ones, free text."""
    for file in files:
        one = pydicom.dcmread(file)
        one.add_new(0x00091001, "LO", CANARY)
        one.InstitutionName = one.ImageComments = one.ProtocolName = CANARY
        one.OperatorsName = one.RequestingPhysician = CANARY
        one.StudyDate, one.StudyTime = "2020.13.45", "99:12"
        one.PatientBirthDate = "unknown"
        one.PatientSex = "W"
        one.StudyID = "a study id of far more than sixteen characters"
        one.PatientName = "X" * 90
        one.AccessionNumber = "12345678901234567890"
        one.SliceThickness = ""
        one.SpacingBetweenSlices = "-5"
        one.PositionReferenceIndicator = CANARY * 9
        one.InstanceNumber = "-7"
        with pydicom.config.disable_value_validation():
            one.save_as(file)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_results_of_bad_headers_are_valid_and_carry_no_free_text(series, tmp_path):
    labels = np.zeros((9, 8, 6), dtype=np.int16)
    labels[2:5, 3:6, 1:4] = 100
    files = series.write_series(labels, np.diag([2.0, 2.0, 3.0, 1.0]), tmp_path / "in")
    spoil(files)

    series.results_of(tmp_path / "in", lambda v: v.voxels // 100, tmp_path / "out")

    for name in FILES.values():
        content = (tmp_path / "out" / name).read_bytes()
        assert series.judged(tmp_path / "out" / name) == []
        assert content.count(CANARY.encode()) == content.count((CANARY * 6).encode()) * 6
        written = pydicom.dcmread(tmp_path / "out" / name)
        assert (written.StudyDate, written.PatientSex) == ("", "")
        assert "ImageComments" not in written and not written.get("OperatorsName")


def without(keyword: str):
    def change(files) -> None:
        for file in files:
            one = pydicom.dcmread(file)
            delattr(one, keyword)
            one.save_as(file)

    return change


def test_a_source_without_a_frame_of_reference_gets_one_and_says_so(series, tmp_path):
    labels = np.full((9, 8, 6), 100, dtype=np.int16)
    files = series.write_series(labels, np.diag([2.0, 2.0, 3.0, 1.0]), tmp_path / "in")
    without("FrameOfReferenceUID")(files)

    answer = series.results_of(tmp_path / "in", lambda v: v.voxels // 100, tmp_path / "out")

    assert all("no frame of reference" in one["notes"][0] for one in answer["files"])
    assert series.judged(tmp_path / "out/seg.dcm") == []


def test_a_source_without_a_study_is_refused_by_name(series, tmp_path):
    labels = np.full((9, 8, 6), 100, dtype=np.int16)
    files = series.write_series(labels, np.diag([2.0, 2.0, 3.0, 1.0]), tmp_path / "in")
    without("StudyInstanceUID")(files)

    answer = series.results_of(tmp_path / "in", lambda v: v.voxels // 100, tmp_path / "out")

    assert answer["files"] == []
    assert {one["code"] for one in answer["not_made"]} == {"source_header_unusable"}
    assert "StudyInstanceUID" in answer["not_made"][0]["detail"]


REAL = [
    ("dicom_series/chaos_ct_set3.zip", None),
    ("dicom_series/sts_002_ct_rtstruct.zip", None),
    ("dicom_series/dcmqi_ct3slice_liver_seg.zip", None),
    ("dicom_series/prostatex_0000_multiseries.zip", "7368"),
    ("dicom_series/prostatex_0000_multiseries.zip", "8780"),
    ("dicom_cases/mr_series_jpegls", None),
    ("dicom_cases/mr_series_rle", None),
    ("dicom_cases/mr_enhanced_philips/IM-0001-0170-0001.dcm", None),
    ("dicom_cases/enhanced/eCT_Supplemental.dcm", None),
]


@pytest.mark.parametrize(
    ("name", "series_end"),
    [
        pytest.param(n, e, id=f"{n}{e or ''}", marks=[pytest.mark.nightly] * ("chaos" in n))
        for n, e in REAL  # the largest takes as long as the others together
    ],
)
def test_the_judge_finds_no_error_in_results_of_real_series(
    series, data, tmp_path, name, series_end
):
    path, uid = data / name, None
    if series_end is not None:
        with zipfile.ZipFile(path) as archive:
            uids = {
                str(pydicom.dcmread(archive.open(one), stop_before_pixels=True).SeriesInstanceUID)
                for one in archive.namelist()
                if not one.endswith("/")
            }
        (uid,) = [one for one in uids if one.endswith(series_end)]

    answer = series.results_of(path, series.boxes, tmp_path, series_uid=uid)

    assert answer["not_made"] == []
    for form, file in FILES.items():
        assert series.judged(tmp_path / file) == [], form
    for one in answer["files"]:
        if one["certificate"]:
            assert one["certificate"]["max_corner_error_mm"] < 1e-3
    mask, header = nifti.read_stored(tmp_path / "mask.nii.gz")
    read = series.dcmqi_reads(tmp_path / "seg.dcm", tmp_path)
    array = np.asarray(read.dataobj).astype(np.uint8)
    there = series.at_world(mask, header.affine, series.grid_points(array.shape, read.affine))
    assert np.array_equal(there, array.ravel()) and array.any()


@pytest.mark.parametrize(
    "name", ["dicom_series/ge_head_tilt_variable_spacing.zip", "dicom_cases/ct_gantry_tilt_siemens"]
)
def test_a_real_tilted_series_is_refused_by_name_or_gets_results_on_its_slices(
    series, data, tmp_path, name
):
    try:
        answer = series.results_of(data / name, series.boxes, tmp_path)
    except ScanError as refusal:
        assert refusal.code in ("gantry_tilt", "uneven_spacing")
        return

    assert answer["not_made"] == []
    assert {one["certificate"]["mapping"] for one in answer["files"] if one["certificate"]} == {
        "nearest"
    }
    assert [series.judged(tmp_path / file) for file in FILES.values()] == [[], [], []]


def test_a_real_series_without_uids_gets_no_dicom_results(series, data, tmp_path):
    answer = series.results_of(
        data / "dicom_series/totalseg_siemens_j2k.zip", series.boxes, tmp_path
    )

    assert answer["files"] == []
    assert {one["code"] for one in answer["not_made"]} == {"source_header_unusable"}


def run_child(series, small_zip, out, source_path=None, **options):
    series.results_of(small_zip, series.boxes, out)
    scan = read_scan(small_zip, kind="image")
    mask, _ = nifti.read_stored(out / "mask.nii.gz")
    child = out / "child"
    child.mkdir()
    return write_results(
        source_path or small_zip,
        out / "mask.nii.gz",
        child,
        series_uid=options.pop("series_uid", scan.series_uid),
        sop_uids=[one.sop_uid for one in scan.used],
        grid=options.pop("grid", scan.source),
        facts=options.pop("facts", None) or series.facts_of(mask),
        formats=FORMATS,
        **options,
    )


def test_the_child_writes_what_was_asked_for(series, small_zip, tmp_path):
    made = run_child(series, small_zip, tmp_path)

    assert [one.format for one in made.written] == list(FORMATS)
    assert made.not_made == ()
    assert all(one.path.is_file() for one in made.written)
    assert made.written[0].certificate["readers"][0].startswith("imaging.results.readback")


@pytest.mark.parametrize(
    "limits", [Limits(memory_bytes=200 << 20), Limits(wall_s=0.05)], ids=["memory", "time"]
)
def test_a_child_that_meets_a_limit_makes_nothing_and_says_so(series, small_zip, tmp_path, limits):
    made = run_child(series, small_zip, tmp_path, limits=limits)

    assert made.written == ()
    assert {one.code for one in made.not_made} == {"result_not_written"}


def test_a_source_that_is_no_scan_any_more_makes_nothing_and_says_so(series, small_zip, tmp_path):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(small_zip.read_bytes()[:5000])

    made = run_child(series, small_zip, tmp_path / "out", broken)

    assert made.written == ()
    assert len(made.not_made) == len(FORMATS)


def test_a_mask_of_another_count_than_stated_still_has_to_be_itself(series, small_zip, tmp_path):
    """Facts that claim a label whose voxels are not there: the empty segment is no result."""
    mask = np.zeros((3, 3, 3), dtype=np.uint8)
    mask[0, 0, 0], mask[1, 1, 1] = 1, 2
    facts = series.facts_of(mask, {"liver": 1, "tumour": 2, "vein": 3})
    claimed = facts.labels[2].__class__("vein", 3, 1.0, 5)
    lying = facts.__class__(
        *(getattr(facts, name) for name in list(facts.__slots__)[:-1]),
        (*facts.labels[:2], claimed),
    )

    with pytest.raises(GeometryError, match="without a voxel"):
        run_child(series, small_zip, tmp_path, facts=lying)
