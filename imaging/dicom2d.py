"""A radiograph: one DICOM object of one frame, as its sender would have it shown.

Stored values go through the modality transformation (look-up table, or slope and intercept), then
through the first value-of-interest transformation (look-up table before window), and are mirrored
where the photometric interpretation is MONOCHROME1, so that dense tissue is bright in every image
(PS3.3 C.11.1, C.11.2, C.7.6.3.1.2). Colour screenshots become luminance.

R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
)

from imaging.dicom_header import (
    MULTI_FRAME,
    SINGLE_FRAME,
    check_transfer_syntax,
    decode,
    kind_of,
    parse,
    patient_key,
    quiet,
    sop_class_of,
)
from imaging.errors import ScanError
from imaging.limits import MAX_PIXELS, MAX_PIXELS_SIDE
from imaging.volume import Array

RADIOGRAPHS = {
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
}
MODALITIES = {"CR", "DX", "DR", "RG"}
"""Of a radiograph that was converted to a secondary capture, as in some public collections."""

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""

_TAGS = [
    "SpecificCharacterSet", "SOPClassUID", "Modality", "PatientID", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated",
    "BitsStored", "PixelRepresentation", "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
]  # fmt: skip
_GREY = {"MONOCHROME1", "MONOCHROME2"}
_COLOUR = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Radiograph:
    """Pixel values (R, C), what they are of, and what was done to them."""

    pixels: Values
    modality: str
    patient_key: str
    notes: tuple[str, ...]


def read_radiograph(data: bytes) -> Radiograph:
    """Decode a DICOM object.

    Args:
        data: The whole file.

    Raises:
        ScanError: `not_a_scan`, `not_two_dimensional`, `unsupported_transfer_syntax`,
            `unsupported_format`, `truncated_file`, `too_large`, `non_finite_voxels`.
    """
    with quiet():
        try:
            header = parse(data, specific_tags=_TAGS, stop_before_pixels=True)
            shape = _judge(header)
            (stored,) = decode(data, shape, 1, [0], "pixel data")
            pixels, notes = _shown(stored, header)
            modality = str(header.get("Modality", ""))[:16]
            key = patient_key(str(header.get("PatientID") or ""))
        except (ScanError, MemoryError):
            raise
        except Exception as error:  # pydicom lets a dozen error types out
            raise ScanError("not_a_scan", "a damaged DICOM object, or none") from error
    if not np.isfinite(pixels).all():
        raise ScanError("non_finite_voxels", "pixel values are not finite after the rescaling")
    return Radiograph(
        pixels=pixels,
        modality=modality,
        patient_key=key,
        notes=tuple(notes),
    )


def luminance(colours: Array) -> Values:
    """Brightness (R, C) of colours (R, C, 3)."""
    brightness: Values = colours.astype(np.float64) @ np.asarray(LUMINANCE)
    return brightness


def _judge(header: Dataset) -> tuple[int, ...]:
    """The shape of the frame, (R, C) or (R, C, 3), of an object that can be used."""
    sop_class = sop_class_of(header)
    modality = str(header.get("Modality", ""))
    expected = "expected a CR or DX image"
    if sop_class in SINGLE_FRAME | MULTI_FRAME:
        raise ScanError(
            "not_two_dimensional", f"{kind_of(sop_class)}, part of a volume; {expected}"
        )
    is_capture = sop_class == SecondaryCaptureImageStorage
    if sop_class not in RADIOGRAPHS and not is_capture:
        raise ScanError("not_a_scan", f"{kind_of(sop_class)}; {expected}")
    if is_capture and modality not in MODALITIES:
        raise ScanError("not_a_scan", f"a secondary capture that is no radiograph; {expected}")
    num_frames = int(header.get("NumberOfFrames") or 1)
    if num_frames != 1:
        raise ScanError("not_two_dimensional", f"{num_frames} frames; expected one")
    rows, columns = int(header.Rows), int(header.Columns)
    if rows < 1 or columns < 1:
        raise ScanError("not_a_scan", "an image without pixels")
    if max(rows, columns) > MAX_PIXELS_SIDE or rows * columns > MAX_PIXELS:
        raise ScanError("too_large", f"{columns} x {rows} pixels; at most {MAX_PIXELS} are read")
    check_transfer_syntax(header)
    photometric = str(header.get("PhotometricInterpretation", ""))
    samples = int(header.get("SamplesPerPixel", 1))
    if photometric in _GREY and samples == 1:
        return rows, columns
    if photometric in _COLOUR and samples == 3:
        return rows, columns, 3
    raise ScanError("unsupported_format", "pixels are neither grey nor red, green and blue")


def _shown(stored: Array, header: Dataset) -> tuple[Values, list[str]]:
    """The values (R, C) that a viewer would map to grey, and what was done for it."""
    if stored.ndim == 3:
        return luminance(stored), ["colours became luminance"]
    values, notes = stored.astype(np.float64), []
    if header.get("ModalityLUTSequence"):
        values = through_table(values, header.ModalityLUTSequence[0])
        notes.append("through the modality look-up table")
    elif header.get("RescaleSlope") is not None and header.get("RescaleIntercept") is not None:
        values = values * float(header.RescaleSlope) + float(header.RescaleIntercept)
        notes.append("rescaled")
    if header.get("VOILUTSequence"):
        values = through_table(values, header.VOILUTSequence[0])
        notes.append("through the look-up table of interest")
    elif (window := _window(header)) is not None:
        values = windowed(values, *window)
        notes.append(f"windowed ({window[2]}, centre {window[0]:g}, width {window[1]:g})")
    if header.PhotometricInterpretation == "MONOCHROME1":
        values = values.min() + values.max() - values
        notes.append("MONOCHROME1: mirrored")
    return values, notes


def windowed(values: Values, centre: float, width: float, function: str) -> Values:
    """A window of interest, onto [0, 1] (PS3.3 C.11.2.1.2, C.11.2.1.3).

    Args:
        values: After the modality transformation.
        centre: Window Center.
        width: Window Width, > 0; >= 1 for LINEAR, whose window of width 1 is a threshold.
        function: `LINEAR`, `LINEAR_EXACT` or `SIGMOID`.
    """
    if function == "SIGMOID":
        exponent = np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)
        return np.reciprocal(1.0 + np.exp(exponent))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1.0
    if width == 0.0:
        return (values > centre).astype(np.float64)
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def through_table(values: Values, item: Dataset) -> Values:
    """Values looked up in a modality or VOI table; its ends continue (PS3.3 C.11.1.1.1).

    Args:
        values: Whole numbers, or near to them.
        item: With LUT Descriptor (number of entries, first value mapped, bits) and LUT Data.
    """
    num_entries, first = int(item.LUTDescriptor[0]) or 1 << 16, int(item.LUTDescriptor[1])
    entries = _entries(item, num_entries)
    place = np.clip(np.rint(values) - first, 0, num_entries - 1).astype(np.intp)
    found: Values = entries[place]
    return found


def _entries(item: Dataset, num_entries: int) -> Values:
    """LUT Data, whatever its value representation: numbers, words, or bytes packed as words."""
    packed = item.LUTData
    if isinstance(packed, bytes):
        order = ">" if item.original_encoding[1] is False else "<"
        words = np.frombuffer(packed, dtype=f"{order}u2").astype("<u2")
        packed = words.view(np.uint8) if len(packed) < 2 * num_entries else words
    entries = np.asarray(packed, dtype=np.float64)
    if len(entries) < num_entries:
        raise ScanError(
            "truncated_file", f"a look-up table of {len(entries)} entries; {num_entries} declared"
        )
    return entries


def _window(header: Dataset) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window; None where there is none of use."""
    centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    if centre is None or width is None or function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    least = 1.0 if function == "LINEAR" else np.finfo(np.float64).tiny
    if not (np.isfinite(centre) and np.isfinite(width) and width >= least):
        return None
    return centre, width, function


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return float(value[0]) if len(value) else None
    return float(value)
