"""The store: what is stored is whole, named by its digest, and checked when it is read."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.errors import ServiceError
from service.storage import BlobCorrupt, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data")


def put(store, content: bytes) -> str:
    with store.receive() as writer:
        for start in range(0, len(content), 7):
            writer.write(content[start : start + 7])
        sha256, size = store.commit_blob(writer)
    assert size == len(content)
    return sha256


def test_a_received_file_lies_under_its_digest(store):
    sha256 = put(store, b"voxels" * 100)

    assert sha256 == hashlib.sha256(b"voxels" * 100).hexdigest()
    assert store.verify(sha256).read_bytes() == b"voxels" * 100
    assert list(store.tmp.iterdir()) == []


def test_the_same_bytes_twice_are_one_file(store):
    assert put(store, b"scan") == put(store, b"scan")

    assert len([path for path in store.blobs.rglob("*") if path.is_file()]) == 1
    assert list(store.tmp.iterdir()) == []


def test_every_flipped_byte_is_found(store):
    for number in range(100):
        sha256 = put(store, f"blob {number} ".encode() * 10)
        path = store.path_of(sha256)
        content = bytearray(path.read_bytes())
        assert store.verify(sha256)  # the control: untouched it passes
        content[number % len(content)] ^= 1
        path.write_bytes(content)

        with pytest.raises(BlobCorrupt):
            store.verify(sha256)


def test_a_missing_file_is_corrupt(store):
    with pytest.raises(BlobCorrupt, match="missing"):
        store.verify("0" * 64)


def test_an_upload_that_breaks_off_leaves_nothing(store):
    def broken_upload():
        with store.receive() as writer:
            writer.write(b"half")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        broken_upload()

    assert [path for path in store.data_dir.rglob("*") if path.is_file()] == []


def test_an_upload_that_is_too_large_is_refused_and_leaves_nothing(store):
    with pytest.raises(ServiceError) as refused, store.receive(max_bytes=10) as writer:
        writer.write(b"x" * 11)

    assert (refused.value.status, refused.value.code) == (413, "request_too_large")
    assert list(store.tmp.iterdir()) == []


def test_uploads_are_refused_when_the_disk_is_nearly_full(tmp_path):
    store = Store(tmp_path, min_free_bytes=2**62)

    with pytest.raises(ServiceError) as refused:
        store.receive()

    assert (refused.value.status, refused.value.code) == (507, "insufficient_storage")
    with Store(tmp_path, min_free_bytes=1).receive() as writer:  # the control
        writer.write(b"fits")


def test_old_temporary_files_are_swept_and_new_ones_are_not(store):
    old, new = store.tmp / "old", store.tmp / "new"
    folder = store.tmp / "folder"
    folder.mkdir()
    for path in (old, new, folder / "file"):
        path.write_bytes(b"x")
    for path in (old, folder):
        os.utime(path, (time.time() - 90000,) * 2)

    assert store.sweep() == 2

    assert list(store.tmp.iterdir()) == [new]


def test_a_path_that_is_no_digest_is_refused(store):
    for name in ("../../etc/passwd", "A" * 64, "", "0" * 63):
        with pytest.raises(ValueError, match="not a SHA-256"):
            store.path_of(name)
    with pytest.raises(ValueError, match="not a run id"):
        store.work_dir("../x")


def test_a_work_folder_stays_the_same(store):
    (store.work_dir("run_1") / "checkpoint").write_bytes(b"x")

    assert (Store(store.data_dir).work_dir("run_1") / "checkpoint").is_file()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_file_is_on_the_disk_before_its_name_is(tmp_path):
    script = (
        "import sys; from pathlib import Path; from service.storage import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "with store.receive() as w:\n    w.write(b'x' * 100); store.commit_blob(w)\n"
    )
    trace = tmp_path / "trace"
    subprocess.run(
        [
            *("strace", "-f", "-y", "-e", "trace=fsync,rename", "-o", str(trace)),
            *(sys.executable, "-c", script, str(tmp_path / "data")),
        ],
        check=True,
        cwd=Path(__file__).parents[2],
    )

    calls = [
        line.split(maxsplit=1)[1] for line in trace.read_text().splitlines() if "store" in line
    ]
    kinds = [("rename" if call.startswith("rename") else "fsync") for call in calls]
    assert kinds == ["fsync", "rename", "fsync", "fsync"]
    assert "/tmp/" in calls[0]
    assert "/blobs/" in calls[2]


def test_durability_calls_come_in_order(store, monkeypatch):
    calls = []
    fsync, rename = os.fsync, Path.rename

    def traced_fsync(descriptor):
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().parent.name))
        fsync(descriptor)

    def traced_rename(self, target):
        calls.append(("rename", target.name[:4]))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "rename", traced_rename)

    sha256 = put(store, b"ordered")

    assert calls == [
        ("fsync", "tmp"),
        ("rename", sha256[:4]),
        ("fsync", "blobs"),
        ("fsync", "store"),
    ]


@pytest.mark.parametrize("what", ["link", "pipe", "file"])
def test_what_a_hijacked_reader_leaves_is_copied_only_if_it_is_a_file(store, tmp_path, what):
    secret, left = tmp_path / "secret", tmp_path / "volume.nii"
    secret.write_bytes(b"key")
    if what == "link":
        left.symlink_to(secret)
    elif what == "pipe":
        os.mkfifo(left)
    else:
        left.write_bytes(b"voxels")

    if what == "file":
        assert store.verify(store.put_file(left)[0]).read_bytes() == b"voxels"
        return
    with pytest.raises(OSError, match=r"symbolic links|not a regular file"):
        store.put_file(left)
    assert not list(store.tmp.iterdir())
    assert not list(store.blobs.glob("*/*"))


@pytest.mark.parametrize("is_linked", [False, True])
def test_sending_the_right_bytes_again_heals_a_spoiled_file(store, tmp_path, is_linked):
    digest = put(store, b"the right bytes")
    store.path_of(digest).chmod(0o600)
    store.path_of(digest).write_bytes(b"spoiled")
    again = tmp_path / "again"
    again.write_bytes(b"the right bytes")

    store.link_file(again, digest) if is_linked else store.put_file(again)

    assert store.verify(digest).read_bytes() == b"the right bytes"
