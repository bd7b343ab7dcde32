"""Volumes: from uploaded bytes to a row, and back out.

The uploaded file is kept without patients' identities (as it came where the site turns that off);
next to it lies the canonical volume (RAS+, uncompressed NIfTI) that training and inference map into
memory, or the grey PNG of a 2D image. A row appears only when both are whole.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from sqlalchemy import func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from imaging import sandbox
from imaging.identity import DEFAULT, Policy
from imaging.kinds import Kind
from imaging.sandbox import IntakeReport
from service import faults
from service.auth import site_pseudonyms
from service.db import (
    Artifact,
    Blob,
    Cursor,
    DatasetItem,
    GoldenCase,
    Page,
    Run,
    Volume,
    everywhere,
    insert_if_absent,
    new_id,
    page,
)
from service.errors import ServiceError
from service.storage import Store


def ingest(
    session: Session,
    store: Store,
    sha256: str,
    size: int,
    *,
    kind: str,
    subject: str | None,
    series_uid: str | None,
    principal: str,
    policy: Policy | None = DEFAULT,
    path: Path | None = None,
) -> tuple[Volume, bool]:
    """Make a volume of a file that was sent; the caller commits.

    What is stored is the file without identities, unless `policy` is None.

    What is pending in the session is committed first, so that no transaction is open while the
    child process reads the scan. On any error nothing stays: no row, no canonical volume, and
    the uploaded file goes too unless a row needs it.

    Args:
        session: Database session.
        store: Where the file lies.
        sha256: Digest of the uploaded file.
        size: Its size in bytes.
        kind: `image`, `labels` or `image_2d`.
        subject: The caller's own pseudonym for the patient. Without it, DICOM gives one from
            its PatientID (keyed hash), and NIfTI gets one of its own from the file's digest.
        series_uid: Which series of a DICOM archive that has several.
        principal: Id of who does it.
        policy: How identities are removed; None keeps the file as it came.
        path: Where the file lies, on the store's file system; the caller removes it. Without it,
            the file lies in the store under `sha256`, and goes from there if it is replaced.

    Returns:
        The volume, and whether it is new (False: these bytes were there already).

    Raises:
        ScanError: The file is not a usable scan.
    """
    there = None if policy else find(session, sha256, kind, subject, series_uid)
    session.commit()
    if there is not None and there.original_removed_at is None:
        return there, False
    sent = [] if path else [sha256]
    try:
        with tempfile.TemporaryDirectory(dir=store.tmp) as folder:
            report = sandbox.run_intake(
                path or store.verify(sha256),
                Path(folder),
                kind=cast(Kind, kind),
                series_uid=series_uid,
                identity=(site_pseudonyms(store.data_dir), policy) if policy else None,
            )
            voxels_sha256, voxels_size = store.put_file(report.volume_path)
            if report.original_path is not None:
                sha256, size = store.put_file(report.original_path)
            elif path is not None:
                store.link_file(path, sha256)
    except BaseException:
        discard(session, store, *sent)
        raise
    if report.original_path is not None:
        discard(session, store, *(set(sent) - {sha256}))
    if report.deidentified is not None:
        series_uid = report.deidentified["series_uid"] or None
    if subject is None:
        subject = _subject_of(report, store) or f"sub_{sha256[:16]}"
    try:
        return _insert(
            session,
            store,
            {sha256: size, voxels_sha256: voxels_size},
            Volume(
                id=new_id("vol"),
                kind=kind,
                subject=subject,
                original_sha256=sha256,
                series_selector=series_uid or "",
                voxels_sha256=voxels_sha256,
                created_by=principal,
                **_facts(report),
            ),
        )
    except BaseException:
        session.rollback()
        discard(session, store, sha256, voxels_sha256)
        raise


def get(session: Session, volume_id: str, *, kind: str | None = None) -> Volume:
    """A volume by id.

    Raises:
        ServiceError: 404 `not_found`; 422 `wrong_volume_kind` if it is not of `kind`.
    """
    volume = session.get(Volume, volume_id)
    if volume is None:
        raise ServiceError(404, "not_found", "no volume has this id")
    if kind is not None and volume.kind != kind:
        raise wrong_kind(volume, kind)
    return volume


def wrong_kind(volume: Volume, kind: str) -> ServiceError:
    """The refusal of a volume that is not of `kind`."""
    return ServiceError(
        422,
        "wrong_volume_kind",
        f"volume {volume.id} is of kind {volume.kind}; {kind} is needed",
        extra={"volume_id": volume.id, "found": volume.kind, "expected": kind},
    )


def listing(
    session: Session,
    *,
    size: int = 50,
    after: Cursor | None = None,
    kind: str | None = None,
    subject: str | None = None,
) -> Page[Volume]:
    """Volumes, newest first."""
    where: list[Any] = []
    if kind is not None:
        where.append(Volume.kind == kind)
    if subject is not None:
        where.append(Volume.subject == subject)
    return page(session, Volume, *where, size=size, after=after)


def delete(session: Session, store: Store, volume_id: str) -> None:
    """Delete a volume and the files that no other row needs. Commits.

    Raises:
        ServiceError: 404 `not_found`; 409 `volume_in_use` if a dataset, a run or a golden case
            refers to it.
    """
    volume = get(session, volume_id)
    uses = {
        "datasets": select(func.count(DatasetItem.dataset_id.distinct())).where(
            or_(DatasetItem.volume_id == volume_id, DatasetItem.labels_id == volume_id)
        ),
        "runs": select(func.count()).select_from(Run).where(Run.volume_id == volume_id),
        "golden cases": select(func.count())
        .select_from(GoldenCase)
        .where(or_(GoldenCase.volume_id == volume_id, GoldenCase.labels_id == volume_id)),
    }
    found = {name: session.scalar(count) or 0 for name, count in uses.items()}
    if any(found.values()):
        raise _in_use(found)
    session.delete(volume)
    try:
        session.commit()
    except IntegrityError:  # a dataset or a run took it meanwhile
        session.rollback()
        raise _in_use({}) from None
    discard(session, store, volume.original_sha256, volume.voxels_sha256)


def sweep_blobs(session: Session, store: Store, *, older_than_s: float = 24 * 3600.0) -> int:
    """Remove old stored files that no volume and no run refers to; returns how many. Commits.

    A file's own row does not keep it: who was killed before `discard` has left both.
    """
    needed_by = (Volume.original_sha256, Volume.voxels_sha256, Artifact.sha256)
    referenced = {sha256 for column in needed_by for sha256 in session.scalars(select(column))}
    session.commit()
    orphans = store.unreferenced(referenced, older_than_s=older_than_s)
    discard(session, store, *orphans)
    return len(orphans)


def record_blob(session: Session, store: Store, sha256: str, size: int) -> None:
    """Refer to a stored file from now on; the caller commits.

    Raises:
        ServiceError: 503 `not_live` if the file was discarded meanwhile (ask again).
    """
    lock(session, sha256)
    if not store.path_of(sha256).exists():
        raise ServiceError(
            503, "not_live", "the file was discarded meanwhile", headers={"Retry-After": "1"}
        )
    insert_if_absent(session, Blob, sha256=sha256, size_bytes=size)


def find(
    session: Session, sha256: str, kind: str, subject: str | None, series_uid: str | None
) -> Volume | None:
    """The volume that these bytes became, if they did; of any subject where none is named."""
    statement = select(Volume).where(
        Volume.original_sha256 == sha256,
        Volume.kind == kind,
        Volume.series_selector == (series_uid or ""),
    )
    if subject is not None:
        statement = statement.where(Volume.subject == subject)
    return session.scalars(statement.order_by(Volume.created_at, Volume.id).limit(1)).first()


def _insert(
    session: Session, store: Store, sizes: dict[str, int], volume: Volume
) -> tuple[Volume, bool]:
    for sha256 in sorted(sizes):  # one order, so that two requests never wait for each other
        record_blob(session, store, sha256, sizes[sha256])
    there = find(
        session,
        volume.original_sha256,
        volume.kind,
        volume.subject,
        volume.series_selector or None,
    )
    if there is not None:  # the same upload, sent twice at once, or again after its file had gone
        there.original_removed_at = None
        return there, False
    session.add(volume)
    session.flush()
    faults.point("volume.before_commit")
    return volume, True


def _subject_of(report: IntakeReport, store: Store) -> str:
    """The patient's pseudonym; empty where the scan names no patient."""
    if not report.patient_key:
        return ""
    named = report.deidentified["subject"] if report.deidentified else ""
    return named or site_pseudonyms(store.data_dir).patient(report.patient_key)


def _facts(report: IntakeReport) -> dict[str, Any]:
    return {
        "modality": report.modality,
        "format": report.format,
        "shape": [int(size) for size in report.shape],
        "spacing_mm": [float(step) for step in report.spacing_mm],
        "affine": _rows(report.affine),
        "source_shape": [int(size) for size in report.source_shape],
        "source_affine": _rows(report.source_affine),
        "intake": {
            "dtype": str(report.dtype),
            "series_uid": report.series_uid,
            "members": [_plain(member) for member in report.members],
            "deidentified": report.deidentified,
            "used": [_plain(member) for member in report.used],
            "notes": [str(note) for note in report.notes],
            "slices": report.slices,
        },
    }


def _rows(affine: Any) -> list[list[float]]:
    return [[float(value) for value in row] for row in affine]


def _plain(member: Any) -> dict[str, Any]:
    return dict(member) if isinstance(member, dict) else asdict(member)


def discard(session: Session, store: Store, *digests: str) -> None:
    """Remove files, and their rows, that nothing refers to. Commits.

    The lock makes "no row refers to it" and "the file goes" one step for `record_blob`. Projects
    share files, so every project's rows count.
    """
    for sha256 in sorted(set(digests)):
        lock(session, sha256)
        references = (
            select(Volume.id).where(
                or_(Volume.original_sha256 == sha256, Volume.voxels_sha256 == sha256)
            ),
            select(Artifact.name).where(Artifact.sha256 == sha256),
        )
        if all(session.scalars(everywhere(one.limit(1))).first() is None for one in references):
            blob = session.get(Blob, sha256)
            if blob is not None:
                session.delete(blob)
                session.flush()
            store.delete_blob(sha256)
        session.commit()


def lock(session: Session, sha256: str) -> None:
    """Until the end of the transaction, nobody else refers to or discards this file."""
    if session.get_bind().dialect.name == "postgresql":
        key = int.from_bytes(bytes.fromhex(sha256[:16]), signed=True)
        session.execute(select(func.pg_advisory_xact_lock(key)))
    # On SQLite every transaction is the only writer already (db.connect).


def _in_use(found: dict[str, int]) -> ServiceError:
    counts = ", ".join(f"{number} {name}" for name, number in found.items() if number)
    return ServiceError(
        409, "volume_in_use", f"the volume is used by {counts or 'another resource'}"
    )
