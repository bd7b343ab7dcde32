"""Uploads in pieces: a broken connection or a killed API costs one piece (reliability.md, 3.4).

A piece is written beyond the offset of the row, checked, and fsynced; then the row's offset moves.
So a row never counts bytes that the disk lacks, and bytes that no row counts are cut away by the
next piece. An upload is found again by what it is (caller, digest, kind, subject, series), so a
client that lost its state goes on by asking for the same upload. One request at a time holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from imaging.errors import ScanError
from imaging.identity import Policy
from models import bundle
from service import volumes
from service.auth import Principal, Role
from service.db import Upload, Volume, db_now, insert_if_absent, new_id
from service.errors import ServiceError
from service.storage import Draft, Piece, Store

CHUNK_BYTES = 8 << 20
"""The most that one piece may hold, and so the most that a killed API costs."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a file is to become; with the caller, its identity."""

    sha256: str
    size_bytes: int
    kind: str
    subject: str | None
    series_uid: str | None


def begin(session: Session, wanted: Wanted, caller: Principal) -> tuple[Upload, bool]:
    """The caller's upload of this file, begun or found again; the caller commits.

    Where the volume is there already, whoever sent it, the upload is complete at once.

    Returns:
        The upload, and whether it is new.

    Raises:
        ServiceError: 422 `digest_mismatch`: the digest was announced with another size before.
    """
    found = _same(session, wanted, caller)
    if found is None:
        there = volumes.find(session, wanted.sha256, wanted.kind, wanted.subject, wanted.series_uid)
        upload_id = new_id("upl")
        insert_if_absent(
            session,
            Upload,
            id=upload_id,
            received_bytes=0 if there is None else wanted.size_bytes,
            volume_id=None if there is None else there.id,
            size_bytes=wanted.size_bytes,
            created_by=caller.id,
            **_identity(wanted),
        )
        found = _same(session, wanted, caller)
        assert found is not None  # inserted now, or by a request that was faster
        return found, found.id == upload_id and there is None
    if found.size_bytes != wanted.size_bytes:
        raise ServiceError(
            422,
            "digest_mismatch",
            f"the digest was announced for {found.size_bytes} bytes, now for {wanted.size_bytes}",
        )
    return found, False


def get(session: Session, upload_id: str, caller: Principal) -> Upload:
    """An upload of the caller's; an admin sees everybody's.

    Raises:
        ServiceError: 404 `not_found`, the same for another caller's upload.
    """
    upload = session.get(Upload, upload_id, populate_existing=True)
    if upload is None or (upload.created_by != caller.id and caller.role is not Role.ADMIN):
        raise _unknown()
    return upload


class Appending:
    """One piece on its way: `with Appending(...) as piece`, then `commit`. Blocking."""

    def __init__(self, session: Session, store: Store, upload: Upload) -> None:
        self._session = session
        self._store = store
        self._upload = upload

    @contextmanager
    def piece(self, offset: int, size: int, sha256: str) -> Iterator[Piece]:
        """Hold the upload and append a piece; its row moves when the bytes are on the disk.

        Raises:
            ServiceError: 409 `upload_offset_mismatch`, 409 `upload_busy`, 422 `digest_mismatch`,
                507 `insufficient_storage`.
        """
        self._store.check_space()
        with self._store.draft(self._upload.id) as draft:
            _again(self._session, self._upload)
            there = _on_disk(self._upload, draft)
            self._session.commit()  # no transaction is open while the body streams
            if offset != there:
                raise _elsewhere(there)
            with draft.piece(offset, size, sha256) as piece:
                yield piece
            self._advance(offset + size)

    def _advance(self, received: int) -> None:
        self._session.execute(
            update(Upload)
            .where(Upload.id == self._upload.id)
            .values(received_bytes=received, updated_at=db_now())
            .execution_options(synchronize_session=False)
        )
        self._session.commit()
        self._session.refresh(self._upload)
        self._session.commit()


def complete(
    session: Session, store: Store, upload: Upload, caller: Principal, *, policy: Policy | None
) -> tuple[Volume, bool]:
    """Make a volume of an upload whose bytes are all there. Commits; safe to repeat.

    `policy` says how identities are removed (`volumes.ingest`).

    Returns:
        The volume, and whether it is new.

    Raises:
        ScanError: The file is not a usable scan; the upload is forgotten.
        ServiceError: 409 `upload_incomplete`, 409 `upload_busy`; 422 `digest_mismatch`: the file
            is not the one that was announced, and the upload begins anew.
    """
    with store.draft(upload.id) as draft:
        _again(session, upload)
        if upload.volume_id is not None:
            volume = volumes.get(session, upload.volume_id)
            session.commit()
            draft.remove()  # left by a process that was killed here
            return volume, False
        there = _on_disk(upload, draft)
        session.commit()
        if there < upload.size_bytes:
            raise ServiceError(
                409,
                "upload_incomplete",
                f"{there} of {upload.size_bytes} bytes are there",
                extra={"offset_bytes": there},
            )
        _check_digest(session, upload, draft)
        try:
            volume, is_new = volumes.ingest(
                session,
                store,
                upload.sha256,
                upload.size_bytes,
                kind=upload.kind,
                subject=upload.subject or None,
                series_uid=upload.series_selector or None,
                principal=caller.id,
                policy=policy,
                path=draft.path,
            )
        except ScanError:
            _forget(session, upload.id)
            draft.remove()
            raise
        upload.volume_id = volume.id
        upload.updated_at = db_now()
        session.commit()
        draft.remove()
        return volume, is_new


def remove(session: Session, store: Store, upload: Upload) -> None:
    """Forget an upload and its bytes; a volume that it became stays. Commits.

    Raises:
        ServiceError: 409 `upload_busy`.
    """
    session.commit()
    with store.draft(upload.id) as draft:
        _forget(session, upload.id)
        draft.remove()


def sweep(session: Session, store: Store, *, older_than_s: float) -> int:
    """Forget uploads that rest for too long, and bytes that no row knows; returns how many."""
    stale = session.scalars(select(Upload.id).where(Upload.updated_at < db_now(-older_than_s)))
    gone = {str(upload_id) for upload_id in stale}
    known = set(session.scalars(select(Upload.id)))
    session.commit()
    orphans = {path.name for path in store.stale_drafts(older_than_s)} - known
    num_gone = 0
    for upload_id in sorted(gone | orphans):
        try:
            with store.draft(upload_id) as draft:
                _forget(session, upload_id, Upload.updated_at < db_now(-older_than_s))
                if session.scalar(select(Upload.id).where(Upload.id == upload_id)) is None:
                    draft.remove()
                    num_gone += 1
                session.commit()
        except ServiceError:  # somebody works on it
            continue
    return num_gone


def _identity(wanted: Wanted) -> dict[str, Any]:
    return {
        "sha256": wanted.sha256,
        "kind": wanted.kind,
        "subject": wanted.subject or "",
        "series_selector": wanted.series_uid or "",
    }


def _same(session: Session, wanted: Wanted, caller: Principal) -> Upload | None:
    where = {"created_by": caller.id, **_identity(wanted)}
    return session.scalars(select(Upload).filter_by(**where)).one_or_none()


def _on_disk(upload: Upload, draft: Draft) -> int:
    """Where the upload has got to: what the row counts, as far as the disk has it."""
    if upload.volume_id is not None:
        return upload.size_bytes
    return min(upload.received_bytes, draft.size)


def offset_of(store: Store, upload: Upload) -> int:
    """Where the next piece begins."""
    if upload.volume_id is not None:
        return upload.size_bytes
    return min(upload.received_bytes, Draft(store.uploads / upload.id).size)


def _again(session: Session, upload: Upload) -> None:
    """Read the row again, now that nobody else changes it (404 if it is gone)."""
    if session.get(Upload, upload.id, populate_existing=True) is None:
        raise _unknown()


def _unknown() -> ServiceError:
    return ServiceError(404, "not_found", "no upload has this id; a stale one is forgotten")


def _elsewhere(there: int) -> ServiceError:
    return ServiceError(
        409,
        "upload_offset_mismatch",
        f"the upload has got to byte {there}",
        extra={"offset_bytes": there},
    )


def _check_digest(session: Session, upload: Upload, draft: Draft) -> None:
    if bundle.sha256_of(draft.path) == upload.sha256:
        return
    draft.clear()
    upload.received_bytes = 0
    session.commit()
    raise ServiceError(
        422, "digest_mismatch", "the file is not the one that was announced; send it again"
    )


def _forget(session: Session, upload_id: str, *where: Any) -> None:
    session.execute(
        delete(Upload)
        .where(Upload.id == upload_id, *where)
        .execution_options(synchronize_session=False)
    )
    session.commit()
