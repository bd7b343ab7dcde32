"""Volumes that lie in one file, or in a header with its voxels beside it: NIfTI, NRRD, MetaImage.

What a file is shows in its first bytes, never in its name. The voxels of a detached header are
found among the files sent with it by their size: the name in the header is not followed.

Axes: the volume is (I, J, K) in RAS+; `source` keeps the grid of the file.
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from imaging import metaimage, nifti, nrrd
from imaging.archive import Member, is_zip
from imaging.dicom_file import looks_like_dicom
from imaging.dicom_voxels import Source
from imaging.errors import ScanError
from imaging.limits import CHUNK_BYTES, MAX_UNPACKED_BYTES
from imaging.orientation import canonical
from imaging.stored import MAX_HEADER_BYTES, StoredHeader, read_detached
from imaging.volume import Array, Grid, Volume

Form = Literal["nifti", "nrrd", "metaimage", "dicom", "zip"]

SNIFF_BYTES = 1024
_HEADERS = {"nrrd": nrrd.read_header, "metaimage": metaimage.read_header}


@dataclass(frozen=True, slots=True)
class Found:
    """A volume, and what it was read from."""

    volume: Volume
    source: Grid
    format: Literal["nifti", "nrrd", "metaimage"]
    affine_from: Literal["sform", "qform", "nrrd", "metaimage"]
    members: tuple[int, ...]
    """Places of its files."""
    notes: tuple[str, ...]


def form_of(file: Source) -> Form | None:
    """What a file is, by its first bytes; None for what is not read here."""
    with file.open("rb") if isinstance(file, Path) else file() as stream:
        start = stream.read(SNIFF_BYTES)
    if is_zip(start):
        return "zip"
    if start[:2] == b"\x1f\x8b":
        return "nifti" if nifti.is_nifti(_unzipped_start(start)) else None
    if nifti.is_nifti(start):
        return "nifti"
    if nrrd.is_nrrd(start):
        return "nrrd"
    if looks_like_dicom(start):
        return "dicom"
    return "metaimage" if metaimage.is_metaimage(start) else None


def read(files: Sequence[Source], forms: Sequence[Form | None], place: int) -> Found:
    """Read the volume whose file, or whose header, stands at `place`.

    Args:
        files: Everything that was sent.
        forms: What each is.
        place: Of a NIfTI, NRRD or MetaImage file.

    Raises:
        ScanError: See `nifti.read`, `nrrd.read_header` and `metaimage.read_header`.
    """
    form = forms[place]
    if form == "nifti":
        with _as_path(files[place]) as path:
            voxels, header = nifti.read_stored(path)
        source = Grid(header.shape, header.affine)
        volume = canonical(voxels, header.affine)
        return Found(volume, source, "nifti", header.affine_from, (place,), header.notes)
    assert form in ("nrrd", "metaimage")
    with _opened(files[place]) as stream:
        stored = _HEADERS[form](_start(stream))
    beside = _detached(files, forms, stored) if stored.is_detached else place
    voxels = _voxels(files[beside], stored)
    return Found(
        volume=canonical(voxels, stored.affine),
        source=Grid(stored.shape, stored.affine),
        format="nrrd" if form == "nrrd" else "metaimage",
        affine_from="nrrd" if form == "nrrd" else "metaimage",
        members=tuple(sorted({place, beside})),
        notes=(),
    )


def detached(
    files: Sequence[Source], forms: Sequence[Form | None], place: int
) -> tuple[StoredHeader, int] | None:
    """The header at `place` and where its voxels are, if they are in another file."""
    form = forms[place]
    if form not in ("nrrd", "metaimage"):
        return None
    with _opened(files[place]) as stream:
        stored = _HEADERS[form](_start(stream))
    return (stored, _detached(files, forms, stored)) if stored.is_detached else None


def _voxels(file: Source, header: StoredHeader) -> Array:
    if header.offset_bytes is not None:
        with _opened(file) as stream:
            return read_detached(stream, header)
    with _as_path(file) as path:  # counted from the end
        at = path.stat().st_size - header.num_bytes
        if at < 0:
            raise ScanError("truncated_file", f"{-at} bytes of the voxels are missing")
        with path.open("rb") as stream:
            return read_detached(stream, header.starting_at(at))


def _detached(files: Sequence[Source], forms: Sequence[Form | None], header: StoredHeader) -> int:
    """Which of the files holds the voxels of a detached header.

    Unpacked voxels are known by their size; packed ones must be the only other file.
    """
    others = [place for place, form in enumerate(forms) if form is None]
    if header.packing == "raw":
        needed = header.num_bytes + (header.offset_bytes or 0)
        others = [place for place in others if _size_of(files[place]) == needed]
    if len(others) == 1:
        return others[0]
    if len(files) == 1:
        raise ScanError(
            "unsupported_format",
            "a header whose voxels are in another file; send both in one zip",
        )
    raise ScanError(
        "truncated_file",
        f"{len(others)} files fit the header's {header.num_bytes} bytes of voxels; expected one",
    )


def _size_of(file: Source) -> int:
    if isinstance(file, Path):
        return file.stat().st_size
    if isinstance(file, Member):
        return file.declared_bytes
    with file() as stream:
        return sum(len(chunk) for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""))


def _start(stream: BinaryIO) -> bytes:
    start = b""
    while len(start) < MAX_HEADER_BYTES and (chunk := stream.read(MAX_HEADER_BYTES - len(start))):
        start += chunk
    return start


@contextmanager
def _opened(file: Source) -> Iterator[BinaryIO]:
    with file.open("rb") if isinstance(file, Path) else file() as stream:
        yield stream


@contextmanager
def _as_path(file: Source) -> Iterator[Path]:
    """A file on disk, a copy if it is the member of an archive."""
    if isinstance(file, Path):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "scan"
        with file() as packed, copy.open("wb") as unpacked:
            _copy_capped(packed, unpacked)
        yield copy


def _copy_capped(packed: BinaryIO, unpacked: BinaryIO) -> None:
    copied = 0
    while chunk := packed.read(CHUNK_BYTES):
        copied += len(chunk)
        if copied > MAX_UNPACKED_BYTES:
            raise ScanError("too_large", f"more than {MAX_UNPACKED_BYTES} bytes unpacked")
        unpacked.write(chunk)


def _unzipped_start(start: bytes) -> bytes:
    """What the first bytes of a gzip stream unpack to; empty if they do not."""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, SNIFF_BYTES)
    except (zlib.error, gzip.BadGzipFile):
        return b""
