"""One DICOM object: what its header says, and its pixels.

Only image objects that form volumes are let through, by an allow-list of SOP classes; everything
else is refused with a reason that names the kind of object and nothing of the patient.

Axes: F frames, R rows, C columns. Positions and directions are LPS+ mm, as DICOM has them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import iter_pixels
from pydicom.tag import Tag
from pydicom.uid import (
    JPEG2000,
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLSNearLossless,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)

from imaging.code_stream import check_frames
from imaging.dicom_file import (
    clean_uid,
    is_deflated,
    kind_of,
    looks_like_dicom,
    parse,
    parse_until_pixels,
    quiet,
    sop_class_of,
    sop_uid_of,
)
from imaging.errors import ScanError
from imaging.limits import MAX_SIDE, MAX_VOXELS
from imaging.volume import Array

__all__ = [  # with what others took from here before `dicom_file` was split off
    "MULTI_FRAME", "SINGLE_FRAME", "Frame", "Header", "Native", "check_transfer_syntax", "decode",
    "kind_of", "looks_like_dicom", "parse", "patient_key", "quiet", "read_header",
    "read_header_start", "read_pixels", "sop_class_of",
]  # fmt: skip

SINGLE_FRAME = {CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage}
MULTI_FRAME = {
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
}

_DECODERS = {
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    JPEG2000Lossless: "pylibjpeg",
    JPEG2000: "pylibjpeg",
}
"""Where GDCM is not to be asked: damaged streams make it abort the whole process."""

_KEYWORDS = [
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID",
    "SeriesInstanceUID", "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient",
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns",
    "PixelSpacing", "BitsAllocated", "BitsStored", "PixelRepresentation", "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_TAGS = {keyword: Tag(keyword) for keyword in _KEYWORDS}
_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One image plane: where it lies and how its values scale."""

    index: int
    position_mm: tuple[float, ...]
    """Centre of the first pixel, (3,)."""
    orientation: tuple[float, ...]
    """Direction of growing column index, then of growing row index, (6,)."""
    spacing_mm: tuple[float, ...]
    """Between rows, then between columns, (2,)."""
    slope: float
    intercept: float


@dataclass(frozen=True, slots=True)
class Native:
    """Where uncompressed pixels stand in the file, to be read without parsing it again."""

    offset_bytes: int
    size_bytes: int
    """As declared; the file may hold less."""
    dtype: np.dtype[Any]
    bits_stored: int
    """The lowest ones; what stands above them (PS3.5, 8.1.1) is not of the value."""


@dataclass(frozen=True, slots=True)
class Header:
    """What one image object says about itself, checked."""

    member: int
    sop_uid: str
    series_uid: str
    frame_of_reference: str
    modality: str
    patient_key: str
    rows: int
    columns: int
    frames: tuple[Frame, ...]
    native: Native | None = None
    """None where the pixels are compressed, or need more than a cast."""


def read_header(data: bytes, member: int) -> Header:
    """Parse and judge everything but the pixels.

    Args:
        data: The whole file.
        member: Its place among the files sent in.

    Raises:
        ScanError: The object is of no use for a volume; the detail says why.
    """
    header = read_header_start(data, member, is_whole=True)
    assert header is not None
    return header


def read_header_start(start: bytes, member: int, *, is_whole: bool) -> Header | None:
    """`read_header` from the first bytes of a file; None where the header goes on beyond them."""
    with quiet():
        try:
            if not is_whole and is_deflated(start):
                return None
            dataset, stop = parse_until_pixels(start, list(_TAGS.values()))
            if not is_whole and stop + 12 > len(start):
                return None
            return _judge(dataset, member, _native(dataset, start[stop : stop + 12], stop))
        except (ScanError, MemoryError):
            raise
        except Exception as error:  # pydicom lets a dozen error types out
            if not is_whole:
                return None
            raise ScanError("not_a_scan", "a damaged DICOM object, or none") from error


def read_pixels(data: bytes, header: Header, indices: Sequence[int]) -> Iterator[Array]:
    """Stored values of the frames asked for, one (R, C) at a time, in that order.

    Raises:
        ScanError: `truncated_file`, `unsupported_transfer_syntax`.
    """
    shape = (header.rows, header.columns)
    name = f"pixel data of file {header.member}"
    yield from decode(data, shape, len(header.frames), indices, name)


def decode(
    data: bytes, shape: tuple[int, ...], num_frames: int, indices: Sequence[int], name: str
) -> Iterator[Array]:
    """Stored values of the frames asked for, one at a time, in that order.

    Args:
        data: The whole file.
        shape: Of a frame by its header: (R, C), or (R, C, 3) for colours, which come as RGB.
        num_frames: How many the file holds by its header.
        indices: Which frames.
        name: What messages call the pixel data.

    Raises:
        ScanError: `truncated_file`.
    """
    with quiet():
        try:
            dataset = parse(data)
            _check_length(dataset, math.prod(shape) * num_frames, name)
            if UID(str(dataset.file_meta.TransferSyntaxUID)).is_encapsulated:
                frames = generate_frames(dataset.PixelData, number_of_frames=num_frames)
                check_frames(frames, shape[0], shape[1])
            plugin = _DECODERS.get(UID(str(dataset.file_meta.TransferSyntaxUID)), "")
            for pixels in iter_pixels(dataset, indices=list(indices), decoding_plugin=plugin):
                yield pixels.reshape(shape)
        except (ScanError, MemoryError):
            raise
        except Exception as error:  # codecs let anything out
            raise ScanError("truncated_file", f"{name} are damaged or cut off") from error


def _native(dataset: Dataset, element: bytes, at: int) -> Native | None:
    """Where the pixels stand, from the first bytes of their element (PS3.5, 7.1 and 8.1)."""
    syntax = dataset.file_meta.TransferSyntaxUID
    bits, is_signed = dataset.get("BitsAllocated"), dataset.get("PixelRepresentation")
    if bits not in (8, 16) or is_signed not in (0, 1) or element[:4] != b"\xe0\x7f\x10\0":
        return None
    if syntax == ImplicitVRLittleEndian:
        length, value_at = element[4:8], at + 8
    elif syntax == ExplicitVRLittleEndian and element[4:6] in (b"OW", b"OB"):
        length, value_at = element[8:12], at + 12
    else:
        return None
    size = int.from_bytes(length, "little")
    if size == 0xFFFFFFFF:
        return None
    stored = int(dataset.get("BitsStored") or bits)
    if not 1 <= stored <= bits:
        return None
    return Native(value_at, size, np.dtype(f"<{'i' if is_signed else 'u'}{bits // 8}"), stored)


def _judge(dataset: Dataset, member: int, native: Native | None) -> Header:
    sop_class = sop_class_of(dataset)
    if sop_class == MediaStorageDirectoryStorage:
        raise ScanError("not_a_scan", "a DICOMDIR, an index of other files")
    if sop_class not in SINGLE_FRAME | MULTI_FRAME:
        raise ScanError("not_a_scan", f"{kind_of(sop_class)}; expected CT, MR or PET images")
    if "LOCALIZER" in [str(word).upper() for word in _many(_plain(dataset, "ImageType"))]:
        raise ScanError("not_a_scan", "a localizer image")
    _check_pixel_format(dataset)
    rows, columns = int(_plain(dataset, "Rows")), int(_plain(dataset, "Columns"))
    num_frames = int(_plain(dataset, "NumberOfFrames") or 1)
    if rows < 1 or columns < 1 or num_frames < 1:
        raise ScanError("not_a_scan", "an image without pixels")
    if max(rows, columns, num_frames) > MAX_SIDE or rows * columns * num_frames > MAX_VOXELS:
        raise ScanError("too_large", f"{columns} x {rows} x {num_frames} pixels in one file")
    if sop_class in SINGLE_FRAME and num_frames != 1:
        raise ScanError("unsupported_format", f"{num_frames} frames in a single-frame object")
    return Header(
        member=member,
        sop_uid=sop_uid_of(dataset),
        series_uid=clean_uid(_plain(dataset, "SeriesInstanceUID")),
        frame_of_reference=str(_plain(dataset, "FrameOfReferenceUID") or ""),
        modality=_modality(dataset, sop_class),
        patient_key=patient_key(str(_plain(dataset, "PatientID") or "")),
        rows=rows,
        columns=columns,
        frames=tuple(_frame(dataset, index) for index in range(num_frames)),
        native=native,
    )


def _modality(dataset: Dataset, sop_class: UID) -> str:
    """CT, MR or PT; by the kind of object where the attribute says something else."""
    stated = str(dataset.get("Modality") or "")
    if stated in ("CT", "MR", "PT"):
        return stated
    return next((word for word in ("CT", "MR") if f"{word} Image" in sop_class.name), "PT")


def check_transfer_syntax(dataset: Dataset) -> None:
    """Refuse pixels that no decoder here reads (`unsupported_transfer_syntax`)."""
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    if not _is_readable(syntax):
        name = syntax.name if syntax.name != str(syntax) else "an unknown one"
        raise ScanError("unsupported_transfer_syntax", f"no decoder for transfer syntax {name}")


@lru_cache(maxsize=64)
def _is_readable(syntax: UID) -> bool:
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _check_pixel_format(dataset: Dataset) -> None:
    check_transfer_syntax(dataset)
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric != "MONOCHROME2" or int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise ScanError("unsupported_format", "pixels are not MONOCHROME2 with one sample")
    if _plain(dataset, "ModalityLUTSequence"):
        raise ScanError("unsupported_format", "pixel values go through a modality look-up table")


def _frame(dataset: Dataset, index: int) -> Frame:
    position = _numbers(dataset, index, "ImagePositionPatient", 3)
    orientation = _numbers(dataset, index, "ImageOrientationPatient", 6)
    spacing = _numbers(dataset, index, "PixelSpacing", 2)
    slope = _value(dataset, index, "RescaleSlope")
    intercept = _value(dataset, index, "RescaleIntercept")
    scale = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    if not np.isfinite(scale).all():
        raise ScanError("non_finite_voxels", "the rescale slope or intercept is not finite")
    return Frame(index, position, orientation, spacing, *scale)


def _numbers(dataset: Dataset, index: int, keyword: str, count: int) -> tuple[float, ...]:
    numbers = tuple(float(number) for number in _many(_value(dataset, index, keyword)))
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ScanError("bad_geometry", f"an image without a usable {keyword}")
    return numbers


def _value(dataset: Dataset, index: int, keyword: str) -> Any:
    """A value of one frame: its own group, else the shared group, else the object's."""
    for groups, item in (
        ("PerFrameFunctionalGroupsSequence", index),
        ("SharedFunctionalGroupsSequence", 0),
    ):
        sequence = _plain(dataset, groups)
        if sequence and item < len(sequence):
            group = sequence[item].get(_GROUPS[keyword])
            if group and keyword in group[0]:
                return group[0][keyword].value
    return _plain(dataset, keyword)


def _plain(dataset: Dataset, keyword: str) -> Any:
    """`dataset.get(keyword)` by tag, which is quicker for what is absent."""
    element = dataset.get(_TAGS[keyword])
    return None if element is None else element.value


def _many(value: Any) -> Sequence[Any]:
    if value is None or isinstance(value, str):
        return [] if not value else [value]
    return list(value)


def patient_key(patient_id: str) -> str:
    """A name for the patient that says nothing by itself; empty where none is known.

    Ids can be guessed and hashed again, so whoever stores this keys it first (HMAC).
    """
    if not patient_id.strip():
        return ""
    return hashlib.sha256(f"pcrl patient {patient_id.strip()}".encode(errors="replace")).hexdigest()


def _check_length(dataset: Dataset, num_samples: int, name: str) -> None:
    if "PixelData" not in dataset:
        raise ScanError("truncated_file", f"{name} are missing")
    if UID(str(dataset.file_meta.TransferSyntaxUID)).is_encapsulated:
        return
    if dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
        num_samples = num_samples * 2 // 3  # two pixels share their colour
    declared, found = num_samples * int(dataset.BitsAllocated) // 8, len(dataset.PixelData)
    if found < declared:
        raise ScanError(
            "truncated_file", f"{name} are {found} bytes; the header declares {declared}"
        )
