"""Files other than DICOM without identities: NIfTI, NRRD, MetaImage, PNG, JPEG.

A volume is written anew from the fields that say what the voxels are and where they lie; comments,
descriptions, extensions, key/value pairs, original file names and time stamps are not among them.
Voxels are copied as they are stored; only gzip is undone and done again. A picture is decoded, and
what it shows is kept as a PNG.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import nibabel as nib
import numpy as np

from imaging import metaimage, nifti, nrrd
from imaging.errors import ScanError
from imaging.image2d import opened
from imaging.limits import CHUNK_BYTES, MAX_FILE_BYTES, MAX_UNPACKED_BYTES, read_capped
from imaging.stored import MAX_HEADER_BYTES, StoredHeader

Form = Literal["nifti", "nrrd", "metaimage", "png", "jpeg"]

_NIFTI_FIELDS = (
    "magic", "dim", "dim_info", "datatype", "bitpix", "pixdim", "scl_slope", "scl_inter",
    "xyzt_units", "cal_max", "cal_min", "slice_start", "slice_end", "slice_code",
    "slice_duration", "toffset", "qform_code", "sform_code", "quatern_b", "quatern_c",
    "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
    "intent_code", "intent_p1", "intent_p2", "intent_p3",
)  # fmt: skip
_NRRD_FIELDS = {
    "type", "dimension", "sizes", "spacings", "space", "space dimension", "space directions",
    "space origin", "space units", "kinds", "centers", "centerings", "thicknesses",
    "axis mins", "axis maxs", "axismins", "axismaxs", "endian", "encoding", "block size",
    "blocksize", "min", "max", "old min", "old max",
}  # fmt: skip
_META_FIELDS = {
    "ndims", "binarydata", "binarydatabyteordermsb", "elementbyteordermsb",
    "compresseddata", "compresseddatasize", "transformmatrix", "rotation", "orientation",
    "offset", "position", "origin", "centerofrotation",
    "elementspacing", "elementsize", "dimsize", "elementmin", "elementmax",
    "elementnumberofchannels", "elementtype",
}  # fmt: skip
_PLAIN = re.compile(r"[-+A-Za-z0-9_.,:;()\" ]{0,400}")
_WORDS = {
    "kinds": {"domain", "space", "time", "list", "point", "vector", "none", "???"},
    "centers": {"cell", "node", "none", "???"},
    "centerings": {"cell", "node", "none", "???"},
    "space units": {"mm", "cm", "um", "none"},
}
"""The only words of fields that hold words."""

VOXELS = "voxels"
"""What a detached header calls the file of its voxels; readers find it by its size."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_MODES = {"1", "L", "LA", "I", "I;16", "RGB", "RGBA"}
"""Pixels that a PNG holds as Pillow has them; others are read as colours anyway: a JPEG's CMYK, and
a palette, which may have room for words and less colours than the pixels ask for."""
_GZIP = b"\x1f\x8b"


def form_of(start: bytes) -> Form | None:
    """Which of these formats a file is that begins with these bytes (1 KiB, perhaps gzipped)."""
    if start[:2] == _GZIP:
        try:
            start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, 1024)
        except zlib.error:
            return None
    if nifti.is_nifti(start):
        return "nifti"
    if nrrd.is_nrrd(start):
        return "nrrd"
    if start.startswith(_PNG):
        return "png"
    if start[:3] == b"\xff\xd8\xff":
        return "jpeg"
    return "metaimage" if metaimage.is_metaimage(start) else None


def clean_file(source: BinaryIO, target: BinaryIO, form: Form) -> None:
    """Write one file without identities.

    Args:
        source: Open at its start.
        target: Where to write; the bytes depend on `source` alone.
        form: What it is, by `form_of`.

    Raises:
        ScanError: `truncated_file`, `too_large`, `not_a_scan`, and what `nifti.read_header` raises.
    """
    with _unpacked(source, target) as (plain, clean):
        _CLEANERS[form](plain, clean)


@contextmanager
def _unpacked(source: BinaryIO, target: BinaryIO) -> Iterator[tuple[_Counted, BinaryIO]]:
    """Both files, behind gzip if the source is; without the name and the time in gzip's header."""
    start = source.read(2)
    counted = _Counted(source, start)
    if start != _GZIP:
        yield counted, target
        return
    try:
        with (
            gzip.GzipFile(fileobj=cast(BinaryIO, counted)) as unpacked,
            gzip.GzipFile("", "wb", 1, target, mtime=0) as packed,
        ):
            yield _Counted(cast(BinaryIO, unpacked)), cast(BinaryIO, packed)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScanError("truncated_file", "the gzip stream is damaged or cut off") from error


class _Counted:
    """A file for reading forward, with some bytes given back to it, under a cap."""

    def __init__(self, file: BinaryIO, start: bytes = b"") -> None:
        self._file = file
        self._start = start
        self._left = MAX_UNPACKED_BYTES

    def read(self, size: int = -1) -> bytes:
        if not self._start:
            data = self._file.read(size)
        elif size < 0:
            data, self._start = self._start + self._file.read(), b""
        else:
            data, self._start = self._start[:size], self._start[size:]
        self._left -= len(data)
        if self._left < 0:
            raise ScanError("too_large", f"a file unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        return data

    def exactly(self, size: int) -> bytes:
        """As many bytes, or as many as there are."""
        parts = bytearray()
        while len(parts) < size and (chunk := self.read(size - len(parts))):
            parts += chunk
        return bytes(parts)

    def skip(self, size: int) -> None:
        """Read past as many bytes."""
        while size > 0 and (chunk := self.read(min(CHUNK_BYTES, size))):
            size -= len(chunk)

    def copy_zlib_to(self, target: BinaryIO, num_bytes: int) -> None:
        """Copy a zlib stream of so many bytes as it is, and nothing that follows it."""
        unpacker = zlib.decompressobj()
        try:
            while not unpacker.eof and (chunk := self.read(CHUNK_BYTES)):
                waiting = chunk
                while waiting and not unpacker.eof:
                    num_bytes -= len(unpacker.decompress(waiting, CHUNK_BYTES))
                    if num_bytes < 0:
                        raise ScanError("not_a_scan", "more than the voxels in the zlib stream")
                    waiting = unpacker.unconsumed_tail
                target.write(chunk[: len(chunk) - len(unpacker.unused_data)])
        except zlib.error as error:
            raise ScanError("truncated_file", "the zlib stream is damaged") from error

    def copy_to(self, target: BinaryIO, size: int | None) -> None:
        """Copy so many bytes, or the rest; fewer if there are no more."""
        while size is None or size > 0:
            chunk = self.read(CHUNK_BYTES if size is None else min(CHUNK_BYTES, size))
            if not chunk:
                return
            target.write(chunk)
            size = None if size is None else size - len(chunk)


def _clean_nifti(source: _Counted, target: BinaryIO) -> None:
    start = source.exactly(4)
    size = 540 if 540 in (int.from_bytes(start, "little"), int.from_bytes(start, "big")) else 348
    block = start + source.exactly(size - 4)
    found = nifti.read_header(io.BytesIO(block))
    kind: Any = nib.Nifti1Header if size == 348 else nib.Nifti2Header
    old = kind(block, check=False)
    new = kind(endianness=old.endianness)
    for name in _NIFTI_FIELDS:
        new[name] = old[name]
    new["vox_offset"] = size + 4
    target.write(new.binaryblock + bytes(4))
    source.exactly(found.offset_bytes - size)
    source.copy_to(target, int(np.prod(found.shape)) * found.dtype.itemsize)


def _clean_nrrd(source: _Counted, target: BinaryIO) -> None:
    start = source.exactly(MAX_HEADER_BYTES)
    found = nrrd.read_header(start)
    lines = re.split(rb"\r?\n\r?\n", start, maxsplit=1)[0].decode("latin-1").splitlines()
    kept = [lines[0].strip()[:8]]
    for line in lines[1:]:
        name, separator, value = line.partition(": ")
        name = name.strip().lower()
        is_field = bool(separator) and not line.startswith("#") and name in _NRRD_FIELDS
        if is_field and _PLAIN.fullmatch(value.strip()) and _is_in_words(name, value):
            kept.append(f"{name}: {value.strip()}")
    if found.is_detached:
        kept.append(f"data file: {VOXELS}")
    target.write(("\n".join(kept) + "\n\n").encode("ascii"))
    if not found.is_detached:
        clean_voxels(_Counted(cast(BinaryIO, source), start), target, found)


def _is_in_words(name: str, value: str) -> bool:
    if name not in _WORDS:
        return True
    return {word.strip('"').lower() for word in value.split()} <= _WORDS[name]


def _clean_metaimage(source: _Counted, target: BinaryIO) -> None:
    start = source.exactly(MAX_HEADER_BYTES)
    found = metaimage.read_header(start)
    target.write(b"ObjectType = Image\n")
    head = start if found.is_detached else start[: found.offset_bytes]
    for line in head.decode("latin-1").splitlines():
        name, separator, value = (part.strip() for part in line.partition("="))
        if separator and name.lower() in _META_FIELDS and _PLAIN.fullmatch(value):
            target.write(f"{name} = {value}\n".encode("ascii"))
        if name == "ElementDataFile":
            break
    target.write(f"ElementDataFile = {VOXELS if found.is_detached else 'LOCAL'}\n".encode())
    if not found.is_detached:
        clean_voxels(_Counted(cast(BinaryIO, source), start), target, found)


def clean_voxels(source: BinaryIO | _Counted, target: BinaryIO, header: StoredHeader) -> None:
    """Write the voxels of an NRRD or MetaImage header, without what stands before and after."""
    if header.offset_bytes is None:
        raise ScanError("unsupported_format", "voxels counted from the end of the file")
    counted = _Counted(cast(BinaryIO, source))
    counted.skip(header.offset_bytes)
    if header.packing == "raw":
        counted.copy_to(target, header.num_bytes)
    elif header.packing == "zlib":
        counted.copy_zlib_to(target, header.num_bytes)
    else:
        with _unpacked(cast(BinaryIO, counted), target) as (plain, clean):
            plain.copy_to(clean, header.num_bytes)


def _redraw(source: _Counted, target: BinaryIO) -> None:
    """A PNG or JPEG decoded and written anew as PNG: nothing of the file but what it shows.

    Leaving chunks and segments out would not do: there is room behind the zlib stream in IDAT, in
    tables that no scan uses, behind the last line that a decoder asks for.
    """
    data = read_capped(cast(BinaryIO, source), MAX_FILE_BYTES)
    clean = io.BytesIO()
    with opened(data) as picture:
        shown = picture if picture.mode in _PNG_MODES else picture.convert("RGB")
        shown.info.clear()  # Pillow writes profiles and resolutions that it finds there
        shown.save(clean, "PNG", compress_level=1)
    target.write(clean.getbuffer())  # a full disk is not the picture's fault


_CLEANERS: dict[Form, Any] = {
    "nifti": _clean_nifti,
    "nrrd": _clean_nrrd,
    "metaimage": _clean_metaimage,
    "png": _redraw,
    "jpeg": _redraw,
}


def clean_path(source: Path, target: Path, form: Form) -> None:
    """`clean_file` of paths."""
    with source.open("rb") as dirty, target.open("wb") as clean:
        clean_file(dirty, clean, form)
