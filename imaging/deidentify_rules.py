"""What happens to each DICOM attribute: Table E.1-1 of PS3.15, and what it does not name.

The table of the Basic Application Level Confidentiality Profile comes as data from
dicom-anonymizer (edition 2026c: 655 rows). It lists what is known to identify; text that it does
not list may identify as well, so of all other attributes only numbers, codes and the text named
here are kept.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import cache

from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.tag import BaseTag

EDITION = "2026c"


class Action(Enum):
    """What the profile does with an attribute (PS3.15 Table E.1-1a)."""

    REMOVE = auto()  # X
    EMPTY = auto()  # Z, X/Z: zero length satisfies types 2 and 3
    DUMMY = auto()  # D, Z/D, X/D, X/Z/D: a value without meaning satisfies every type
    MAP = auto()  # U
    REFERENCES = auto()  # X/Z/U*: the sequence stays, the UIDs in it are mapped


_ACTIONS = {
    "X_TAGS": Action.REMOVE,
    "Z_TAGS": Action.EMPTY,
    "X_Z_TAGS": Action.EMPTY,
    "D_TAGS": Action.DUMMY,
    "Z_D_TAGS": Action.DUMMY,
    "X_D_TAGS": Action.DUMMY,
    "X_Z_D_TAGS": Action.DUMMY,
    "U_TAGS": Action.MAP,
    "X_Z_U_STAR_TAGS": Action.REFERENCES,
}


def _read_table() -> dict[int, Action]:
    table = dicom_anonymization_database_selector(f"dicomfields_{EDITION}")
    return {
        (tag[0] << 16) | tag[1]: action
        for category, action in _ACTIONS.items()
        for tag in table[category]
        if len(tag) == 2  # the others are masks: curves (50xx) and overlays (60xx)
    }


RULES: dict[int, Action] = _read_table()
"""By tag."""

MASKED_GROUPS = (0x5000, 0x6000)
"""Curves and overlays: the table names some of each group's attributes, all of them go."""


def _tags(*keywords: str) -> frozenset[int]:
    tags = {keyword: tag_for_keyword(keyword) for keyword in keywords}
    assert None not in tags.values(), tags
    return frozenset(tag for tag in tags.values() if tag is not None)


KEPT_TEXT = _tags(
    "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "ConvolutionKernel",
    "SequenceName", "PulseSequenceName", "RescaleType", "CodeValue", "LongCodeValue",
    "CodingSchemeDesignator", "CodingSchemeVersion", "CodeMeaning",
)  # fmt: skip
"""Text that says how the image was made."""

KEPT_BYTES = _tags(
    "PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "LUTData", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
)  # fmt: skip
"""Pixels and what is needed to show them."""

BYTES_VRS = frozenset({None, "OB", "OW", "OF", "OD", "OL", "OV", "UN", "US"})

NEVER_SHIFTED = _tags("PatientBirthDate", "PatientBirthTime")
"""Of the patient's life, not of the examination: emptied, whatever is wanted of dates."""

TEXT_VRS = frozenset({"LO", "SH", "LT", "ST", "UT", "UC", "PN", "UR", "AE", "UN", "AS"})
NUMBER_VRS = frozenset({"US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"})

DUMMIES: dict[str, object] = {
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
    "AS": "000Y",
    "DS": "0",
    "IS": "0",
    "UR": "about:blank",
    "OB": b"\0\0",
    "UN": b"\0\0",
}
"""Values without meaning; text is `REMOVED`."""


@cache
def vr_of(tag: BaseTag) -> str | None:
    """The value representation that the dictionary gives; None for a tag that it does not know."""
    try:
        return dictionary_VR(tag)
    except KeyError:
        return None
