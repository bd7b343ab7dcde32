"""One DICOM object: what its header says, and its pixels.

Only image objects that form volumes are let through, by an allow-list of SOP classes; everything
else is refused with a reason that names the kind of object and nothing of the patient.

Axes: F frames, R rows, C columns. Positions and directions are LPS+ mm, as DICOM has them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import (
    JPEG2000,
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    ExplicitVRBigEndian,
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
from imaging.errors import ScanError
from imaging.limits import MAX_INFLATED_BYTES, MAX_SIDE, MAX_VOXELS, Metered
from imaging.volume import Array

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

_TAGS = [
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "PatientID",
    "SeriesInstanceUID", "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient",
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns",
    "PixelSpacing", "BitsAllocated", "BitsStored", "RescaleIntercept", "RescaleSlope",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
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


def looks_like_dicom(start: bytes) -> bool:
    """Whether a file that begins with these bytes (132 at least) may be a DICOM object.

    Files without the preamble are recognised by their first group, 0002 or 0008, little endian.
    """
    return start[128:132] == b"DICM" or start[:4] in (
        b"\x02\0\0\0", b"\x02\0\x01\0", b"\x02\0\x10\0",
        b"\x08\0\0\0", b"\x08\0\x01\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x08\0\x16\0",
    )  # fmt: skip


def read_header(data: bytes, member: int) -> Header:
    """Parse and judge everything but the pixels.

    Args:
        data: The whole file.
        member: Its place among the files sent in.

    Raises:
        ScanError: The object is of no use for a volume; the detail says why.
    """
    with quiet():
        try:
            dataset = parse(data, specific_tags=_TAGS, stop_before_pixels=True)
            return _judge(dataset, member)
        except (ScanError, MemoryError):
            raise
        except Exception as error:  # pydicom lets a dozen error types out
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
    inflated = _inflate(data)
    if inflated is not None:
        dataset = pydicom.dcmread(Metered(inflated), force=True, **options)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        return dataset
    dataset = pydicom.dcmread(Metered(data), force=True, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _inflate(data: bytes) -> bytes | None:
    """The data set of a deflated file, inflated under a cap; None for any other file.

    pydicom would inflate without a limit: 1 MB makes 2.1 GB (reliability.md, T-H1).
    """
    if data[128:132] != b"DICM" or data[132:140] != b"\x02\0\0\0UL\x04\0":
        return None
    start = 144 + int.from_bytes(data[140:144], "little")
    meta = pydicom.dcmread(BytesIO(data[:start]), stop_before_pixels=True).file_meta
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return None
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = unpacker.decompress(data[start:], MAX_INFLATED_BYTES)
    if unpacker.unconsumed_tail:
        raise ScanError("too_large", f"a deflated file holds more than {MAX_INFLATED_BYTES} bytes")
    return inflated


def _judge(dataset: Dataset, member: int) -> Header:
    meta = dataset.file_meta
    sop_class = sop_class_of(dataset)
    if sop_class == MediaStorageDirectoryStorage:
        raise ScanError("not_a_scan", "a DICOMDIR, an index of other files")
    if sop_class not in SINGLE_FRAME | MULTI_FRAME:
        raise ScanError("not_a_scan", f"{kind_of(sop_class)}; expected CT, MR or PET images")
    if "LOCALIZER" in [str(word).upper() for word in _many(dataset.get("ImageType"))]:
        raise ScanError("not_a_scan", "a localizer image")
    _check_pixel_format(dataset)
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    if rows < 1 or columns < 1 or num_frames < 1:
        raise ScanError("not_a_scan", "an image without pixels")
    if max(rows, columns, num_frames) > MAX_SIDE or rows * columns * num_frames > MAX_VOXELS:
        raise ScanError("too_large", f"{columns} x {rows} x {num_frames} pixels in one file")
    if sop_class in SINGLE_FRAME and num_frames != 1:
        raise ScanError("unsupported_format", f"{num_frames} frames in a single-frame object")
    return Header(
        member=member,
        sop_uid=str(dataset.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or ""),
        series_uid=str(dataset.get("SeriesInstanceUID") or "")[:64],
        frame_of_reference=str(dataset.get("FrameOfReferenceUID", "")),
        modality=str(dataset.get("Modality", ""))[:16],
        patient_key=patient_key(str(dataset.get("PatientID") or "")),
        rows=rows,
        columns=columns,
        frames=tuple(_frame(dataset, index) for index in range(num_frames)),
    )


def sop_class_of(dataset: Dataset) -> UID:
    """What kind of object it is; what anonymisers blank often still stands in the file meta."""
    in_meta = dataset.file_meta.get("MediaStorageSOPClassUID")
    return UID(str(dataset.get("SOPClassUID") or in_meta or ""))


def kind_of(sop_class: UID) -> str:
    """For messages: "a DICOM object of the kind RT Dose Storage"."""
    is_known = sop_class.is_valid and sop_class.name != str(sop_class)
    return f"a DICOM object {f'of the kind {sop_class.name}' if is_known else 'of an unknown kind'}"


def check_transfer_syntax(dataset: Dataset) -> None:
    """Refuse pixels that no decoder here reads (`unsupported_transfer_syntax`)."""
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    try:
        is_readable = get_decoder(syntax).is_available
    except NotImplementedError:
        is_readable = False
    if not is_readable:
        name = syntax.name if not syntax.is_private else "a private one"
        raise ScanError("unsupported_transfer_syntax", f"no decoder for transfer syntax {name}")


def _check_pixel_format(dataset: Dataset) -> None:
    check_transfer_syntax(dataset)
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric != "MONOCHROME2" or int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise ScanError("unsupported_format", "pixels are not MONOCHROME2 with one sample")
    if dataset.get("ModalityLUTSequence"):
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
        sequence = dataset.get(groups)
        if sequence and item < len(sequence):
            group = sequence[item].get(_GROUPS[keyword])
            if group and keyword in group[0]:
                return group[0][keyword].value
    return dataset.get(keyword)


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
