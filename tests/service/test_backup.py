"""Backup and restore (T-O3): under load, on both databases; nothing is lost, nothing dangles."""

import hashlib
import shutil
import threading
from pathlib import Path

import pytest
from sqlalchemy import func, select

from service import auth, backup, db, migrate, runs
from service.auth import Role
from service.backup_form import BackupError, Manifest
from service.restore import restore
from service.runs import NewArtifact
from service.settings import Settings
from service.storage import Store

pytestmark = pytest.mark.skipif(
    shutil.which("pg_dump") is None, reason="PostgreSQL's client is not installed"
)


class Site:
    """An installation with rows and files, and what it has acknowledged."""

    def __init__(self, folder: Path, url: str) -> None:
        self.settings = Settings(data_dir=folder, database_url=url)
        migrate.upgrade(url)
        self.engine = db.connect(url)
        self.sessions = db.sessions(self.engine)
        self.store = Store(folder)
        self.acknowledged: list[str] = []
        self.key = auth.site_pseudonyms(folder)

    def file(self, content: bytes) -> tuple[str, int]:
        with self.store.receive() as writer:
            writer.write(content)
            return self.store.commit_blob(writer)

    def done(self, number: int) -> str:
        """A run that has ended, with an artifact."""
        with self.sessions() as session:
            run = runs.create(session, kind="segment", spec={}, principal="t", priority=9)
            session.commit()
            lease = runs.claim(session, run.id, "inference", "w")
            assert lease.run_id == run.id
            new = NewArtifact("mask.nii.gz", *self.file(b"mask %d" % number), "x/y")
            runs.finish(session, lease, db.RunState.SUCCEEDED, outcome="done", artifacts=[new])
        self.acknowledged.append(run.id)
        return run.id

    def forget(self, run_id: str) -> None:
        """Remove a run, its rows and its file."""
        with self.sessions() as session:
            (artifact,) = runs.artifacts(session, run_id)
            session.delete(artifact)
            session.flush()
            session.delete(session.get(db.Blob, artifact.sha256))
            session.delete(session.get(db.Run, run_id))
            session.commit()
        self.store.delete_blob(artifact.sha256)

    def whole(self) -> int:
        """Hash the file of every row; returns how many there are."""
        with self.sessions() as session:
            digests = session.scalars(select(db.Blob.sha256)).all()
        for sha256 in digests:
            self.store.verify(sha256)
        return len(digests)


@pytest.fixture
def site(tmp_path, database_url):
    made = Site(tmp_path / "site", database_url)
    yield made
    made.engine.dispose()


@pytest.fixture
def elsewhere(tmp_path, database_url, request):
    """Settings of an empty installation of the same kind."""
    if database_url.startswith("sqlite"):
        url = f"sqlite:///{tmp_path / 'other.sqlite3'}"
    else:
        url = request.getfixturevalue("new_postgres")()
    return Settings(data_dir=tmp_path / "elsewhere", database_url=url)


opened: list[Site] = []


@pytest.fixture(autouse=True)
def disposed():
    yield
    while opened:
        opened.pop().engine.dispose()


def reopened(settings: Settings) -> Site:
    opened.append(Site(settings.data_dir, settings.database_url))
    return opened[-1]


@pytest.mark.parametrize("name", ["backup.tar", pytest.param("backup", marks=pytest.mark.nightly)])
def test_t_o3_under_load_nothing_acknowledged_before_is_lost(site, elsewhere, tmp_path, name):
    for number in range(20):
        site.done(number)
    stop, failures = threading.Event(), []

    def load():
        number = 1000
        try:
            while not stop.is_set():
                site.forget(site.done(number))
                site.done(number + 1)
                number += 2
        except Exception as error:  # noqa: BLE001  # shown by the assertion
            failures.append(error)

    before = list(site.acknowledged)
    thread = threading.Thread(target=load)
    thread.start()
    try:
        made = backup.backup(site.settings, tmp_path / name, version="1")
    finally:
        stop.set()
        thread.join()
    site.engine.dispose()
    shutil.rmtree(site.settings.data_dir)  # the wipe

    restore(elsewhere, tmp_path / name)

    assert not failures
    restored = reopened(elsewhere)
    with restored.sessions() as session:
        found = set(session.scalars(select(db.Run.id)))
    assert set(before) <= found
    assert restored.whole() == made.manifest.num_blobs >= 20
    with restored.sessions() as session:  # a run that was queued when the backup was made
        while (lease := runs.claim(session, None, "inference", "w")) is not None:
            runs.finish(session, lease, db.RunState.SUCCEEDED, outcome="done")
    restored.done(5000)  # it works
    restored.engine.dispose()


def test_the_check_for_whole_files_sees_a_missing_one(site):
    """The control of the test above."""
    site.done(1)
    path = next(path for path in site.store.blobs.rglob("*") if path.is_file())
    path.unlink()

    with pytest.raises(Exception, match="missing"):
        site.whole()


def test_running_runs_wait_again_and_workers_are_forgotten(site, elsewhere, tmp_path):
    with site.sessions() as session:
        ids = [runs.create(session, kind="pretrain", spec={}, principal="t").id for _ in range(3)]
        session.commit()
        leases = [runs.claim(session, None, "train", "w") for _ in range(2)]
        for lease in leases:
            runs.started(session, lease)
        runs.request_cancel(session, leases[1].run_id)
        session.add(db.WorkerHeartbeat(worker="h:1:train", queue="train", device="cpu"))
        session.commit()
    checkpoint = site.store.work_dir(leases[0].run_id) / "out" / "checkpoint"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")

    backup.backup(site.settings, tmp_path / "backup", version="1")
    restore(elsewhere, tmp_path / "backup")

    restored = reopened(elsewhere)
    with restored.sessions() as session:
        states = {run_id: runs.get(session, run_id).state for run_id in ids}
        again = runs.claim(session, None, "train", "new")
        workers = session.scalar(select(func.count()).select_from(db.WorkerHeartbeat))
        due = session.scalars(select(db.Run.publish_after).where(db.Run.state == "queued")).all()
        (first, _) = runs.attempts(session, leases[0].run_id)
    assert states == {
        leases[0].run_id: "interrupted",
        leases[1].run_id: "canceled",
        (set(ids) - {lease.run_id for lease in leases}).pop(): "queued",
    }
    assert (again.run_id, again.attempt) == (leases[0].run_id, 1)
    assert again.fence > leases[0].fence
    assert (first.outcome, first.detail) == ("preempted", "restored")
    assert workers == 0
    assert all(due)
    work = restored.store.work_dir(leases[0].run_id)
    assert (work / "out" / "checkpoint").read_bytes() == b"weights"
    restored.engine.dispose()


def test_uploads_and_the_pseudonyms_key_come_along_or_not(site, elsewhere, tmp_path):
    name = site.key.patient("P1")
    draft = site.store.uploads / "upl_1"
    draft.mkdir()
    (draft / "bytes").write_bytes(b"half")

    backup.backup(site.settings, tmp_path / "with", version="1")
    bare = backup.backup(site.settings, tmp_path / "without", version="1", with_secrets=False)
    restore(elsewhere, tmp_path / "with")

    assert auth.site_pseudonyms(elsewhere.data_dir).patient("P1") == name
    assert (Store(elsewhere.data_dir).uploads / "upl_1" / "bytes").read_bytes() == b"half"
    assert not bare.manifest.has_secrets
    assert not list((tmp_path / "without").rglob("*.key"))


def _spoil(folder: Path, what: str) -> None:
    if what == "no manifest":
        (folder / "manifest.json").unlink()
    elif what == "a lost blob":
        next((folder / "store" / "blobs").glob("*/*")).unlink()
    else:
        names = {"a blob": "store/blobs/*/*", "the database": "database.*", "the key": "secrets/*"}
        path = next(iter(folder.glob(names[what])))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()  # it may be a link to the site's own
        path.write_bytes(content)


@pytest.mark.parametrize(
    "what", ["no manifest", "a lost blob", "a blob", "the database", "the key"]
)
def test_a_spoiled_backup_is_refused_and_changes_nothing(sqlite_url, tmp_path, what):
    site = Site(tmp_path / "site", sqlite_url)
    site.done(1)
    backup.backup(site.settings, tmp_path / "backup", version="1")
    shutil.copytree(tmp_path / "backup", tmp_path / "good")
    _spoil(tmp_path / "backup", what)
    target = Settings(data_dir=tmp_path / "target")

    with pytest.raises(BackupError):
        restore(target, tmp_path / "backup")

    assert not (target.data_dir / "pcrl.sqlite3").exists()
    restore(target, tmp_path / "good")  # the control
    assert reopened(target).whole() == 1
    site.engine.dispose()


@pytest.mark.parametrize("is_needed", [True, False])
def test_a_file_sent_again_for_another_subject_after_its_removal_is_kept(
    sqlite_url, tmp_path, is_needed
):
    """The second is the control: what every row says has gone is not looked for."""
    site = Site(tmp_path / "site", sqlite_url)
    original, size = site.file(b"a scan as it was sent")
    voxels, _ = site.file(b"its voxels")
    with site.sessions() as session:
        session.add_all(db.Blob(sha256=one, size_bytes=size) for one in (original, voxels))
        session.flush()
        for subject, removed_at in (
            ("s1", db.db_now()),
            ("s2", None if is_needed else db.db_now()),
        ):
            session.add(
                db.Volume(
                    id=db.new_id("vol"), kind="image", subject=subject, modality="CT",
                    format="nifti", original_sha256=original, voxels_sha256=voxels,
                    shape=[1, 1, 1], spacing_mm=[1.0, 1.0, 1.0], affine=[], source_shape=[1, 1, 1],
                    source_affine=[], intake={}, created_by="t", original_removed_at=removed_at,
                )
            )  # fmt: skip
        session.commit()

    made = backup.backup(site.settings, tmp_path / "backup", version="1")

    kept = made.path / "store" / "blobs" / original[:2] / original
    assert kept.exists() == is_needed
    site.engine.dispose()


def test_a_target_that_is_not_empty_is_refused_unless_told(site, tmp_path):
    site.done(1)
    backup.backup(site.settings, tmp_path / "backup", version="1")
    late = site.done(2)

    with pytest.raises(BackupError, match="not empty"):
        restore(site.settings, tmp_path / "backup")
    with site.sessions() as session:
        assert runs.get(session, late)
    site.engine.dispose()
    restore(site.settings, tmp_path / "backup", replace=True)

    assert reopened(site.settings).whole() == 1


def test_nothing_is_replaced_under_workers_that_live(site, tmp_path):
    backup.backup(site.settings, tmp_path / "backup", version="1")
    with site.sessions() as session:
        session.add(db.WorkerHeartbeat(worker="h:1:train", queue="train", device="cpu"))
        session.commit()

    with pytest.raises(BackupError, match="stop the service"):
        restore(site.settings, tmp_path / "backup", replace=True)


def test_a_backup_of_a_newer_version_is_refused_and_of_an_older_one_migrated(
    site, elsewhere, tmp_path
):
    made = backup.backup(site.settings, tmp_path / "backup", version="9").path
    path = made / "manifest.json"
    manifest = Manifest.model_validate_json(path.read_bytes())
    path.write_text(manifest.model_copy(update={"revision": "9999"}).model_dump_json())
    with pytest.raises(BackupError, match="9999"):
        restore(elsewhere, made)
    path.write_text(manifest.model_dump_json())

    restore(elsewhere, made)

    restored = reopened(elsewhere)
    assert migrate.is_current(restored.engine)
    restored.engine.dispose()


def test_a_backup_never_overwrites_and_leaves_nothing_half(site, tmp_path, monkeypatch):
    site.done(1)
    (tmp_path / "there").mkdir()
    with pytest.raises(BackupError, match="exists"):
        backup.backup(site.settings, tmp_path / "there", version="1")
    with pytest.raises(BackupError, match="inside the data folder"):
        backup.backup(site.settings, site.settings.data_dir / "backup", version="1")
    next(path for path in site.store.blobs.rglob("*") if path.is_file()).unlink()
    with pytest.raises(BackupError, match="missing"):
        backup.backup(site.settings, tmp_path / "backup", version="1")

    assert sorted(path.name for path in tmp_path.iterdir() if "backup" in path.name) == []


def test_without_pg_dump_the_message_says_what_to_install(postgres_url, tmp_path, monkeypatch):
    site = Site(tmp_path / "site", postgres_url)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(BackupError, match="pg_dump is not installed"):
        backup.backup(site.settings, tmp_path / "backup", version="1")
    site.engine.dispose()


def test_a_stored_file_is_the_same_in_the_backup_and_named_by_its_digest(site, tmp_path):
    site.done(7)
    backup.backup(site.settings, tmp_path / "backup", version="1")

    (path,) = (tmp_path / "backup" / "store" / "blobs").glob("*/*")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_the_command_line_backs_up_and_restores(sqlite_url, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from service import cli, settings

    site = Site(tmp_path / "site", sqlite_url)
    with site.sessions() as session:
        auth.create_token(session, "n", Role.ADMIN)
        session.commit()
    settings.get_settings.cache_clear()
    monkeypatch.setattr(cli, "get_settings", lambda: site.settings)
    made = CliRunner().invoke(cli.app, ["backup", str(tmp_path / "b.tar")])
    monkeypatch.setattr(cli, "get_settings", lambda: Settings(data_dir=tmp_path / "new"))
    put = CliRunner().invoke(cli.app, ["restore", str(tmp_path / "b.tar")])
    again = CliRunner().invoke(cli.app, ["restore", str(tmp_path / "b.tar")])

    assert made.exit_code == 0, made.output
    assert "2 rows" in made.output  # the token, and the default project
    assert put.exit_code == 0, put.output
    assert again.exit_code == 1
    assert "not empty" in again.output + str(again.stderr)
    site.engine.dispose()
