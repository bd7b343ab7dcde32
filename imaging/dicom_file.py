"""The bytes of a DICOM file as a data set, without trust in them.

pydicom is kept from inflating without end, and from repeating values of the file in warnings and
logs. Of what the file says about itself only UIDs leave this module, and only if they are UIDs.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import count
from typing import Any

import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from imaging.errors import ScanError
from imaging.limits import MAX_INFLATED_BYTES, Metered

_PIXELS = 0x7FE00008
"""Float, double and plain pixel data stand from here on."""

_MAX_ELEMENTS = 20_000
"""At the top level before the pixels; runs of zeros look like elements without end."""

_MAX_ITEMS = 200_000
"""Of all sequences and of the pixels' fragments; an enhanced series of 8,000 frames has 50,000."""

_ITEM_MARKS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
"""The tag of an item, little and big endian (PS3.5, 7.5)."""

_UID = re.compile(r"[0-9.]{1,64}", re.ASCII)


def looks_like_dicom(start: bytes) -> bool:
    """Whether a file that begins with these bytes (132 at least) may be a DICOM object.

    Files without the preamble are recognised by their first group, 0002 or 0008, little endian.
    """
    return start[128:132] == b"DICM" or start[:4] in (
        b"\x02\0\0\0", b"\x02\0\x01\0", b"\x02\0\x10\0",
        b"\x08\0\0\0", b"\x08\0\x01\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x08\0\x16\0",
    )  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom from repeating values of the file in warnings and logs (S8)."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def parse(data: bytes, **options: Any) -> Dataset:
    """The data set of a file, with a transfer syntax, and not inflated without end.

    Call it within `quiet`; a damaged file makes pydicom raise anything.
    """
    refuse_commands(data)
    inflated = _inflate(data)
    _refuse_items_without_end(data if inflated is None else inflated)
    if inflated is not None:
        dataset = pydicom.dcmread(Metered(inflated), force=True, **options)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        return dataset
    dataset = pydicom.dcmread(Metered(data), force=True, **options)
    _complete_meta(dataset)
    return dataset


def refuse_commands(data: bytes) -> None:
    """Network commands (group 0000) do not stand in files; pydicom would read zeros as such.

    Args:
        data: A file, or its first bytes.

    Raises:
        ScanError: `not_a_scan`.
    """
    start = 132 if data[128:132] == b"DICM" else 0
    if data[start : start + 8] == b"\x02\0\0\0UL\x04\0":
        start += 12 + int.from_bytes(data[start + 8 : start + 12], "little")
    if data[start : start + 2] == b"\0\0" and start + 2 <= len(data):
        raise ScanError("not_a_scan", "a damaged DICOM object, or none")


def _refuse_items_without_end(data: bytes) -> None:
    """Bound what converting sequences costs: an empty item is 8 bytes and 20 microseconds."""
    num_items = max(data.count(mark) for mark in _ITEM_MARKS)
    if num_items > _MAX_ITEMS:
        raise ScanError("not_a_scan", f"a DICOM object of more than {_MAX_ITEMS} items")


def _complete_meta(dataset: Dataset) -> None:
    """Give a file without a transfer syntax the one that it was read in."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def parse_until_pixels(data: bytes, tags: Sequence[int | str]) -> tuple[Dataset, int]:
    """The data set without its pixels, and the byte where parsing stopped.

    Args:
        data: The file, or its start.
        tags: What to keep; as numbers where many files are read.
    """
    if is_deflated(data):
        return parse(data, specific_tags=list(tags), stop_before_pixels=True), len(data)
    refuse_commands(data)
    file = Metered(data)
    num_elements = count()

    def is_end(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        if next(num_elements) > _MAX_ELEMENTS:
            raise ScanError("not_a_scan", f"a DICOM object of more than {_MAX_ELEMENTS} elements")
        return int.__ge__(tag, _PIXELS)  # as numbers; comparing as tags takes ten times as long

    wanted = [Tag(tag) if isinstance(tag, str) else tag for tag in tags]
    dataset = read_partial(file, is_end, force=True, specific_tags=wanted)
    _complete_meta(dataset)
    return dataset, file.tell()


def is_deflated(data: bytes) -> bool:
    """Whether the file is in the deflated transfer syntax."""
    if data[128:132] != b"DICM" or data[132:140] != b"\x02\0\0\0UL\x04\0":
        return False
    start = 144 + int.from_bytes(data[140:144], "little")
    if b"1.2.840.10008.1.2.1.99" not in data[144:start]:
        return False
    meta = pydicom.dcmread(BytesIO(data[:start]), stop_before_pixels=True).file_meta
    return bool(meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian)


def _inflate(data: bytes) -> bytes | None:
    """The data set of a deflated file, inflated under a cap; None for any other file.

    pydicom would inflate without a limit: 1 MB makes 2.1 GB (reliability.md, T-H1).
    """
    if not is_deflated(data):
        return None
    start = 144 + int.from_bytes(data[140:144], "little")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = unpacker.decompress(data[start:], MAX_INFLATED_BYTES)
    if unpacker.unconsumed_tail:
        raise ScanError("too_large", f"a deflated file holds more than {MAX_INFLATED_BYTES} bytes")
    return inflated


def sop_uid_of(dataset: Dataset) -> str:
    """The SOP Instance UID, empty where there is none; see `clean_uid`."""
    meta = getattr(dataset, "file_meta", None) or {}
    return clean_uid(dataset.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID"))


def clean_uid(value: Any) -> str:
    """A UID that may be repeated to the sender: digits and dots, or a stand-in for other text.

    What stands where a UID should may be anything, a name too, so it is never passed on.
    """
    text = str(value or "")
    if not text or _UID.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode(errors="replace")).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def sop_class_of(dataset: Dataset) -> UID:
    """What kind of object it is; what anonymisers blank often still stands in the file meta."""
    in_meta = dataset.file_meta.get("MediaStorageSOPClassUID")
    return UID(str(dataset.get("SOPClassUID") or in_meta or ""))


def kind_of(sop_class: UID) -> str:
    """For messages: "a DICOM object of the kind RT Dose Storage"."""
    is_known = sop_class.is_valid and sop_class.name != str(sop_class)
    return f"a DICOM object {f'of the kind {sop_class.name}' if is_known else 'of an unknown kind'}"


def describe(data: bytes) -> tuple[str, str]:
    """SOP instance and series UID of any DICOM object, as far as they can be read; else empty."""
    tags = [Tag(name) for name in ("SOPInstanceUID", "SeriesInstanceUID")]
    with quiet():
        try:
            dataset, _ = parse_until_pixels(data, tags)
            return sop_uid_of(dataset), clean_uid(dataset.get("SeriesInstanceUID"))
        except (ScanError, MemoryError):
            return "", ""
        except Exception:  # noqa: BLE001  # pydicom lets a dozen error types out
            return "", ""
