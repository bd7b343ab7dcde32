"""One 2D image: PNG, JPEG, or a radiograph in DICOM, told by content and never by name.

Axes: R rows from the top, C columns from the left, as the image is shown. Colours become luminance;
there is no geometry in mm.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, MpoImagePlugin

from imaging.dicom2d import luminance, read_radiograph
from imaging.dicom_file import looks_like_dicom
from imaging.errors import ScanError
from imaging.limits import MAX_FILE_BYTES, MAX_PIXELS, MAX_PIXELS_SIDE, read_capped
from imaging.nifti import is_nifti

Format = Literal["png", "jpeg", "dicom"]

Image.preinit()  # with MPO all that Pillow would load with a picture: a confined reader could not
assert MpoImagePlugin
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_DEEP_COLOUR = (b"\x02", b"\x04", b"\x06")
"""Colour types of PNG (its IHDR): colours, grey with transparency, colours with transparency."""
_ORIENTATION, _UPRIGHT = 0x0112, (0, 1)
_GREY_MODES = {"1", "L", "I", "I;16", "I;16B"}
_COLOUR_MODES = {"RGB", "YCbCr", "CMYK", "P"}
_ALPHA_MODES = {"LA": "L", "RGBA": "RGB", "PA": "RGB"}


@dataclass(frozen=True, slots=True)
class Image2d:
    """Pixels with what is known of them.

    Attributes:
        pixels: Float32 (R, C), brighter is denser in a radiograph; in the units of the file, or
            [0, 1] where a DICOM window was applied.
        modality: As in DICOM; empty for PNG and JPEG.
        format: What the file was.
        patient_key: Same for the same patient id, empty where none is known; key it before it is
            stored.
        notes: What was done to the stored values, in order, for a reader.
    """

    pixels: NDArray[np.float32]
    modality: str
    format: Format
    patient_key: str
    notes: tuple[str, ...]


def read_image(path: Path) -> Image2d:
    """Read one file.

    Raises:
        ScanError: As `decode_image`.
    """
    with path.open("rb") as file:
        return decode_image(read_capped(file, MAX_FILE_BYTES))


def decode_image(data: bytes) -> Image2d:
    """Decode the bytes of one file.

    Raises:
        ScanError: `not_a_scan`, `not_two_dimensional`, `constant_image`, `truncated_file`,
            `unsupported_format`, `unsupported_transfer_syntax`, `too_large`, `non_finite_voxels`.
    """
    try:
        image = _decode(data)
    except MemoryError as error:
        raise ScanError("too_large", "reading it takes more memory than allowed") from error
    low, high = float(image.pixels.min()), float(image.pixels.max())
    if low == high:
        rows, columns = image.pixels.shape
        raise ScanError("constant_image", f"all {columns} x {rows} pixels have the value {low:g}")
    return image


def refuse_turned(path: Path) -> None:
    """Refuse a picture that its EXIF orientation turns or mirrors.

    Its pixels lie otherwise than they are shown, and a copy without metadata would not tell; so
    this is asked of what was sent. What cannot be read at all is left to `read_image` to explain.

    Raises:
        ScanError: `unsupported_format`.
    """
    with path.open("rb") as file:
        data = read_capped(file, MAX_FILE_BYTES)
    if not data.startswith((_PNG, _JPEG)):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as picture:
                _check_size(picture)
                orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - Pillow lets a dozen error types out
        return
    if orientation not in _UPRIGHT:
        raise ScanError(
            "unsupported_format",
            f"EXIF orientation {orientation}: the picture is shown otherwise than its pixels lie; "
            "expected one that is saved upright",
        )


def _decode(data: bytes) -> Image2d:
    if data.startswith(_PNG):
        return _from_picture(data, "png")
    if data.startswith(_JPEG):
        return _from_picture(data, "jpeg")
    if looks_like_dicom(data[:132]):
        found = read_radiograph(data)
        with np.errstate(over="ignore"):
            pixels = found.pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ScanError("non_finite_voxels", "pixel values are beyond those of float32")
        return Image2d(pixels, found.modality, "dicom", found.patient_key, found.notes)
    if is_nifti(data[:1024]):
        raise ScanError("not_two_dimensional", "a NIfTI volume; expected one 2D image")
    if not data:
        raise ScanError("not_a_scan", "the file is empty")
    raise ScanError("not_a_scan", "neither PNG, nor JPEG, nor DICOM")


def _from_picture(data: bytes, form: Literal["png", "jpeg"]) -> Image2d:
    with opened(data) as picture:
        pixels, notes = _grey(picture)
    return Image2d(pixels, "", form, "", tuple(notes))


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """A PNG or JPEG as Pillow has decoded it.

    Raises:
        ScanError: `truncated_file`, `unsupported_format`, `too_large`, `not_two_dimensional`; so
            does what is done to the picture inside.
    """
    form = "PNG" if data.startswith(_PNG) else "JPEG"
    if form == "PNG" and data[24:25] == b"\x10" and data[25:26] in _DEEP_COLOUR:
        raise ScanError(  # Pillow would drop the lower byte of each
            "unsupported_format",
            "a PNG of 16 bits with colours or transparency; expected 16 bits of grey, or 8",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=[form]) as picture:
                _check_size(picture)
                _check_end(data, form)
                picture.load()
                yield picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ScanError("too_large", f"more than {MAX_PIXELS} pixels are declared") from error
    except (ScanError, MemoryError):
        raise
    except Exception as error:  # Pillow lets OSError, SyntaxError, ValueError, struct.error out
        raise ScanError("truncated_file", f"the {form} is damaged or cut off") from error


def _check_end(data: bytes, form: str) -> None:
    """Pillow may do without the end of a file whose last pixels it guesses."""
    if (b"IEND" if form == "PNG" else b"\xff\xd9") not in data:
        raise ScanError("truncated_file", f"the {form} has no end")


def _check_size(picture: Image.Image) -> None:
    columns, rows = picture.size
    if max(rows, columns) > MAX_PIXELS_SIDE or rows * columns > MAX_PIXELS:
        raise ScanError("too_large", f"{columns} x {rows} pixels; at most {MAX_PIXELS} are read")
    num_frames = int(getattr(picture, "n_frames", 1))
    if num_frames != 1:
        raise ScanError("not_two_dimensional", f"{num_frames} pictures in one file; expected one")


def _grey(picture: Image.Image) -> tuple[NDArray[np.float32], list[str]]:
    notes = []
    if picture.mode in _ALPHA_MODES:
        if np.asarray(picture.getchannel("A")).min() < 255:
            notes.append("transparency ignored")
        picture = picture.convert(_ALPHA_MODES[picture.mode])
    if picture.mode in _GREY_MODES:
        return np.asarray(picture).astype(np.float32), notes
    if picture.mode in _COLOUR_MODES:
        colours = np.asarray(picture.convert("RGB"))
        return luminance(colours).astype(np.float32), [*notes, "colours became luminance"]
    raise ScanError("unsupported_format", f"pixels of the kind {picture.mode}")
