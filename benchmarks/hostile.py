"""Hostile files, made at once and small: what the bombs of reliability.md (T-H1) look like.

Each is a few MB at most and asks for gigabytes, minutes or a deep stack. Nothing here is a scan.
"""

from __future__ import annotations

import gzip
import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

MIB = 1 << 20
GIANT_MIB = 1200
PREAMBLE = bytes(128) + b"DICM"
_EXPLICIT, _DEFLATED = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"
_CT_SOP = b"\x08\0\x16\0UI\x1a\x001.2.840.10008.5.1.4.1.1.2\0"


def deflated(num_mib: int, start: bytes = b"", block: bytes = bytes(MIB)) -> bytes:
    """A raw deflate stream of `start` and then `num_mib` times `block`, of a MiB; made at once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = packer.compress(start + block) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + packed * (num_mib - 1) + packer.flush()


def gzipped(stream: bytes) -> bytes:
    """A raw deflate stream as a gzip file, with a wrong checksum."""
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + stream + bytes(8)


def zipped(
    stream: bytes,
    count: int = 1,
    *,
    name: bytes = b"a",
    declared: int = MIB,
    flags: int = 0,
    overlap: bool = False,
    checksum: int = 0,
) -> bytes:
    """A raw deflate stream as `count` members of a zip, with a wrong checksum unless one is given.

    With `overlap` all entries of the directory point at one copy of the bytes.
    """
    sizes = struct.pack("<3I", checksum, len(stream), declared)
    common = struct.pack("<5H", 20, flags, 8, 0, 0x21)
    body, central = [], []
    at = 0
    for number in range(count):
        label = b"%s%05d" % (name, number) if count > 1 else name
        local = b"PK\x03\x04" + common + sizes + struct.pack("<2H", len(label), 0) + label
        central.append(
            b"PK\x01\x02" + struct.pack("<H", 20) + common + sizes
            + struct.pack("<5H2I", len(label), 0, 0, 0, 0, 0, at) + label
        )  # fmt: skip
        if not overlap or number == 0:
            body += [local, stream]
        if not overlap:
            at += len(local) + len(stream)
    held, directory = b"".join(body), b"".join(central)
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, count, count, len(directory), len(held), 0)
    return held + directory + end


def zip_of(members: dict[str, bytes]) -> bytes:
    """An honest zip."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members.items():
            archive.writestr(name, content)
    return held.getvalue()


def dicom_start(syntax: bytes = _EXPLICIT) -> bytes:
    """Preamble and file meta group of a DICOM file in the transfer syntax."""
    element = b"\x02\0\x10\0UI" + struct.pack("<H", len(syntax)) + syntax
    return PREAMBLE + b"\x02\0\0\0UL\x04\0" + struct.pack("<I", len(element)) + element


def deflated_dicom(stream: bytes) -> bytes:
    """A DICOM file in the deflated transfer syntax."""
    return dicom_start(_DEFLATED) + stream


def deep_dicom(depth: int) -> bytes:
    """A DICOM file of sequences within sequences."""
    nest = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    return dicom_start() + _CT_SOP + nest * depth


def nifti_header(shape: tuple[int, ...], *, second: bool = False) -> bytes:
    """The header of a single-file NIfTI-1 (or NIfTI-2) of int16, and nothing after it."""
    header = nib.Nifti2Header() if second else nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), 1)
    header["magic"] = b"n+2" if second else b"n+1"
    header["vox_offset"] = 544 if second else 352
    return bytes(header.binaryblock) + bytes(4)


def ct(syntax: UID = ExplicitVRLittleEndian, *, position: int = 0, **fields: object) -> Dataset:
    """A CT slice (64, 64), with other attributes in place of its own."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = CTImageStorage
    made.SOPInstanceUID, made.SeriesInstanceUID = f"1.2.3.{position + 1}", "1.2.3"
    made.Modality, made.PatientID = "CT", "hostile"
    made.ImagePositionPatient, made.PixelSpacing = [0, 0, position], [1, 1]
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    made.Rows, made.Columns, made.SamplesPerPixel = 64, 64, 1
    made.PhotometricInterpretation = "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 0
    made.PixelData = np.arange(4096, dtype="<u2").tobytes()
    if syntax.is_compressed:
        made.compress(syntax, generate_instance_uid=False)
    for keyword, value in fields.items():
        setattr(made, keyword, value)
    return made


def saved(dataset: Dataset) -> bytes:
    """The file of a data set."""
    held = io.BytesIO()
    dataset.save_as(held, enforce_file_format=True)
    return held.getvalue()


def _two(make: Callable[[int], bytes]) -> bytes:
    return zip_of({"a": make(0), "b": make(1)})


def huge_code_stream(syntax: UID, position: int) -> bytes:
    """A CT slice of 64 x 64 by its header whose compressed stream says 65535 x 65535."""
    data = saved(ct(syntax, position=position))
    if syntax == JPEG2000Lossless:
        at = data.index(b"\xff\x4f\xff\x51") + 8
        sides = struct.pack(">8I", 65535, 65535, 0, 0, 65535, 65535, 0, 0)
        return data[:at] + sides + data[at + 32 :]
    at = data.index(b"\xff\xf7") + 5
    return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]


def per_frame_groups(count: int) -> bytes:
    """An enhanced CT whose sequence holds empty items without end, as raw bytes."""
    made = ct(NumberOfFrames=min(count, 2**31 - 1), SOPClassUID=EnhancedCTImageStorage)
    del made.PixelData
    items = b"\xfe\xff\x00\xe0\0\0\0\0" * count
    sequence = b"\x00\x52\x30\x92SQ\0\0" + struct.pack("<I", len(items))
    return saved(made) + sequence + items


def _zips_in_zips() -> bytes:
    small = zipped(deflated(64), declared=64 * MIB)
    return zip_of({f"{n}.zip": zip_of({"a": small}) for n in range(16)})


def _declared_directory() -> bytes:
    content = bytearray(zipped(deflated(1)))
    content[-10:-6] = (100 << 20).to_bytes(4, "little")
    return bytes(content)


def _honest(stream: bytes, count: int) -> bytes:
    """A zip whose size and checksum are right."""
    content = zlib.decompress(stream, -zlib.MAX_WBITS)
    return zipped(stream, count, declared=len(content), checksum=zlib.crc32(content))


def _giant(start: bytes = b"") -> bytes:
    return deflated(GIANT_MIB, start)


_EMPTY = b"\x09\0\x01\x10LO\0\0" * (MIB // 8)

BOMBS: dict[str, Callable[[], bytes]] = {
    "zip": lambda: zipped(_giant(), declared=GIANT_MIB * MIB),
    "zip of DICOM": lambda: zipped(_giant(PREAMBLE), declared=GIANT_MIB * MIB),
    "zip of DICOM with a forged size": lambda: zipped(_giant(PREAMBLE), declared=100),
    "zip in a zip in a zip": _zips_in_zips,
    "zip of 3000 overlapping files": lambda: zipped(
        deflated(64, PREAMBLE), 3000, declared=64 * MIB, overlap=True
    ),
    "zip of 30 overlapping files": lambda: zipped(
        deflated(64, PREAMBLE), 30, declared=64 * MIB, overlap=True
    ),
    "zip that declares a directory of 100 MiB": _declared_directory,
    "zip of 60,000 files": lambda: zipped(b"\x03\0", 60_000, declared=0),
    "zip of 300 files of 13 MiB": lambda: _honest(deflated(13, PREAMBLE), 300),
    "zip of DICOM of empty elements": lambda: _honest(
        deflated(100, dicom_start() + _CT_SOP, _EMPTY), 1
    ),
    "gzip": lambda: gzipped(_giant()),
    "gzip of 1 GiB declared and 7 bytes": lambda: gzip.compress(
        nifti_header((800, 800, 800)) + bytes(7)
    ),
    "gzip of 200,000 members": lambda: (
        gzip.compress(nifti_header((800, 800, 800))) + gzip.compress(b"") * 200_000
    ),
    "NIfTI of 32767 cubed": lambda: gzip.compress(nifti_header((32767,) * 3) + bytes(99)),
    "NIfTI of 16 GiB in 3 bytes": lambda: nifti_header((2048, 2048, 2048)) + bytes(3),
    "NIfTI of 1e8 slices of 4 voxels": lambda: gzipped(
        _giant(nifti_header((2, 2, 100_000_000), second=True))
    ),
    "NIfTI with voxels from byte 1e18": lambda: gzipped(_giant(_far_voxels())),
    "deflated DICOM": lambda: deflated_dicom(_giant()),
    "deflated DICOM of empty elements": lambda: deflated_dicom(deflated(200, _CT_SOP, _EMPTY)),
    "DICOM of 20,000 nested sequences": lambda: deep_dicom(20_000),
    "DICOM of 65535 x 65535": lambda: _two(
        lambda n: saved(ct(position=n, Rows=65535, Columns=65535))
    ),
    "DICOM of 2147483647 frames": lambda: saved(
        ct(SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=2**31 - 1)
    ),
    "DICOM of 3,000,000 frame groups": lambda: per_frame_groups(3_000_000),
    "RLE of 8192 x 8192": lambda: _two(
        lambda n: saved(ct(RLELossless, position=n, Rows=8192, Columns=8192))
    ),
    "JPEG 2000 of 65535 x 65535": lambda: _two(lambda n: huge_code_stream(JPEG2000Lossless, n)),
    "JPEG-LS of 65535 x 65535": lambda: _two(lambda n: huge_code_stream(JPEGLSLossless, n)),
}
"""Every bomb by name, made when it is called; each must be refused."""


def _far_voxels() -> bytes:
    header = nib.Nifti2Header()
    header.set_data_shape((8, 8, 8))
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"] = b"n+2", 10**18
    return bytes(header.binaryblock)
