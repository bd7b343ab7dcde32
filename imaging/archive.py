"""The files of a zip, opened by their place and never extracted by name.

Names matter only as a sign of intent: an archive that tries to climb out of a folder, links,
repeats a name, is encrypted or holds another archive is refused whole (`archive_unsafe`).
Sizes in the archive are not trusted; unpacked bytes are counted while they are read.
"""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from imaging.errors import ScanError
from imaging.limits import MAX_MEMBERS, MAX_UNPACKED_BYTES

_MAX_DIRECTORY_BYTES = 8 << 20
_LOCAL_HEADER_BYTES = 30
_END = b"PK\x05\x06"
_END_64 = b"PK\x06\x06"
_READS_PER_FILE = 3  # to sniff, for the header, for the pixels


def is_zip(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a zip, perhaps an empty one."""
    return start[:4] in (b"PK\x03\x04", _END)


@contextmanager
def open_members(path: Path) -> Iterator[list[Member]]:
    """The files of a zip (not its folders) in its order, each called to open it.

    Raises:
        ScanError: `truncated_file`, `too_large`, `archive_unsafe`, `unsupported_format`; also
            from reading an opened file.
    """
    _check_directory_size(path)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
        raise ScanError("truncated_file", "the zip has no readable directory") from error
    with archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(entries) > MAX_MEMBERS:
            raise ScanError("too_large", f"{len(entries)} files; at most {MAX_MEMBERS} are read")
        _check_entries(entries)
        _check_sizes(archive)
        budget = _Budget(_READS_PER_FILE * MAX_UNPACKED_BYTES)
        yield [Member(archive, entry, budget) for entry in entries]


def _check_directory_size(path: Path) -> None:
    """Refuse an enormous directory before zipfile builds an object for each entry."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 22 - 76))
        tail = file.read()
    at = tail.rfind(_END)
    if at < 0:
        raise ScanError("truncated_file", "the zip has no directory at its end")
    size = int.from_bytes(tail[at + 12 : at + 16], "little")
    if size == 0xFFFFFFFF:
        at = tail.rfind(_END_64, 0, at)
        size = int.from_bytes(tail[at + 40 : at + 48], "little") if at >= 0 else size
    if size > _MAX_DIRECTORY_BYTES:
        raise ScanError("too_large", f"the zip's directory declares {size} bytes")


def _check_entries(entries: list[zipfile.ZipInfo]) -> None:
    names: set[str] = set()
    for place, entry in enumerate(entries):
        fault = _fault_of(entry, names)
        if fault is not None:
            raise ScanError("archive_unsafe", f"file {place} of the zip {fault}")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ScanError(
                "unsupported_format", f"file {place} of the zip is neither stored nor deflated"
            )
        names.add(entry.filename)


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Refuse what announces too much, and members that share bytes (Fifield's bomb, CVE-2024-0450).

    Bytes that several members share would be unpacked once for each: 10 MB become 281 TB.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    declared = sum(entry.file_size for entry in entries)
    if declared > MAX_UNPACKED_BYTES:
        raise ScanError(
            "too_large", f"the zip declares {declared} bytes; at most {MAX_UNPACKED_BYTES} are read"
        )
    if entries and entries[0].header_offset < 0:
        raise ScanError("archive_unsafe", "a file of the zip would begin before it")
    ends = [entry.header_offset for entry in entries[1:]] + [archive.start_dir]
    for entry, end in zip(entries, ends, strict=False):
        start = entry.header_offset + _LOCAL_HEADER_BYTES + len(entry.orig_filename)
        if start + entry.compress_size > end:
            raise ScanError("archive_unsafe", "files of the zip overlap, or lie outside of it")


def _fault_of(entry: zipfile.ZipInfo, names: set[str]) -> str | None:
    name = entry.orig_filename.replace("\\", "/")
    mode = entry.external_attr >> 16
    if entry.flag_bits & 0x1:
        return "is encrypted"
    if "\0" in name or name.startswith("/") or name[1:2] == ":":
        return "has an absolute or broken name"
    if ".." in PurePosixPath(name).parts:
        return "has a name that climbs out of its folder"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "is a link or a device"
    if entry.filename in names:
        return "has the name of another one"
    return None


class _Budget:
    """Bytes that may still come out of an archive."""

    def __init__(self, left_bytes: int) -> None:
        self.left_bytes = left_bytes

    def spend(self, num_bytes: int) -> None:
        self.left_bytes -= num_bytes
        if self.left_bytes < 0:
            raise ScanError("too_large", f"the zip unpacks to more than {MAX_UNPACKED_BYTES} bytes")


class _Member:
    """A file of the archive, open for reading forward; damage becomes a `ScanError`."""

    def __init__(self, file: BinaryIO, declared_bytes: int, budget: _Budget) -> None:
        self.declared_bytes = declared_bytes
        self._file = file
        self._budget = budget

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ScanError("truncated_file", "a file of the zip is damaged or cut off") from error
        self._budget.spend(len(data))
        return data

    def __enter__(self) -> _Member:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Member:
    """A file of the archive; calling it opens it.

    Args:
        archive: Open for as long as members are read.
        entry: Which of its files.
        budget: Shared by all members.
    """

    def __init__(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: _Budget) -> None:
        self._archive = archive
        self._entry = entry
        self._budget = budget

    @property
    def name(self) -> str:
        """As the directory has it: to tell parts apart, never a path to write to."""
        return self._entry.filename

    @property
    def declared_bytes(self) -> int:
        """Unpacked size as the directory has it: a hint, not to be trusted."""
        return self._entry.file_size

    def __call__(self) -> BinaryIO:
        """Open it for reading forward."""
        try:
            file = self._archive.open(self._entry)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
            raise ScanError("truncated_file", "a file of the zip cannot be opened") from error
        opened = _Member(cast(BinaryIO, file), self.declared_bytes, self._budget)
        return cast(BinaryIO, opened)
