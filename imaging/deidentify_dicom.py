"""One DICOM object without identities: the Basic Application Level Confidentiality Profile.

Applied at every depth. Pixels are not decoded: they stay as they are, but for bits that are not
theirs. What they show is not looked at: objects that say, or are known, to carry text are refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from datetime import date, timedelta
from io import BytesIO
from typing import Any, Literal

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from imaging.deidentify_rules import (
    BYTES_VRS,
    DUMMIES,
    EDITION,
    KEPT_BYTES,
    KEPT_TEXT,
    MASKED_GROUPS,
    NEVER_SHIFTED,
    NUMBER_VRS,
    RULES,
    TEXT_VRS,
    Action,
    vr_of,
)
from imaging.dicom2d import RADIOGRAPHS
from imaging.dicom_file import kind_of, parse, parse_until_pixels, quiet, sop_class_of
from imaging.dicom_header import MULTI_FRAME, SINGLE_FRAME, patient_key
from imaging.errors import ScanError
from imaging.identity import Policy, Pseudonyms

PROFILE = "PS3.15 Basic Application Level Confidentiality Profile"
MAX_DEPTH = 16
_MAX_CODES = 1000
"""UIDs or codes in one attribute; pixels under a wrong tag look like more of them."""

_IMPLEMENTATION = "2.25.222905148736125960104838296518170410453"
_NO_DATA_SET = (0x0000, 0x0002)
"""Groups of commands and of file meta information: never part of an object."""
_CAPTURES = {
    SecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
}
_MODALITIES_WITH_TEXT = {"US", "IVUS", "ES", "XC", "SC", "DOC"}
_SCREEN = re.compile(r"SCREEN[ _]?SAVE|SCREENSHOT|DOSE[ _]INFO|(.* )?PROT")
_SOP_CLASS = 0x00080016
_PIXELS = {0x7FE00008, 0x7FE00009, 0x7FE00010}
_CODE = re.compile(r"[A-Z0-9 _]{0,16}")
_DECIMAL = re.compile(r"[-+0-9.eE ]{0,40}")
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
_DATE_TIME = re.compile(r"(\d{8})((?:\d{2}){0,3}(?:\.\d{1,6})?(?:[+-]\d{4})?)")
_STANDARD_SCHEMES = {"DCM", "SCT", "SRT", "SNM3", "99SDM", "LN", "UCUM", "FMA", "RADLEX", "NCIt"}


@dataclass(frozen=True, slots=True)
class Cleaned:
    """An object without identities."""

    data: bytes
    """The whole file: preamble of zeros, file meta information, data set."""
    series_uid: str
    """Mapped."""
    patient: str
    """The patient's pseudonym, which is its PatientID now; empty where none was known."""
    sop_uid: str = ""
    """Mapped."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An object that is not kept, and why."""

    reason: str
    is_quarantined: bool
    series_uid: str = ""
    """Mapped."""
    sop_uid: str = ""
    """Mapped."""


def clean_object(data: bytes, names: Pseudonyms, policy: Policy) -> Cleaned | Refused:
    """De-identify one DICOM file.

    Args:
        data: The whole file.
        names: Gives pseudonyms.
        policy: What the site wants.

    Raises:
        ScanError: `too_large` from parsing; anything else that fails is `Refused`.
    """
    with quiet():
        try:
            parse_until_pixels(data, [_SOP_CLASS])  # refuses elements without end
            dataset = parse(data)
            return _clean_object(dataset, data, names, policy)
        except MemoryError:
            raise
        except ScanError as error:
            if error.code == "too_large":
                raise
            return Refused(error.detail, is_quarantined=False)
        except Exception:  # noqa: BLE001  # pydicom lets a dozen error types out
            return Refused("a damaged DICOM object, or none", is_quarantined=False)


def _clean_object(
    dataset: FileDataset | Dataset, data: bytes, names: Pseudonyms, policy: Policy
) -> Cleaned | Refused:
    sop_class = sop_class_of(dataset)
    series_uid = names.uid(_text(dataset, "SeriesInstanceUID"))
    meta = dataset.file_meta
    instance = _text(dataset, "SOPInstanceUID") or str(meta.get("MediaStorageSOPInstanceUID") or "")
    instance = names.uid(instance or hashlib.sha256(data).hexdigest())
    if not policy.accept_burned_in and (risk := _risk_of(dataset, sop_class)):
        return Refused(f"quarantined: {risk}", True, series_uid, instance)
    if sop_class not in SINGLE_FRAME | MULTI_FRAME | RADIOGRAPHS | _CAPTURES:
        reason = f"{kind_of(sop_class)}; images alone are kept"
        return Refused(reason, False, series_uid, instance)
    syntax = UID(str(meta.TransferSyntaxUID))
    if syntax.is_private or syntax.name == str(syntax):  # what is not registered may be any text
        return Refused("an unknown transfer syntax", False, series_uid, instance)
    key = patient_key(_text(dataset, "PatientID"))
    patient = names.patient(key) if key else ""
    owner = patient or _text(dataset, "StudyInstanceUID")

    days = names.shift_days(owner) if policy.dates == "shift" else None
    deidentify(dataset, names, shift_days=days)
    if not syntax.is_encapsulated:
        _cut_pixels(dataset)
        _clear_spare_bits(dataset, "<" if syntax.is_little_endian else ">")
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, instance
    dataset.PatientName = dataset.PatientID = patient
    _mark(dataset, is_shifted=days is not None)
    dataset.file_meta = _meta(sop_class, instance, syntax)
    dataset.preamble = bytes(128)
    written = BytesIO()
    dataset.save_as(written, enforce_file_format=True)
    return Cleaned(written.getvalue(), series_uid, patient, instance)


def _cut_pixels(dataset: Dataset) -> None:
    """Drop what follows the pixels in their element (PS3.3, C.7.6.3; one pad byte stays)."""
    pixels = dataset.get("PixelData")
    if not isinstance(pixels, bytes):
        return
    num_samples = math.prod(
        int(dataset.get(keyword) or 1)
        for keyword in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames")
    )
    num_bytes = -(-num_samples * int(dataset.BitsAllocated) // 8)
    if len(pixels) > num_bytes + num_bytes % 2:
        dataset.PixelData = pixels[:num_bytes] + bytes(num_bytes % 2)


def _clear_spare_bits(dataset: Dataset, order: Literal["<", ">"]) -> None:
    """Drop what lies in a pixel's bits above those stored, such as an overlay (PS3.5, 8.1.1).

    They are set as the sign has it, or to 0, which is how they are read anyway
    (`dicom_voxels.stored_frames`). The bits of compressed pixels stay.
    """
    pixels, allocated = dataset.get("PixelData"), int(dataset.get("BitsAllocated") or 0)
    stored = int(dataset.get("BitsStored") or allocated)
    high = int(dataset.get("HighBit") or stored - 1)
    if not isinstance(pixels, bytes) or allocated not in (8, 16, 32):
        return
    if not 0 < stored < allocated or high != stored - 1:
        return
    kind, size = "i" if dataset.get("PixelRepresentation") else "u", allocated // 8
    samples = np.frombuffer(pixels, f"{order}{kind}{size}", len(pixels) // size)
    spare = allocated - stored
    clear = np.right_shift(np.left_shift(samples, spare), spare).astype(samples.dtype)
    dataset.PixelData = clear.tobytes() + pixels[clear.nbytes :]


def deidentify(dataset: Dataset, names: Pseudonyms, *, shift_days: int | None = None) -> None:
    """Apply the profile to a data set and everything nested in it, in place.

    Args:
        dataset: The data set; private attributes, curves and overlays go as well.
        names: Maps UIDs.
        shift_days: Days that dates move by; None removes dates and times.
    """
    _Cleaner(names, shift_days).clean(dataset, 0)


class _Cleaner:
    def __init__(self, names: Pseudonyms, shift_days: int | None) -> None:
        self._names = names
        self._days = shift_days

    def clean(self, dataset: Dataset, depth: int) -> None:
        for tag in list(dataset.keys()):
            if not self._stays(dataset, tag, depth):
                del dataset[tag]
        _check_code(dataset)

    def _stays(self, dataset: Dataset, tag: BaseTag, depth: int) -> bool:
        """Whether an attribute stays; what stays has been cleaned in place."""
        if tag.is_private or tag.element == 0 or tag.group in _NO_DATA_SET:
            return False
        if tag.group & 0xFF00 in MASKED_GROUPS:
            return False
        action, vr = RULES.get(tag), vr_of(tag)
        if vr is None:
            return False
        if vr in ("DA", "DT", "TM") and self._days is not None and tag not in NEVER_SHIFTED:
            return self._shift(dataset, tag, vr)
        if action is Action.REMOVE:
            return False
        if action is Action.EMPTY:
            dataset[tag] = DataElement(tag, vr, DicomSequence() if vr == "SQ" else None)
            return True
        if action is Action.DUMMY and vr != "UI":
            if vr != "SQ":
                dataset[tag] = DataElement(tag, vr, DUMMIES.get(vr, "REMOVED"))
            return vr != "SQ"
        stored = dataset.get_item(tag)
        if depth and tag in _PIXELS:
            return False
        if tag in KEPT_BYTES and stored.VR in BYTES_VRS and isinstance(stored.value, bytes):
            return True
        try:
            element = dataset[tag]
            return self._is_plain(dataset, element, vr, depth)
        except Exception:  # noqa: BLE001  # a value that its representation cannot hold
            return False

    def _is_plain(self, dataset: Dataset, element: DataElement, vr: str, depth: int) -> bool:
        """Whether a value that the table does not forbid can identify nobody."""
        if vr == "SQ":
            if element.VR != "SQ" or depth >= MAX_DEPTH:
                return False
            for item in element.value:
                self.clean(item, depth + 1)
            return True
        values = _many(element.value)
        if vr in ("UI", "CS") and len(values) > _MAX_CODES:
            return False
        if vr == "UI":
            mapped = [self._names.uid(str(value)) for value in values]
            dataset[element.tag] = DataElement(element.tag, "UI", mapped)
            return True
        if vr == "CS":
            codes = [str(value) if _CODE.fullmatch(str(value)) else "" for value in values]
            dataset[element.tag] = DataElement(element.tag, "CS", codes)
            return any(codes) or not values
        if vr in ("DS", "IS"):
            return all(_DECIMAL.fullmatch(str(value)) for value in values)
        if vr in TEXT_VRS:
            return element.tag in KEPT_TEXT and all(isinstance(value, str) for value in values)
        if set(vr.split(" or ")) <= NUMBER_VRS or element.tag in KEPT_BYTES:
            return all(isinstance(value, int | float) for value in values)
        return False

    def _shift(self, dataset: Dataset, tag: BaseTag, vr: str) -> bool:
        assert self._days is not None
        try:
            values = [str(value) for value in _many(dataset[tag].value)]
            moved = [_moved(value, vr, self._days) for value in values]
        except Exception:  # noqa: BLE001  # no date
            moved = []
        dataset[tag] = DataElement(tag, vr, moved or None)
        return True


def _moved(value: str, vr: str, days: int) -> str:
    """A date or date-time some days away; a time of day as it is.

    Raises:
        ValueError: It is none.
        OverflowError: It would leave the calendar.
    """
    value = value.strip()
    if vr == "TM":
        if not _TIME.fullmatch(value):
            raise ValueError("no time")
        return value
    found = _DATE_TIME.fullmatch(value)
    if found is None or (vr == "DA" and found[2]):
        raise ValueError("no date")
    there = date(int(value[:4]), int(value[4:6]), int(value[6:8])) + timedelta(days=days)
    return there.strftime("%Y%m%d").zfill(8) + found[2]


def _check_code(item: Dataset) -> None:
    """A code's meaning is text: of a scheme that is not a standard, it may say anything."""
    if str(item.get("CodingSchemeDesignator")) in _STANDARD_SCHEMES:
        return
    for keyword in (
        "CodeMeaning",
        "CodeValue",
        "LongCodeValue",
        "CodingSchemeDesignator",
        "CodingSchemeVersion",
    ):
        if keyword in item:
            item[keyword].value = "REMOVED"


def _risk_of(dataset: Dataset, sop_class: UID) -> str:
    """Why pixels may show who the patient is; empty where nothing says so (PS3.15 E.1.1)."""
    if "YES" in _words(dataset, "BurnedInAnnotation"):
        return "BurnedInAnnotation is YES"
    if sop_class in _CAPTURES:
        return f"{kind_of(sop_class)}, which often shows text"
    if not _MODALITIES_WITH_TEXT.isdisjoint(_words(dataset, "Modality")):
        return "a modality whose images often show text"
    if any(_SCREEN.fullmatch(word) for word in _words(dataset, "ImageType")):
        return "ImageType tells of a saved screen"
    return ""


def _words(dataset: Dataset, keyword: str) -> list[str]:
    return [str(word).strip().upper() for word in _many(dataset.get(keyword))]


def _mark(dataset: Dataset, *, is_shifted: bool) -> None:
    """Say what was done (PS3.15 E.1.1; codes of CID 7050)."""
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = [PROFILE, f"Table E.1-1 of {EDITION}"]
    dataset.LongitudinalTemporalInformationModified = "MODIFIED" if is_shifted else "REMOVED"
    codes = [("113100", "Basic Application Confidentiality Profile")]
    if is_shifted:
        codes.append(("113107", "Retain Longitudinal Temporal Information Modified Dates Option"))
    dataset.DeidentificationMethodCodeSequence = [_code(*code) for code in codes]


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _meta(sop_class: UID, instance: str, syntax: UID) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = UID(instance)
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = UID(_IMPLEMENTATION)
    return meta


def _text(dataset: Dataset, keyword: str) -> str:
    return str(dataset.get(keyword) or "")


def _many(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str | bytes | int | float):
        return [value]
    return list(value)
