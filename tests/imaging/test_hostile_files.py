"""Hostile and broken uploads (reliability.md, T-H1, T-H2, T-H5): each a named refusal."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
import struct
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless

from benchmarks import hostile
from benchmarks.hostile import deep_dicom, deflated, zipped
from imaging import dicom, nifti, phantom, sandbox
from imaging.code_stream import check_frames, declared_size
from imaging.errors import ScanError
from imaging.forkserver import ForkServer
from imaging.image2d import decode_image
from imaging.intake import read_scan
from imaging.sandbox import Limits, run_intake


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
    path.write_bytes(hostile.zip_of(members))
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
        (gzip.compress(b"a tar, perhaps" * 99, mtime=0), "not_a_scan"),
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
    small_files = Limits(file_bytes=10_000)
    os.mkfifo(tmp_path / "never")  # nobody writes to it

    assert sandboxed_refusal(tmp_path / "never", tmp_path, limits=Limits(wall_s=0.5)).code == (
        "too_large"
    )
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


@pytest.fixture
def own_server(monkeypatch):
    """A fork server for this test alone, whose children do as a program text says."""
    made = []

    def make(program: str | None = None) -> ForkServer:
        server = ForkServer("imaging.intake")
        if program is not None:
            monkeypatch.setattr(server, "_command", lambda fd: [sys.executable, "-c", program, fd])
        monkeypatch.setattr(sandbox, "_server", server)
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()


def test_the_child_sees_no_secret(tmp_path, own_server, small_zip, monkeypatch):
    """The environment is bare: /proc has the server's own record of it, which a fork inherits."""
    monkeypatch.setenv("PCRL_SECRET", "hunter2")
    server = own_server()
    run_intake(small_zip, tmp_path, kind="image")

    found = Path(f"/proc/{server.start()}/environ").read_bytes()
    assert os.environ["PCRL_SECRET"] == "hunter2"
    assert {line.split(b"=")[0].decode() for line in found.split(b"\0") if line} == {
        "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LC_ALL", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"
    }  # fmt: skip


DYING = """
import os, socket, sys
from imaging import forkserver
def die(arguments):
    os.kill(os.getpid(), {death})
forkserver.serve(socket.socket(fileno=int(sys.argv[1])), die)
"""


@pytest.mark.parametrize(
    ("death", "code"),
    [(signal.SIGKILL, "too_large"), (signal.SIGXCPU, "too_large"), (signal.SIGABRT, "not_a_scan")],
)
def test_a_child_that_dies_of_a_file_is_a_named_refusal(tmp_path, own_server, death, code):
    """Codecs abort on damaged streams (GDCM throws a C++ string that nothing catches)."""
    server = own_server(DYING.format(death=int(death)))
    (tmp_path / "upload").write_bytes(b"x")
    first = server.start()

    assert sandboxed_refusal(tmp_path / "upload", tmp_path).code == code
    assert server.start() != first  # with another memory layout


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
    locked = zipped(deflated(1), flags=1)
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
    content = bytearray(zipped(deflated(1)))
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


def test_files_that_share_bytes_or_lie_outside_of_the_zip_are_refused(tmp_path, members):
    """Python 3.11.7 and older do not see it (CVE-2024-0450)."""
    shared = zipped(deflated(1), 2, overlap=True)
    apart = zipped(deflated(1), 2)
    (tmp_path / "shared.zip").write_bytes(shared)
    (tmp_path / "apart.zip").write_bytes(apart)

    assert refusal(tmp_path / "shared.zip").code == "archive_unsafe"
    assert refusal(tmp_path / "apart.zip").code == "not_a_scan"  # the control: it is read


def test_what_a_zip_declares_is_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(zipped(deflated(1), 3, declared=1 << 20))
    monkeypatch.setattr("imaging.archive._Member.read", None)  # would fail
    monkeypatch.setattr("imaging.archive.MAX_UNPACKED_BYTES", (3 << 20) - 1)

    assert refusal(tmp_path / "a.zip").code == "too_large"


@pytest.mark.parametrize("shape", [(2, 2, 8193), (8193, 2, 2)])
def test_a_volume_is_short_along_every_axis(tmp_path, shape):
    fits = tuple(min(size, 8192) for size in shape)
    nifti.write(tmp_path / "long.nii", np.zeros(shape, np.uint8), np.eye(4))
    nifti.write(tmp_path / "fits.nii", np.zeros(fits, np.uint8), np.eye(4))

    assert refusal(tmp_path / "long.nii").code == "too_large"
    assert read_scan(tmp_path / "fits.nii", kind="labels").volume.shape == fits


def test_a_dicom_header_has_a_bounded_number_of_elements(tmp_path, monkeypatch):
    many = hostile.dicom_start() + b"\x09\0\x01\x10LO\0\0" * 5000
    path = zip_of(tmp_path / "a.zip", {str(n): many for n in range(4)})
    before = refusal(path).code
    monkeypatch.setattr("imaging.limits.MAX_READS", 4_000)
    one_file = refusal(path).code
    monkeypatch.setattr("imaging.limits.MAX_READS", 12_000)
    monkeypatch.setattr("imaging.limits.READS_PER_FILE", 10)
    all_files = refusal(path).code

    assert (before, one_file, all_files) == ("not_a_scan", "too_large", "too_large")


def test_pictures_are_small_along_every_side(monkeypatch):
    held = io.BytesIO()
    Image.fromarray(np.eye(40, dtype=np.uint8)).save(held, "PNG")
    assert decode_image(held.getvalue()).pixels.shape == (40, 40)
    monkeypatch.setattr("imaging.image2d.MAX_PIXELS_SIDE", 39)

    with pytest.raises(ScanError, match="too_large"):
        decode_image(held.getvalue())


def test_a_png_that_declares_gigapixels_is_refused_unread():
    row = struct.pack(">2I5B", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + row
    start = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    packed = zlib.compress(bytes(1 << 20))
    data = b"IDAT" + packed
    body = struct.pack(">I", len(packed)) + data + struct.pack(">I", zlib.crc32(data))

    with pytest.raises(ScanError, match="too_large"):
        decode_image(b"\x89PNG\r\n\x1a\n" + start + body)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_a_stream_larger_than_its_header_never_meets_its_decoder(syntax):
    """Seen with a mutated JPEG-LS frame of 64 x 64: three seconds over noise."""
    honest = hostile.ct(syntax)
    frame = next(generate_frames(honest.PixelData, number_of_frames=1))

    assert declared_size(frame) == (64, 64)
    check_frames([frame], 64, 64)
    with pytest.raises(ScanError, match="truncated_file"):
        check_frames([frame], 64, 63)
    huge = hostile.huge_code_stream(syntax, 0)
    with pytest.raises(ScanError, match="65535 x 65535"):
        dicom.read_series([lambda: io.BytesIO(huge), _second(syntax)])


def _second(syntax):
    return lambda: io.BytesIO(hostile.saved(hostile.ct(syntax, position=1)))


def test_a_jpeg_frame_header_is_found_behind_other_segments():
    held = io.BytesIO()
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(held, "JPEG", comment=b"x" * 500)

    assert declared_size(held.getvalue()) == (20, 24)
    assert declared_size(held.getvalue()[:20]) is None
    assert declared_size(b"RLE, perhaps") is None


def test_a_jpeg_ls_stream_without_its_end_never_meets_its_decoder():
    """Seen with a mutated frame of 64 x 64: three seconds of a processor."""
    whole = next(generate_frames(hostile.ct(JPEGLSLossless).PixelData, number_of_frames=1))

    check_frames([whole, whole + b"\0"], 64, 64)
    for kept in (163, len(whole) - 3):
        with pytest.raises(ScanError, match="cut off"):
            check_frames([whole[:kept]], 64, 64)


def test_a_file_that_would_begin_before_the_zip_is_refused(tmp_path):
    content = bytearray(zipped(deflated(1)))
    at = content.rindex(b"PK\5\6") + 16  # the directory would lie further on: all offsets shift
    content[at : at + 4] = (int.from_bytes(content[at : at + 4], "little") + 50).to_bytes(
        4, "little"
    )
    (tmp_path / "a.zip").write_bytes(content)

    assert refusal(tmp_path / "a.zip").code == "archive_unsafe"
