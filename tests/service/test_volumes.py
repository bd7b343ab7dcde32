"""Volumes: a real scan becomes a row and two files, or nothing at all."""

import io
import stat
import zipfile
from datetime import UTC, datetime

import numpy as np
import pydicom
import pytest
from sqlalchemy import select

from imaging import nifti
from imaging.errors import ScanError
from imaging.identity import DEFAULT, Policy
from imaging.phantom import make, write_dicom_series
from imaging.phantom_dicom import uid as phantom_uid
from service import datasets, runs, volumes
from service.db import Blob
from service.errors import ServiceError
from service.storage import Store

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data")


@pytest.fixture
def session(sessions):
    with sessions() as session:
        yield session


def nifti_bytes(tmp_path, seed=0, *, labels=False, shape=(12, 10, 8), affine=AFFINE):
    path = tmp_path / f"{seed}.nii.gz"
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 3 if labels else 1000, shape)
    nifti.write(path, voxels.astype(np.uint8 if labels else np.int16), affine)
    return path.read_bytes()


def two_series(tmp_path, **attributes):
    """A zip of two patients' series, with these attributes in every file."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        for seed in (1, 2):
            phantom = make(seed, shape=(32, 32, 16), spacing_mm=(12.0, 12.0, 20.0))
            for path in write_dicom_series(phantom.volume, tmp_path / str(seed), seed=seed):
                slice_ = pydicom.dcmread(path)
                for keyword, value in attributes.items():
                    setattr(slice_, keyword, value)
                slice_.save_as(path)
                target.write(path, f"{seed}/{path.name}")
    return archive.getvalue()


def ingest(session, store, content, *, kind="image", subject=None, series_uid=None, policy=DEFAULT):
    with store.receive() as writer:
        writer.write(content)
        sha256, size = store.commit_blob(writer)
    volume, created = volumes.ingest(
        session,
        store,
        sha256,
        size,
        kind=kind,
        subject=subject,
        series_uid=series_uid,
        principal="tok_test",
        policy=policy,
    )
    session.commit()
    return volume, created


def files_of(store):
    stored = (store.data_dir / "store").rglob("*")
    return sorted(path.name for path in stored if path.is_file())


def test_a_nifti_file_becomes_a_canonical_volume(session, store, tmp_path):
    volume, created = ingest(session, store, nifti_bytes(tmp_path))

    assert created
    assert volume.shape == [12, 10, 8]
    assert volume.spacing_mm == pytest.approx([2.0, 2.0, 3.0])
    canonical = nifti.open_canonical(store.verify(volume.voxels_sha256))
    assert canonical.shape == (12, 10, 8)
    assert np.diag(canonical.affine)[:3] == pytest.approx([2.0, 2.0, 3.0])
    assert files_of(store) == sorted([volume.original_sha256, volume.voxels_sha256])


def test_a_dicom_series_gets_a_keyed_pseudonym(session, store, tmp_path):
    phantom = make(1, shape=(32, 32, 16), spacing_mm=(12.0, 12.0, 20.0))
    folder = tmp_path / "series"
    write_dicom_series(phantom.volume, folder, seed=1)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        for path in folder.iterdir():
            target.write(path, path.name)

    found, _ = ingest(session, store, archive.getvalue())

    assert found.modality == "CT"
    assert found.subject.startswith("sub_")
    assert len(found.subject) == 20
    key = store.data_dir / "secrets" / "pseudonym.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert found.intake["deidentified"]["table"] == "2026c"
    original = store.verify(found.original_sha256).read_bytes()
    assert original != archive.getvalue()
    with zipfile.ZipFile(io.BytesIO(original)) as kept:
        slices = [pydicom.dcmread(io.BytesIO(kept.read(name))) for name in kept.namelist()]
    assert len(slices) == 16
    assert {str(slice_.PatientID) for slice_ in slices} == {found.subject}
    assert {slice_.SeriesInstanceUID for slice_ in slices} == {found.intake["series_uid"]}


def test_a_series_may_be_named_as_it_was_or_as_it_is_mapped(session, store, tmp_path):
    content = two_series(tmp_path)
    with pytest.raises(ScanError, match="several_series") as several:
        ingest(session, store, content)
    listed = [found["series_uid"] for found in several.value.extra["series"]]
    sent = [str(phantom_uid(seed, "series")) for seed in (1, 2)]
    assert not set(sent) & set(listed)

    by_sent, created = ingest(session, store, content, series_uid=sent[0])
    by_mapped, again = ingest(session, store, content, series_uid=by_sent.series_selector)

    assert by_sent.series_selector in listed
    assert (created, again) == (True, False)
    assert by_mapped.id == by_sent.id
    assert {member["reason"] for member in by_sent.intake["members"]} == {"part of another series"}
    other, _ = ingest(session, store, content, series_uid=sent[1])
    assert other.subject != by_sent.subject
    with pytest.raises(ScanError, match="no_such_series"):
        ingest(session, store, content, series_uid="1.2.3")


def test_without_de_identification_the_upload_is_kept_as_it_came(session, store, tmp_path):
    content = nifti_bytes(tmp_path)

    volume, _ = ingest(session, store, content, policy=None)
    cleaned, created = ingest(session, store, content)

    assert store.verify(volume.original_sha256).read_bytes() == content
    assert volume.intake["deidentified"] is None
    assert created
    assert cleaned.voxels_sha256 == volume.voxels_sha256
    assert cleaned.original_sha256 != volume.original_sha256


def test_the_same_patient_has_the_same_pseudonym_with_and_without(session, store, tmp_path):
    content = two_series(tmp_path)
    uid = str(phantom_uid(1, "series"))

    plain, _ = ingest(session, store, content, series_uid=uid, policy=None)
    cleaned, _ = ingest(session, store, content, series_uid=uid)

    assert plain.subject == cleaned.subject
    assert plain.voxels_sha256 == cleaned.voxels_sha256


def test_an_image_with_burned_in_text_is_refused_and_nothing_is_kept(session, store, tmp_path):
    content = two_series(tmp_path, BurnedInAnnotation="YES")

    with pytest.raises(ScanError, match="burned_in_annotation: quarantined: BurnedIn"):
        ingest(session, store, content)

    assert files_of(store) == []
    uid = str(phantom_uid(1, "series"))
    accepted = Policy(accept_burned_in=True)
    volume, _ = ingest(session, store, content, series_uid=uid, policy=accepted)
    assert volume.modality == "CT"


def test_the_same_bytes_again_are_the_same_volume(session, store, tmp_path):
    content = nifti_bytes(tmp_path)
    first, _ = ingest(session, store, content)

    again, created = ingest(session, store, content)

    assert (again.id, created) == (first.id, False)
    other, created = ingest(session, store, content, subject="subject-2")
    assert created
    assert other.id != first.id


@pytest.mark.parametrize("policy", [DEFAULT, None])
def test_a_file_that_was_removed_and_is_sent_again_is_there_again(session, store, tmp_path, policy):
    content = nifti_bytes(tmp_path)
    first, _ = ingest(session, store, content, policy=policy)
    first.original_removed_at = datetime.now(UTC)
    session.commit()
    store.delete_blob(first.original_sha256)

    again, created = ingest(session, store, content, policy=policy)

    assert (again.id, created, again.original_removed_at) == (first.id, False, None)
    assert store.verify(again.original_sha256)


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", None), (b"not a scan at all", None), (b"PK\x05\x06" + b"\0" * 18, None)],
)
def test_what_is_no_scan_leaves_nothing(session, store, content, code):
    with pytest.raises(ScanError):
        ingest(session, store, content)

    assert files_of(store) == []
    assert session.scalars(select(Blob)).all() == []


def test_a_failed_reading_keeps_a_file_that_another_volume_needs(session, store, tmp_path):
    content = nifti_bytes(tmp_path)  # values up to 999: no labels
    image, _ = ingest(session, store, content)

    with pytest.raises(ScanError, match="labels_not_integers"):
        ingest(session, store, content, kind="labels")

    assert store.verify(image.original_sha256)


def test_deleting_removes_the_row_and_its_files(session, store, tmp_path):
    volume, _ = ingest(session, store, nifti_bytes(tmp_path))

    volumes.delete(session, store, volume.id)

    assert files_of(store) == []
    assert session.scalars(select(Blob)).all() == []
    with pytest.raises(ServiceError, match="not_found"):
        volumes.get(session, volume.id)


def test_deleting_keeps_files_that_another_volume_shares(session, store, tmp_path):
    content = nifti_bytes(tmp_path)
    first, _ = ingest(session, store, content, subject="a")
    second, _ = ingest(session, store, content, subject="b")

    volumes.delete(session, store, first.id)

    assert store.verify(second.original_sha256)
    assert store.verify(second.voxels_sha256)


def test_a_volume_in_use_is_not_deleted(session, store, tmp_path):
    volume, _ = ingest(session, store, nifti_bytes(tmp_path))
    other, _ = ingest(session, store, nifti_bytes(tmp_path, 1))
    datasets.create(session, name="d", items=[datasets.Item(volume.id)], principal="t")
    runs.create(session, kind="embed", spec={}, volume_id=other.id, principal="t")
    session.commit()

    for used in (volume, other):
        with pytest.raises(ServiceError) as refused:
            volumes.delete(session, store, used.id)
        assert (refused.value.status, refused.value.code) == (409, "volume_in_use")
        assert store.verify(used.original_sha256)


def test_a_file_whose_row_nothing_refers_to_is_swept_with_it(session, store, tmp_path):
    """As after a kill between the commit that ends a reference and `discard`."""
    volume, _ = ingest(session, store, nifti_bytes(tmp_path))
    with store.receive() as writer:
        writer.write(b"a mask of a run that has lost it")
        left, size = store.commit_blob(writer)
    volumes.record_blob(session, store, left, size)
    session.commit()

    assert volumes.sweep_blobs(session, store, older_than_s=-1.0) == 1

    assert not store.path_of(left).exists()
    assert session.get(Blob, left) is None
    assert session.get(Blob, volume.voxels_sha256) is not None


def test_only_old_files_without_a_row_are_swept(session, store, tmp_path):
    volume, _ = ingest(session, store, nifti_bytes(tmp_path))
    with store.receive() as writer:
        writer.write(b"orphan")
        orphan, _ = store.commit_blob(writer)

    assert volumes.sweep_blobs(session, store) == 0
    assert volumes.sweep_blobs(session, store, older_than_s=-1.0) == 1

    assert not store.path_of(orphan).exists()
    assert store.verify(volume.original_sha256)
    assert store.verify(volume.voxels_sha256)
