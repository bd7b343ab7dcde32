"""De-identification: nothing planted survives, at any depth; what the reader needs does."""

import io
import re
import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from imaging import deidentify_dicom, deidentify_rules
from imaging.deidentify import deidentify_upload
from imaging.deidentify_dicom import Cleaned, Refused, clean_object
from imaging.deidentify_rules import RULES
from imaging.dicom_header import patient_key, quiet
from imaging.errors import ScanError
from imaging.identity import Policy, Pseudonyms
from imaging.intake import read_scan

NAMES = Pseudonyms(b"k" * 32)
REMOVE, SHIFT = Policy(), Policy(dates="shift")
TABLE = {**RULES}
NO_DICTIONARY = {tag for tag in TABLE if deidentify_rules.vr_of(pydicom.tag.Tag(tag)) is None}
# `deidentify_rules.RULES` of the product; the number is the edition's, so that a table that
# shrinks is noticed.
NUM_ROWS = 652


def planted(tag: int, number: int):
    """A value that fits the attribute's VR and occurs nowhere else."""
    vr = "LO" if tag in NO_DICTIONARY else dictionary_VR(tag)
    token = f"CANARY{number:05d}X"
    if vr == "UI":
        return vr, f"1.2.826.0.1.999.{number}.7"
    if vr == "SQ":
        item = Dataset()
        item.PatientComments = token
        item.CodeMeaning = token
        item.TextValue = token
        return vr, Sequence([item])
    values = {
        "DA": f"{1931 + number % 60}{1 + number % 12:02d}{1 + number % 28:02d}",
        "TM": f"{number % 24:02d}{number % 60:02d}{(7 * number) % 60:02d}.{number:06d}",
        "DT": f"{1931 + number % 60}0203040506.{number:06d}",
        "AS": f"{number % 900 + 99:03d}M",
        "DS": f"{number}.4711",
        "IS": str(900_000 + number),
        "OB": token.encode() + b"\0" * (len(token) % 2),
        "UN": token.encode() + b"\0" * (len(token) % 2),
        "US": 40_000 + number,
        "UR": f"https://x.invalid/{token}",
        "PN": f"{token}^Jane",
    }
    return vr, values.get(vr, token)


def every_attribute(without_groups=(0, 2)) -> tuple[Dataset, dict[int, list[bytes]]]:
    """A data set with every attribute of the table, and the bytes that tell each one."""
    dataset, traces = Dataset(), {}
    for number, tag in enumerate(sorted(TABLE)):
        if tag >> 16 in without_groups:
            continue
        vr, value = planted(tag, number)
        dataset.add(DataElement(tag, vr, value))
        if vr == "US":
            traces[tag] = []  # told by the attribute's absence
        else:
            text = f"CANARY{number:05d}X" if vr == "SQ" else value
            traces[tag] = [text if isinstance(text, bytes) else str(text).encode()]
    return dataset, traces


def ct(**attributes) -> Dataset:
    """A CT image of 2 x 3 pixels with what a scanner writes."""
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, "1.2.826.0.1.1.1"
    image.StudyInstanceUID, image.SeriesInstanceUID = "1.2.826.0.1.2", "1.2.826.0.1.3"
    image.FrameOfReferenceUID = "1.2.826.0.1.4"
    image.PatientName, image.PatientID = "Doe^Jane", "4711"
    image.PatientBirthDate, image.StudyDate = "19610705", "20210304"
    image.StudyTime, image.AcquisitionDateTime = "101112", "20210304101112.5+0100"
    image.Modality, image.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.Manufacturer, image.ConvolutionKernel = "ACME", "B30f"
    image.ImagePositionPatient, image.ImageOrientationPatient = [1, 2, 3], [1, 0, 0, 0, 1, 0]
    image.PixelSpacing, image.SliceThickness = [0.7, 0.8], "2.5"
    image.RescaleSlope, image.RescaleIntercept = "1", "-1024"
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = 2, 3
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
    image.PixelRepresentation = 0
    image.PixelData = np.arange(6, dtype="<u2").tobytes()
    for keyword, value in attributes.items():
        setattr(image, keyword, value)
    return image


def as_file(dataset: Dataset, syntax=ExplicitVRLittleEndian, preamble=b"\0" * 128) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.SourceApplicationEntityTitle = "CANARY_AE"
    dataset.preamble = preamble
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def cleaned(data: bytes, policy: Policy = REMOVE) -> pydicom.Dataset:
    found = clean_object(data, NAMES, policy)
    assert isinstance(found, Cleaned), found
    return pydicom.dcmread(io.BytesIO(found.data))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("is_signed", [False, True])
def test_bits_above_the_stored_ones_go_and_pixels_are_read_as_before(syntax, is_signed) -> None:
    order = "<" if syntax is ExplicitVRLittleEndian else ">"
    stored = np.array([0, 1, 2047, -1, -2048, -7] if is_signed else [0, 1, 2047, 4095, 9, 2048])
    overlay = stored & 0x0FFF | np.array([0x1000, 0, 0x2000, 0x4000, 0x1000, 0xF000])
    pixels = overlay.astype(f"{order}u2").tobytes()
    sent = as_file(ct(PixelRepresentation=int(is_signed), PixelData=pixels), syntax)

    kept = cleaned(sent).PixelData

    assert kept != pixels  # something was there to go
    assert kept == stored.astype(f"{order}i2" if is_signed else f"{order}u2").tobytes()


def test_pixels_whose_stored_bits_lie_elsewhere_stay_as_they_are() -> None:
    pixels = np.array([0xFFF0, 0x1230] * 3, "<u2").tobytes()

    assert cleaned(as_file(ct(HighBit=15, PixelData=pixels))).PixelData == pixels


def nested(inner: Dataset, depth: int) -> Dataset:
    """The data set in sequences of sequences; their attribute is none that the table names."""
    outer = ct()
    for _ in range(depth):
        shell = Dataset()
        shell.DerivationCodeSequence = [inner]
        inner = shell
    outer.update(inner)
    return outer


def survivors(image: Dataset, traces: dict[int, list[bytes]], data: bytes) -> set[str]:
    """Keywords of the attributes whose planted value is still in the file."""
    alive = {tag for tag, found in traces.items() if any(trace in data for trace in found)}
    with quiet():
        alive |= {
            int(element.tag)
            for element in image.iterall()
            if int(element.tag) in traces and not traces[int(element.tag)] and element.value
        }
    return {keyword_for_tag(tag) or f"{tag:08x}" for tag in alive}


def test_the_table_is_whole() -> None:
    assert len(TABLE) == NUM_ROWS
    assert {"PatientName", "PatientID", "StudyDate", "InstitutionName", "SOPInstanceUID"} <= {
        keyword_for_tag(tag) for tag in TABLE
    }


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_no_attribute_of_the_table_survives_at_any_depth(depth: int, syntax) -> None:
    dataset, traces = every_attribute()
    image = nested(dataset, depth)
    image.SOPClassUID = CTImageStorage
    data = as_file(image, syntax)
    assert len(survivors(pydicom.dcmread(io.BytesIO(data)), traces, data)) == len(traces) > 600

    found = clean_object(data, NAMES, REMOVE)

    assert isinstance(found, Cleaned)
    assert survivors(pydicom.dcmread(io.BytesIO(found.data)), traces, found.data) == set()


def test_nor_do_commands_and_file_meta_information_in_a_data_set() -> None:
    dataset, traces = every_attribute(without_groups=())
    assert len(traces) == NUM_ROWS

    deidentify_dicom.deidentify(dataset, NAMES)

    left = dataset.to_json().encode()
    assert survivors(dataset, traces, left) == set()


@pytest.mark.parametrize("keyword", ["InstitutionName", "PatientComments", "DeviceUID", "StudyID"])
def test_a_rule_that_is_missing_is_noticed(monkeypatch, keyword: str) -> None:
    """The negative control of the test above: it does see what is left behind."""
    dataset, traces = every_attribute()
    tag = pydicom.datadict.tag_for_keyword(keyword)
    data = as_file(nested(dataset, 3))
    rules = {other: action for other, action in RULES.items() if other != tag}
    monkeypatch.setattr(deidentify_dicom, "RULES", rules)
    monkeypatch.setattr(deidentify_dicom, "KEPT_TEXT", deidentify_dicom.KEPT_TEXT | {tag})
    monkeypatch.setattr(Pseudonyms, "uid", lambda _self, uid: uid)

    found = clean_object(data, NAMES, REMOVE)

    assert isinstance(found, Cleaned)
    alive = survivors(pydicom.dcmread(io.BytesIO(found.data)), traces, found.data)
    assert keyword in alive


def test_dates_that_move_leave_no_date_and_keep_intervals() -> None:
    first = ct(AcquisitionDate="20210305", PatientBirthDate="19610705")
    other = ct(StudyDate="20210404", PatientID="4711 ")
    stranger = ct(PatientID="4712")

    one, two, three = (cleaned(as_file(image), SHIFT) for image in (first, other, stranger))

    def day(value):
        return np.datetime64(f"{value[:4]}-{value[4:6]}-{value[6:8]}")

    moved = day(one.StudyDate) - np.datetime64("2021-03-04")
    assert -3650 <= moved.astype(int) <= -1
    assert day(one.AcquisitionDate) - day(one.StudyDate) == np.timedelta64(1, "D")
    assert day(two.StudyDate) - day(one.StudyDate) == np.timedelta64(31, "D")
    assert day(one.AcquisitionDateTime[:8]) == day(one.StudyDate)
    assert one.AcquisitionDateTime.endswith("101112.5+0100")
    assert day(three.StudyDate) != day(one.StudyDate)
    assert one.PatientBirthDate == ""
    assert one.LongitudinalTemporalInformationModified == "MODIFIED"
    codes = [item.CodeValue for item in one.DeidentificationMethodCodeSequence]
    assert codes == ["113100", "113107"]


@pytest.mark.parametrize("value", ["2021", "nonsense", "20211399", "00010101", "20210304\\x"])
def test_what_is_no_date_does_not_move_it_goes(value: str) -> None:
    with pydicom.config.disable_value_validation():
        data = as_file(ct(StudyDate=value))

    assert cleaned(data, SHIFT).StudyDate == ""


def test_dates_are_removed_by_default() -> None:
    image = cleaned(as_file(ct()))

    assert image.StudyDate == image.StudyTime == image.PatientBirthDate == ""
    assert image.get("AcquisitionDateTime", "1900").startswith("1900")
    assert image.LongitudinalTemporalInformationModified == "REMOVED"


def test_the_reader_still_finds_what_it_needs() -> None:
    image = cleaned(as_file(ct()))

    assert image.Modality == "CT"
    assert image.ImageType == ["ORIGINAL", "PRIMARY", "AXIAL"]
    assert image.ImagePositionPatient == [1, 2, 3]
    assert image.PixelSpacing == [0.7, 0.8]
    assert (image.SliceThickness, image.RescaleIntercept) == (2.5, -1024)
    assert (image.Manufacturer, image.ConvolutionKernel) == ("ACME", "B30f")
    assert image.PixelData == np.arange(6, dtype="<u2").tobytes()
    assert image.PatientIdentityRemoved == "YES"
    assert image.DeidentificationMethod[0] == deidentify_dicom.PROFILE
    assert image.DeidentificationMethodCodeSequence[0].CodeValue == "113100"


def test_uids_are_mapped_alike_everywhere_and_only_with_the_same_key() -> None:
    reference = Dataset()
    reference.ReferencedSOPClassUID = CTImageStorage
    reference.ReferencedSOPInstanceUID = "1.2.826.0.1.1.1"
    data = as_file(ct(SourceImageSequence=[reference]))

    image = cleaned(data)
    other_key = clean_object(data, Pseudonyms(b"o" * 32), REMOVE)

    assert re.fullmatch(r"2\.25\.\d{1,39}", image.SOPInstanceUID)
    assert image.SOPInstanceUID == image.file_meta.MediaStorageSOPInstanceUID
    assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID
    assert image.SourceImageSequence[0].ReferencedSOPClassUID == CTImageStorage
    assert len({image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID}) == 3
    assert clean_object(data, NAMES, REMOVE) == clean_object(data, NAMES, REMOVE)
    assert isinstance(other_key, Cleaned)
    assert other_key.series_uid != image.SeriesInstanceUID
    assert other_key.patient != image.PatientID


def test_a_patient_has_one_pseudonym() -> None:
    image = cleaned(as_file(ct()))

    assert image.PatientID == image.PatientName == NAMES.patient(patient_key("4711"))
    assert cleaned(as_file(ct(PatientID=" 4711 "))).PatientID == image.PatientID
    assert cleaned(as_file(ct(PatientID=""))).PatientID == ""


def test_what_the_table_does_not_know_goes_too() -> None:
    with quiet():
        _check_what_the_table_does_not_know()


def _check_what_the_table_does_not_know() -> None:
    image = ct(
        WindowCenterWidthExplanation="CANARY1",  # text of no rule
        ReceiveCoilName="CANARY2",
        BodyPartExamined="Canary Jane",  # no code: lower case
    )
    block = image.private_block(0x0029, "CANARY3", create=True)
    block.add_new(1, "LO", "CANARY4")
    image.add_new(0x60000010, "US", 2)
    image.add_new(0x60000022, "LO", "CANARY5")
    image.add_new(0x60003000, "OW", b"CANARY6\0")
    image.add_new(0x50003000, "OW", b"CANARY7\0")
    image.add_new(0x00087777, "LO", "CANARY8")  # unknown to the dictionary
    local = Dataset()
    local.CodeValue, local.CodingSchemeDesignator, local.CodeMeaning = "C9", "99HERE", "CANARY9"
    known = Dataset()
    known.CodeValue, known.CodingSchemeDesignator = "10200004", "SCT"
    known.CodeMeaning = "Liver"
    image.AnatomicRegionSequence = [local, known]
    with pydicom.config.disable_value_validation():
        image.add_new("KVP", "LO", "CANARY10")  # under a wrong representation
        image.add_new("SpacingBetweenSlices", "LT", "CANARY11")
        image.add_new("RescaleType", "OB", b"CANARY12")
        data = as_file(image, preamble=b"MZ CANARY0".ljust(128, b"\0"))
    assert len(set(re.findall(rb"CANARY\d+", data))) == 13

    found = clean_object(data, NAMES, REMOVE)

    assert isinstance(found, Cleaned)
    assert re.findall(rb"(?i)CANARY\w*", found.data) == []
    assert found.data[:132] == bytes(128) + b"DICM"
    left = pydicom.dcmread(io.BytesIO(found.data))
    assert [code.CodeMeaning for code in left.AnatomicRegionSequence] == ["REMOVED", "Liver"]


@pytest.mark.parametrize(
    "attributes",
    [
        {"BurnedInAnnotation": "YES"},
        {"SOPClassUID": SecondaryCaptureImageStorage},
        {"Modality": "US"},
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
        {"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]},
    ],
)
def test_images_that_may_show_names_are_quarantined(tmp_path, attributes) -> None:
    data = as_file(ct(**attributes))
    (tmp_path / "sent").write_bytes(data)

    found = clean_object(data, NAMES, REMOVE)
    with pytest.raises(ScanError) as refused:
        deidentify_upload(tmp_path / "sent", tmp_path / "kept", NAMES, REMOVE)

    assert isinstance(found, Refused)
    assert found.is_quarantined
    assert refused.value.code == "burned_in_annotation"
    assert isinstance(clean_object(data, NAMES, Policy(accept_burned_in=True)), Cleaned)


@pytest.mark.parametrize("attributes", [{"BurnedInAnnotation": "NO"}, {"ImageType": "ORIGINAL"}])
def test_images_that_say_nothing_of_the_kind_are_not(attributes) -> None:
    assert isinstance(clean_object(as_file(ct(**attributes)), NAMES, REMOVE), Cleaned)


def test_a_series_with_one_burned_in_image_goes_as_a_whole(tmp_path) -> None:
    sent, kept = tmp_path / "sent", tmp_path / "kept"
    with zipfile.ZipFile(sent, "w") as archive:
        for number in range(4):
            image = ct(SOPInstanceUID=f"1.2.3.{number}", SeriesInstanceUID=f"1.2.4.{number % 2}")
            if number == 3:
                image.BurnedInAnnotation = "YES"
            archive.writestr(f"DOE_JANE/{number}", as_file(image))
        archive.writestr("DOE_JANE/report.txt", "Jane Doe")

    found = deidentify_upload(sent, kept, NAMES, REMOVE)

    assert found is not None
    assert found.places == (0, 2)
    assert set(found.left_out) == {1, 3, 4}
    assert "quarantined" in found.left_out[1].reason
    assert found.left_out[1].sop_uid == NAMES.uid("1.2.3.1")
    assert found.series_uids == {NAMES.uid("1.2.4.0")}
    with zipfile.ZipFile(kept) as archive:
        assert archive.namelist() == ["000000", "000002"]
        assert archive.comment == b""


def test_a_zip_is_cleaned_alike_each_time_and_read_like_the_original(tmp_path, small_zip) -> None:
    first = deidentify_upload(small_zip, tmp_path / "a", NAMES, REMOVE)
    again = deidentify_upload(small_zip, tmp_path / "b", NAMES, REMOVE)
    raw, clean = (read_scan(path, kind="image") for path in (small_zip, tmp_path / "a"))

    assert first is not None and again is not None
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert np.array_equal(raw.volume.voxels, clean.volume.voxels)
    assert np.array_equal(raw.volume.affine, clean.volume.affine)
    assert clean.series_uid == NAMES.uid(raw.series_uid)
    assert first.patient_of(clean.patient_key) == NAMES.patient(raw.patient_key)
    assert first.patient_of(raw.patient_key) == ""


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_the_transfer_syntax_stays(syntax) -> None:
    pixels = np.arange(6, dtype=">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes()
    image = cleaned(as_file(ct(PixelData=pixels), syntax))

    assert image.file_meta.TransferSyntaxUID == syntax
    assert image.PixelData == pixels


@pytest.mark.parametrize("size", [0, 131, 140, 400, 700])
def test_a_damaged_object_is_refused_not_raised(size: int) -> None:
    found = clean_object(as_file(ct())[:size], NAMES, REMOVE)

    assert isinstance(found, Cleaned | Refused)


def test_sequences_without_end_go() -> None:
    inner = ct()
    for _ in range(40):
        shell = Dataset()
        shell.DerivationCodeSequence = [inner]
        shell.PatientComments = "CANARY"
        inner = shell
    image = ct()
    image.update(inner)

    found = clean_object(as_file(image), NAMES, REMOVE)

    assert isinstance(found, Cleaned)
    assert b"CANARY" not in found.data
    assert b"Doe^Jane" not in found.data


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_mutated_objects_are_cleaned_or_refused_and_nothing_else(syntax) -> None:
    dataset, _ = every_attribute()
    whole = nested(dataset, 1)
    whole.SOPClassUID = CTImageStorage
    seeds = [as_file(ct(), syntax), as_file(whole, syntax)]
    rng = np.random.default_rng(5)
    outcomes = set()

    for number in range(400):
        data = bytearray(seeds[number % 20 == 0])
        for at in rng.integers(0, len(data), rng.integers(1, 12)):
            data[at] = rng.integers(0, 256)
        if number % 3 == 0:
            data = data[: rng.integers(1, len(data))]
        try:
            outcomes.add(type(clean_object(bytes(data), NAMES, SHIFT)))
        except ScanError as error:
            assert error.code == "too_large"

    assert outcomes == {Cleaned, Refused}


def test_a_text_that_is_no_uid_is_replaced_without_a_warning_that_shows_it(caplog) -> None:
    """Found by schemathesis: pydicom warns of a component with a leading zero, and prints it."""
    names = Pseudonyms(b"k" * 32)

    changed = names.uid("4.06659995425451")

    assert changed.startswith("2.25.") and changed == names.uid("4.06659995425451")
    assert not caplog.records
    assert names.uid("1.2.840.10008.1.2") == "1.2.840.10008.1.2"  # DICOM's own stays
