"""T-D2, T-D3: what is acknowledged is on the disk, and a full disk loses and leaves nothing."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from models import bundle
from models.recipe import Preprocessing, PretrainRecipe, UNet3d
from service import db, migrate, volumes
from service.storage import Store

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from service import db, volumes
from service.storage import Store
store = Store(Path(sys.argv[1]))
engine = db.connect(sys.argv[2])
with store.receive() as writer:
    writer.write(b"x" * 100)
    sha256, size = store.commit_blob(writer)
with db.sessions(engine)() as session:
    volumes.record_blob(session, store, sha256, size)
    session.commit()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_t_d2_the_file_its_name_and_its_folder_are_on_the_disk_before_the_row(tmp_path):
    url = f"sqlite:///{tmp_path / 'rows.sqlite3'}"
    migrate.upgrade(url)
    trace = tmp_path / "trace"
    subprocess.run(
        [
            *("strace", "-f", "-y", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2"),
            *("-o", str(trace), sys.executable, "-c", SCRIPT, str(tmp_path / "data"), url),
        ],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    stored = [call for call in calls if "/data/store/" in call]
    wrote = next(i for i, call in enumerate(calls) if "sync" in call and "/store/tmp/" in call)
    named = next(i for i, call in enumerate(calls) if call.startswith("rename"))
    folder = next(i for i, call in enumerate(calls) if "sync" in call and "/store/blobs/" in call)
    row = max(i for i, call in enumerate(calls) if "sync" in call and "rows.sqlite3-wal" in call)
    assert wrote < named < folder < row
    assert len(stored) == 4


class Full:
    """Calls of `os.fsync` and of a file's `write` that fail as a full disk's do, from one on."""

    def __init__(self, monkeypatch, at: int) -> None:
        self.calls, self.at = 0, at
        real = os.fsync

        def fsync(descriptor):
            self.calls += 1
            if self.calls >= self.at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_t_d3_a_disk_that_fills_at_any_step_of_storing_leaves_no_orphan(tmp_path, monkeypatch, at):
    store = Store(tmp_path / "data")
    url = f"sqlite:///{tmp_path / 'rows.sqlite3'}"
    migrate.upgrade(url)

    with (
        monkeypatch.context() as broken,
        pytest.raises(OSError, match="No space"),
        store.receive() as writer,
    ):
        full = Full(broken, at)
        writer.write(b"x" * 100)
        store.commit_blob(writer)

    assert full.calls == at
    assert list(store.tmp.iterdir()) == []
    for path in store.blobs.rglob("*"):
        os.utime(path, (time.time() - 90000,) * 2)
    engine = db.connect(url)
    with db.sessions(engine)() as session:
        volumes.sweep_blobs(session, store)
    engine.dispose()
    assert [path for path in store.data_dir.rglob("*") if path.is_file()] == []
    with store.receive() as writer:  # healthy again
        writer.write(b"y")
        assert store.verify(store.commit_blob(writer)[0])


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A tmpfs of a few megabytes; skipped where mounting is not allowed."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_t_d3_a_really_full_disk_refuses_an_upload_and_keeps_what_was_there(tmp_path):
    with small_disk(tmp_path / "small", "4m") as folder:
        store = Store(folder / "data")
        with store.receive() as writer:
            writer.write(b"kept" * 1000)
            kept, _ = store.commit_blob(writer)

        with pytest.raises(OSError, match="No space"), store.receive() as writer:
            for _ in range(8):
                writer.write(os.urandom(1 << 20))
            store.commit_blob(writer)

        assert store.verify(kept)
        assert list(store.tmp.iterdir()) == []
        with store.receive() as writer:
            writer.write(b"after" * 1000)
            assert store.verify(store.commit_blob(writer)[0])


def make_bundle(folder: Path, network: Path, num_bytes: int) -> None:
    network.write_bytes(os.urandom(num_bytes))
    manifest = bundle.Manifest(
        kind="encoder",
        inputs=(bundle.TensorSpec(name="image", shape=("batch", 1, 16, 16, 16)),),
        outputs=(bundle.TensorSpec(name="output", shape=("batch", 2)),),
        preprocessing=Preprocessing(),
        patch_size=(16, 16, 16),
        recipe=PretrainRecipe(network=UNet3d(base_width=2)),
        lineage=bundle.Lineage(
            dataset_digest="0" * 64, seed=0, num_steps=1, code_version="0", torch_version="0"
        ),
        parity=(),
        created_at=datetime.now(UTC),
    )
    bundle.save(folder, manifest, {bundle.MODEL: network}, "# Card\n")


@pytest.mark.parametrize("step", ["export", "publish"])
def test_t_d3_a_really_full_disk_refuses_a_bundle_and_keeps_the_one_before(tmp_path, step):
    network = tmp_path / "network"
    with small_disk(tmp_path / "small", "4m") as disk:
        store = Store(disk / "data")
        make_bundle(tmp_path / "first", network, 100_000)
        kept = store.publish_bundle(tmp_path / "first")
        before = sorted(disk.rglob("*"))

        with pytest.raises(OSError, match="No space"):
            if step == "export":
                make_bundle(disk / "data" / "large", network, 6 << 20)
            make_bundle(tmp_path / "large", network, 6 << 20)
            store.publish_bundle(tmp_path / "large")

        assert sorted(disk.rglob("*")) == before
        bundle.load(store.bundle_dir(kept))
        make_bundle(disk / "data" / "after", network, 100_000)  # with room it works
        assert store.publish_bundle(disk / "data" / "after") != kept


def test_a_sweep_takes_what_no_row_refers_to_and_leaves_the_rest(tmp_path):
    store = Store(tmp_path / "data")
    url = f"sqlite:///{tmp_path / 'rows.sqlite3'}"
    migrate.upgrade(url)
    engine = db.connect(url)
    digests = []
    for content in (b"referred", b"orphan", b"young orphan"):
        with store.receive() as writer:
            writer.write(content)
            digests.append(store.commit_blob(writer)[0])
    for sha256 in digests[:2]:
        os.utime(store.path_of(sha256), (time.time() - 90000,) * 2)
    with db.sessions(engine)() as session:
        session.add(db.Blob(sha256=digests[0], size_bytes=8))
        session.add(
            db.Run(
                id="seg_1",
                kind="segment",
                state="failed",
                queue="inference",
                spec={},
                created_by="t",
            )
        )
        session.flush()
        session.add(
            db.Artifact(run_id="seg_1", name="mask", sha256=digests[0], media_type="x", fence=1)
        )
        session.commit()

        assert volumes.sweep_blobs(session, store) == 1
    engine.dispose()

    assert [store.path_of(sha256).exists() for sha256 in digests] == [True, False, True]
