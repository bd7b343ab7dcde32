"""Hostile and broken uploads (reliability.md, T-H1, T-H2, T-H5): each a named refusal."""

from __future__ import annotations

import gzip
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pytest

from imaging import nifti, phantom
from imaging.errors import ScanError
from imaging.intake import read_scan
from imaging.sandbox import Limits, run_intake
from imaging.volume import Volume

_MIB = 1 << 20
GIANT = 1200  # MiB
_PREAMBLE = bytes(128) + b"DICM"
_OBJECT = _PREAMBLE + b"\x08\0\x05\0CS\0\0" + b"\x09\0\x10\0OB\0\0" + b"\0\0\0\x40"
"""An element that declares a gigabyte, so that reading goes on."""


def deflated_zeros(num_mib: int, start: bytes = b"") -> bytes:
    """A raw deflate stream of `start` and then zeros; a thousandth of its size, made at once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = packer.compress(start + bytes(_MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(_MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (num_mib - 1) + packer.flush()


def gzipped(stream: bytes) -> bytes:
    """A raw deflate stream as a gzip file, with a wrong checksum."""
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + stream + bytes(8)


def zipped(stream: bytes, *, name: bytes = b"a", declared: int = _MIB, flags: int = 0) -> bytes:
    """A raw deflate stream as the only member of a zip, with a wrong checksum."""
    sizes = struct.pack("<3I", 0, len(stream), declared)
    common = struct.pack("<5H", 20, flags, 8, 0, 0x21)
    local = b"PK\x03\x04" + common + sizes + struct.pack("<2H", len(name), 0) + name
    central = (
        b"PK\x01\x02" + struct.pack("<H", 20) + common + sizes
        + struct.pack("<5H2I", len(name), 0, 0, 0, 0, 0, 0) + name
    )  # fmt: skip
    at = len(local) + len(stream)
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 1, 1, len(central), at, 0)
    return local + stream + central + end


def deflated_dicom(stream: bytes) -> bytes:
    """A DICOM file in the deflated transfer syntax."""
    syntax = b"1.2.840.10008.1.2.1.99"
    element = b"\x02\0\x10\0UI" + struct.pack("<H", len(syntax)) + syntax
    group_length = b"\x02\0\0\0UL\x04\0" + struct.pack("<I", len(element))
    return bytes(128) + b"DICM" + group_length + element + stream


def deep_dicom(depth: int) -> bytes:
    """A DICOM file of sequences within sequences."""
    syntax = b"1.2.840.10008.1.2.1\0"
    element = b"\x02\0\x10\0UI" + struct.pack("<H", len(syntax)) + syntax
    group_length = b"\x02\0\0\0UL\x04\0" + struct.pack("<I", len(element))
    nest = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    sop = b"\x08\0\x16\0UI\x1a\x001.2.840.10008.5.1.4.1.1.2\0"
    return bytes(128) + b"DICM" + group_length + element + sop + nest * depth


def refusal(path) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_scan(path, kind="image")
    return caught.value


def sandboxed_refusal(path, out, **options) -> ScanError:
    start = time.perf_counter()
    with pytest.raises(ScanError) as caught:
        run_intake(path, out, kind="image", **options)
    assert time.perf_counter() - start < 30
    assert not (out / "volume.nii").exists()
    return caught.value


def zip_of(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def members(small_series) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in small_series}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "not_a_scan"),
        (b"hello world " * 100, "not_a_scan"),
        (bytes(range(256)) * 64, "not_a_scan"),
        (gzip.compress(b"a tar, perhaps" * 99), "not_a_scan"),
        (b"NRRD0005\ntype: short\n", "truncated_file"),
        (b"NRRD0005\ntype: short\n\n", "not_a_scan"),
        (b"ObjectType = Image\nNDims = 3\n", "truncated_file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "unsupported_format"),
        (b"PK\x05\x06" + bytes(18), "empty_archive"),
        (b"PK\x03\x04" + bytes(500), "truncated_file"),
        (bytes(128) + b"DICM" + b"\xff" * 400, "not_a_scan"),
        (deep_dicom(20_000), "not_a_scan"),
    ],
)
def test_what_is_no_scan_is_refused_by_the_child(tmp_path, content, code):
    (tmp_path / "upload").write_bytes(content)

    error = sandboxed_refusal(tmp_path / "upload", tmp_path)

    assert error.code == code
    assert error.detail


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (zipped(deflated_zeros(GIANT), declared=GIANT * _MIB), "not_a_scan"),  # never unpacked
        (zipped(deflated_zeros(GIANT, _PREAMBLE), declared=GIANT * _MIB), "not_a_scan"),
        (zipped(deflated_zeros(GIANT, _PREAMBLE), declared=100), "truncated_file"),
        (zipped(deflated_zeros(GIANT, _OBJECT), declared=GIANT * _MIB), "too_large"),
        (zipped(deflated_zeros(GIANT, _OBJECT), declared=100), "truncated_file"),
        (deflated_dicom(deflated_zeros(GIANT)), "too_large"),
        (gzipped(deflated_zeros(GIANT)), "not_a_scan"),
    ],
    ids=[
        "zip",
        "zip-dicom",
        "zip-forged-size",
        "zip-object",
        "zip-object-forged",
        "deflated-dicom",
        "gzip",
    ],
)
def test_bombs_are_stopped_in_bounded_time_and_memory(tmp_path, content, code):
    assert len(content) < 3_000_000
    (tmp_path / "upload").write_bytes(content)

    error = sandboxed_refusal(tmp_path / "upload", tmp_path)

    assert error.code == code


def test_a_gzipped_nifti_that_declares_gigabytes_and_holds_nothing_is_refused(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((800, 800, 800))
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    (tmp_path / "upload").write_bytes(gzip.compress(header.binaryblock + bytes(7)))

    assert sandboxed_refusal(tmp_path / "upload", tmp_path).code == "truncated_file"


def test_the_memory_limit_ends_in_a_named_refusal(tmp_path):
    nifti.write(tmp_path / "a.nii.gz", np.zeros((512, 512, 600), np.uint8), np.eye(4))

    error = sandboxed_refusal(
        tmp_path / "a.nii.gz", tmp_path, limits=Limits(memory_bytes=450 << 20)
    )

    assert error.code == "too_large"


def test_the_clocks_and_the_file_limit_end_in_a_named_refusal(tmp_path, small_zip):
    slow = Limits(wall_s=0.05)
    small_files = Limits(file_bytes=10_000)

    assert sandboxed_refusal(small_zip, tmp_path, limits=slow).code == "too_large"
    with pytest.raises(ScanError) as caught:
        run_intake(small_zip, tmp_path, kind="image", limits=small_files)
    assert caught.value.code == "too_large"


def test_the_child_cannot_be_talked_into_options(tmp_path, small_zip):
    odd = tmp_path / "--kind=labels"
    shutil.copy(small_zip, odd)

    assert run_intake(odd, tmp_path, kind="image").dtype == "int16"
    for uid in ("--out=/", "1.2\0.3", "\udc80", "x" * 1000, ""):
        with pytest.raises(ScanError, match="no_such_series"):
            run_intake(small_zip, tmp_path, kind="image", series_uid=uid)


def test_the_child_sees_no_secret(tmp_path, small_zip, monkeypatch):
    """The environment is bare: the child's own record of it is read from /proc."""
    monkeypatch.setenv("PCRL_SECRET", "hunter2")
    seen = []
    real = subprocess.Popen

    def spy(command, **options):
        seen.append(options["env"])
        return real(command, **options)

    monkeypatch.setattr("imaging.sandbox.subprocess.Popen", spy)
    run_intake(small_zip, tmp_path, kind="image")

    assert "hunter2" not in str(seen)
    assert set(seen[0]) == {
        "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LC_ALL", "TMPDIR",
        "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("death", "code"),
    [(signal.SIGKILL, "too_large"), (signal.SIGXCPU, "too_large"), (signal.SIGABRT, "not_a_scan")],
)
def test_a_child_that_dies_of_a_file_is_a_named_refusal(tmp_path, monkeypatch, death, code):
    """Codecs abort on damaged streams (GDCM throws a C++ string that nothing catches)."""
    suicide = f"import os, signal; os.kill(os.getpid(), {int(death)})"
    monkeypatch.setattr("imaging.sandbox._command", lambda *_: [sys.executable, "-c", suicide])
    (tmp_path / "upload").write_bytes(b"x")

    assert sandboxed_refusal(tmp_path / "upload", tmp_path).code == code


def test_an_unwritable_folder_is_not_the_sender_s_fault(tmp_path, small_zip):
    (tmp_path / "volume.nii").mkdir()

    with pytest.raises(OSError, match="status"):
        run_intake(small_zip, tmp_path, kind="image")


# --- archives


@pytest.mark.parametrize(
    "name", ["../../etc/cron.d/x", "/etc/passwd", "a/../../b", "C:\\x", "..\\..\\x"]
)
def test_names_that_climb_out_are_refused_and_nothing_is_written(tmp_path, members, name):
    path = zip_of(tmp_path / "a.zip", {name: b"x", **members})

    error = refusal(path)

    assert error.code == "archive_unsafe"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip"]


def test_repeated_names_links_and_encryption_are_refused(tmp_path, members):
    one = next(iter(members.values()))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a", one)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr("a", one)
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    locked = zipped(deflated_zeros(1), flags=1)
    (tmp_path / "locked.zip").write_bytes(locked)

    for name in ("twice", "link", "locked"):
        assert refusal(tmp_path / f"{name}.zip").code == "archive_unsafe"


def test_an_archive_in_an_archive_is_refused(tmp_path, small_zip, members):
    path = zip_of(tmp_path / "a.zip", {"inner.bin": small_zip.read_bytes(), **members})

    assert refusal(path).code == "archive_unsafe"


def test_empty_cut_off_and_damaged_archives_are_refused(tmp_path, small_zip):
    whole = small_zip.read_bytes()
    zip_of(tmp_path / "empty.zip", {})
    zip_of(tmp_path / "folders.zip", {"a/": b"", "a/b/": b""})
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(damaged) // 2 : len(damaged) // 2 + 200] = b"\xaa" * 200
    (tmp_path / "damaged.zip").write_bytes(damaged)

    assert refusal(tmp_path / "empty.zip").code == "empty_archive"
    assert refusal(tmp_path / "folders.zip").code == "empty_archive"
    assert refusal(tmp_path / "cut.zip").code == "truncated_file"
    assert refusal(tmp_path / "damaged.zip").code in ("truncated_file", "missing_slices")


def test_too_many_members_are_refused_before_they_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("imaging.archive.MAX_MEMBERS", 3)
    path = zip_of(tmp_path / "a.zip", {f"{n}": b"x" for n in range(4)})

    assert refusal(path).code == "too_large"


def test_a_directory_of_a_million_entries_is_refused_unread(tmp_path):
    content = bytearray(zipped(deflated_zeros(1)))
    content[-10:-6] = (100 << 20).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(content)

    assert refusal(tmp_path / "a.zip").code == "too_large"


def test_unpacked_bytes_are_counted_over_all_members(tmp_path, small_zip, monkeypatch):
    monkeypatch.setattr("imaging.archive.MAX_UNPACKED_BYTES", 5_000)

    assert refusal(small_zip).code == "too_large"


def test_two_nifti_files_in_an_archive_are_refused(tmp_path, small):
    image, label = phantom.write_pair(small, tmp_path / "pair", "p")
    path = zip_of(tmp_path / "a.zip", {"a": image.read_bytes(), "b": label.read_bytes()})

    assert refusal(path).code == "unsupported_format"


# --- T-H2: mutated files, in process


def corpus(small, tmp_path, members) -> list[bytes]:
    tiny = Volume(small.volume.voxels[:8, :7, :3], small.volume.affine)
    phantom.write_dicom_zip(tiny, tmp_path / "tiny.zip", seed=1)
    nifti.write(tmp_path / "tiny.nii", tiny.voxels, tiny.affine)
    nifti.write(tmp_path / "tiny.nii.gz", tiny.voxels, tiny.affine)
    one = next(iter(members.values()))
    return [(tmp_path / f"tiny.{s}").read_bytes() for s in ("zip", "nii", "nii.gz")] + [one]


def mutated(rng: np.random.Generator, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.integers(1, 8)):
        at = int(rng.integers(len(data)))
        match rng.integers(4):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
            case 2:
                data = data[: max(8, at)]
            case _:
                source = int(rng.integers(len(data)))
                data[at : at + 16] = data[source : source + 16]
    return bytes(data)


def test_t_h2_mutated_files_end_in_a_scan_or_a_scan_error(small, tmp_path, members):
    rng = np.random.default_rng(20)
    originals = corpus(small, tmp_path, members)
    path = tmp_path / "mutant"
    codes: dict[str, int] = {}
    start = time.process_time()

    for n in range(1500):
        path.write_bytes(mutated(rng, originals[n % len(originals)]))
        began = time.process_time()
        try:
            read_scan(path, kind="image")
            code = "read"
        except ScanError as error:
            code = error.code
        codes[code] = codes.get(code, 0) + 1
        assert time.process_time() - began < 2, f"mutant {n} of seed 20"

    assert time.process_time() - start < 40
    assert len(codes) > 4, codes
    assert codes["read"] > 20, codes
