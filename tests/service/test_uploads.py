"""Uploads in pieces on SQLite and PostgreSQL: begun once, advanced by one, swept when stale."""

from __future__ import annotations

import hashlib
import threading

import numpy as np
import pytest
from sqlalchemy import func, select

from imaging import nifti
from service import db, uploads, volumes
from service.auth import Principal, Role
from service.errors import ServiceError
from service.storage import Store
from service.uploads import Appending, Wanted

CALLER = Principal("tok_test", "test", Role.ANNOTATOR, "prj_default")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data")


@pytest.fixture
def content(tmp_path) -> bytes:
    path = tmp_path / "scan.nii"
    nifti.write(path, np.arange(4096, dtype=np.int16).reshape(16, 16, 16), np.eye(4))
    return path.read_bytes()


def wanted(content: bytes, *, subject: str | None = "s") -> Wanted:
    return Wanted(hashlib.sha256(content).hexdigest(), len(content), "image", subject, None)


def append(session, store, upload, content: bytes, offset: int, size: int) -> None:
    data = content[offset : offset + size]
    digest = hashlib.sha256(data).hexdigest()
    with Appending(session, store, upload).piece(offset, len(data), digest) as piece:
        piece.write(data)


def test_pieces_become_a_volume_once(sessions, store, content):
    with sessions() as session:
        upload, is_new = uploads.begin(session, wanted(content), CALLER)
        session.commit()
        for offset in range(0, len(content), 3000):
            append(session, store, upload, content, offset, 3000)
        volume, made = uploads.complete(session, store, upload, CALLER, policy=None)
        again, made_again = uploads.complete(session, store, upload, CALLER, policy=None)

        assert (is_new, made, made_again) == (True, True, False)
        assert volume.id == again.id == upload.volume_id
        assert volume.original_sha256 == wanted(content).sha256
        assert store.verify(volume.original_sha256).read_bytes() == content
        assert list(store.uploads.iterdir()) == []


def test_many_announcements_at_once_are_one_upload(sessions, content):
    ids: list[str] = []
    news: list[bool] = []
    barrier = threading.Barrier(6)

    def announce() -> None:
        barrier.wait()
        with sessions() as session:
            upload, is_new = uploads.begin(session, wanted(content), CALLER)
            session.commit()
            ids.append(upload.id)
            news.append(is_new)

    threads = [threading.Thread(target=announce) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(db.Upload)) == 1
    assert len(ids) == 6
    assert len(set(ids)) == sum(news) == 1


def test_the_same_piece_sent_at_once_is_taken_once(sessions, store, content):
    with sessions() as session:
        upload, _ = uploads.begin(session, wanted(content), CALLER)
        session.commit()
    outcomes: list[str] = []
    barrier = threading.Barrier(5)

    def send() -> None:
        barrier.wait()
        with sessions() as session:
            try:
                append(session, store, session.get(db.Upload, upload.id), content, 0, 3000)
            except ServiceError as error:
                outcomes.append(error.code)
            else:
                outcomes.append("taken")

    threads = [threading.Thread(target=send) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert outcomes.count("taken") == 1
    assert set(outcomes) <= {"taken", "upload_busy", "upload_offset_mismatch"}
    with sessions() as session:
        assert session.get(db.Upload, upload.id).received_bytes == 3000


def test_stale_uploads_are_swept_with_their_bytes(sessions, store, content):
    with sessions() as session:
        stale, _ = uploads.begin(session, wanted(content, subject="stale"), CALLER)
        fresh, _ = uploads.begin(session, wanted(content, subject="fresh"), CALLER)
        session.commit()
        for upload in (stale, fresh):
            append(session, store, upload, content, 0, 3000)
        stale.updated_at = db.db_now(-7200.0)
        session.commit()

        num_gone = uploads.sweep(session, store, older_than_s=3600.0)

        assert num_gone == 1
        assert [path.name for path in store.uploads.iterdir()] == [fresh.id]
        assert session.scalars(select(db.Upload.id)).all() == [fresh.id]


def test_a_volume_that_goes_takes_its_upload_along(sessions, store, content):
    with sessions() as session:
        upload, _ = uploads.begin(session, wanted(content), CALLER)
        session.commit()
        append(session, store, upload, content, 0, len(content))
        volume, _ = uploads.complete(session, store, upload, CALLER, policy=None)
        volumes.delete(session, store, volume.id)
        session.expunge_all()

        assert session.get(db.Upload, upload.id) is None
        with pytest.raises(ServiceError, match="not_found"):
            uploads.get(session, upload.id, CALLER)
