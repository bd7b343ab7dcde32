"""Uploads: what is good is stored once, what is bad leaves nothing."""

import asyncio
import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from sqlalchemy import select

from service import db


def test_an_uploaded_nifti_is_described(api, scans):
    response = api.upload(scans.nifti, subject="described")

    assert response.status_code == 201
    body = response.json()
    assert response.headers["location"] == f"/api/v1/volumes/{body['id']}"
    assert (body["kind"], body["subject"], body["format"]) == ("image", "described", "nifti")
    assert body["shape"] == [32, 32, 16]
    assert body["spacing_mm"] == pytest.approx([12.0, 12.0, 18.0])
    kept = api("GET", f"/volumes/{body['id']}/file?format=original").content
    assert body["size_bytes"] == len(kept)
    assert body["sha256"] == hashlib.sha256(kept).hexdigest()
    assert api("GET", f"/volumes/{body['id']}").json() == body


def test_the_same_bytes_again_are_the_same_volume(api, scans, world):
    before = api.counts()

    response = api.upload(scans.zipped, subject="subject-1")

    assert response.status_code == 200
    assert response.json()["id"] == world.zipped
    assert api.counts() == before


def test_a_dicom_zip_downloads_without_identities_and_as_nifti(api, scans, world, tmp_path):
    original = api("GET", f"/volumes/{world.zipped}/file?format=original")
    nifti = api("GET", f"/volumes/{world.zipped}/file")

    with zipfile.ZipFile(io.BytesIO(original.content)) as kept:
        first = pydicom.dcmread(io.BytesIO(kept.read(kept.namelist()[0])))
        assert len(kept.namelist()) == 16
    assert first.PatientIdentityRemoved == "YES"
    assert b"PHANTOM" not in original.content
    assert str(first.PatientID).startswith("sub_")
    assert original.headers["content-disposition"].startswith("attachment; filename=")
    assert original.headers["content-type"] == "application/octet-stream"
    assert original.headers["x-content-type-options"] == "nosniff"
    assert original.headers["cache-control"] == "no-store"
    path = tmp_path / "scan.nii"
    path.write_bytes(nifti.content)
    assert nib.nifti1.Nifti1Image.from_filename(path).shape == (32, 32, 16)


def test_a_download_gives_the_range_that_is_asked_for(api, world):
    path = f"/volumes/{world.zipped}/file?format=original"
    whole = api("GET", path).content

    part = api("GET", path, headers={"Range": "bytes=10-19"})
    beyond = api("GET", path, headers={"Range": "bytes=99999999-"})
    unclear = api("GET", path, headers={"Range": "furlongs=1-2"})

    assert (part.status_code, part.content) == (206, whole[10:20])
    assert beyond.status_code == 416
    assert (unclear.status_code, unclear.content) == (200, whole)


def test_a_series_is_chosen_by_its_uid(api, scans):
    refused = api.upload(scans.two_series)
    series = refused.json()["series"]
    chosen = api.upload(scans.two_series, series_uid=series[0]["series_uid"])

    assert (refused.status_code, refused.json()["code"]) == (422, "several_series")
    assert len(series) == 2
    assert {"modality", "num_images", "columns", "rows"} <= series[0].keys()
    assert chosen.status_code == 201
    body = chosen.json()
    assert body["num_used"] == series[0]["num_images"]
    assert len(body["skipped"]) == series[1]["num_files"]
    assert {one["reason"] for one in body["skipped"]} == {"part of another series"}
    assert all(one["sop_uid"] for one in body["skipped"])
    assert body["notes"] == []


def _nifti(voxels: np.ndarray) -> bytes:
    return gzip.compress(nib.nifti1.Nifti1Image(voxels, np.eye(4)).to_bytes())


def _empty_zip() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w"):
        pass
    return held.getvalue()


BAD = {
    "no body": (lambda _: b"", "not_a_scan"),
    "text": (lambda _: b"this is a letter, not a scan" * 100, "not_a_scan"),
    "truncated": (lambda scans: scans.nifti[: len(scans.nifti) // 2], "truncated_file"),
    "empty zip": (lambda _: _empty_zip(), "empty_archive"),
    "several series": (lambda scans: scans.two_series, "several_series"),
    "two dimensions": (
        lambda _: _nifti(np.zeros((8, 8), dtype=np.int16)),
        "not_three_dimensional",
    ),
    "not finite": (
        lambda _: _nifti(np.full((8, 8, 8), np.nan, dtype=np.float32)),
        "non_finite_voxels",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_is_a_coded_problem_and_leaves_nothing(api, scans, world, name):
    make, code = BAD[name]
    before = api.counts()

    response = api.upload(make(scans))

    assert (response.status_code, response.json()["code"]) == (422, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert api.counts() == before
    assert api("GET", f"/volumes/{world.image}").status_code == 200


def test_labels_that_are_not_whole_numbers_are_refused(api):
    voxels = np.full((8, 8, 8), 0.5, dtype=np.float32)
    before = api.counts()

    response = api.upload(_nifti(voxels), kind="labels")

    assert (response.status_code, response.json()["code"]) == (422, "labels_not_integers")
    assert api.counts() == before


def test_a_good_upload_after_a_bad_one_is_stored(api, scans):
    before = api.counts()

    bad = api.upload(scans.nifti[:100])
    good = api.upload(scans.nifti, subject="after-a-bad-one")

    assert (bad.status_code, good.status_code) == (422, 201)
    after = api.counts()
    assert after["volume"] == before["volume"] + 1  # the counts do see what is stored


def test_an_announced_length_over_the_limit_is_refused_unread(serve):
    small = serve(max_upload_bytes=1000)
    headers = {"Content-Length": "99999999999", "Content-Type": "application/octet-stream"}

    def body():
        raise AssertionError("the body was read")
        yield b""

    response = small("POST", "/volumes", headers=headers, content=body())

    assert (response.status_code, response.json()["code"]) == (413, "request_too_large")


def test_a_body_without_a_length_is_cut_at_the_limit(serve):
    small = serve(max_upload_bytes=3_000_000)
    before = small.counts()
    sent = []

    def body():
        for number in range(100):
            sent.append(number)
            yield bytes(1_000_000)

    response = small("POST", "/volumes", content=body())

    assert (response.status_code, response.json()["code"]) == (413, "request_too_large")
    assert small.counts() == before


def test_below_the_free_space_watermark_uploads_are_refused(serve, scans):
    full = serve()
    full.store.min_free_bytes = 2**60

    response = full.upload(scans.nifti)

    assert (response.status_code, response.json()["code"]) == (507, "insufficient_storage")


def test_a_form_is_not_a_scan(api, scans):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}

    response = api("POST", "/volumes", content=scans.nifti, headers=headers)

    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("is_aborted", [True, False])
def test_an_aborted_upload_leaves_nothing(api, scans, is_aborted):
    before = api.counts()
    token = api.tokens["admin"].encode()
    half = len(scans.nifti) // 2
    last = {"type": "http.disconnect"}
    if not is_aborted:
        last = {"type": "http.request", "body": scans.nifti[half:], "more_body": False}
    messages = [{"type": "http.request", "body": scans.nifti[:half], "more_body": True}, last]
    sent = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/api/v1/volumes",
        "raw_path": b"/api/v1/volumes",
        "query_string": f"subject=aborted-{is_aborted}".encode(),
        "root_path": "",
        "headers": [
            (b"authorization", b"Bearer " + token),
            (b"content-type", b"application/octet-stream"),
        ],
        "state": {},
    }

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(api.app(scope, receive, send))

    assert (api.counts() == before) is is_aborted
    assert bool(sent) is not is_aborted


def test_a_volume_in_use_stays_and_one_that_is_not_goes_with_its_files(api, scans, world):
    before = api.counts()
    made = api.upload(scans.two_series + b"", series_uid=_first_series(api, scans), subject="gone")

    in_use = api("DELETE", f"/volumes/{world.image}")
    gone = api("DELETE", f"/volumes/{made.json()['id']}")

    assert (in_use.status_code, in_use.json()["code"]) == (409, "volume_in_use")
    assert gone.status_code == 204
    assert api.counts() == before
    assert api("GET", f"/volumes/{made.json()['id']}").status_code == 404


def _first_series(api, scans) -> str:
    return str(api.upload(scans.two_series).json()["series"][1]["series_uid"])


def test_a_stored_file_that_is_gone_is_said_to_be_corrupt(api, scans):
    made = api.upload(scans.labels, kind="labels", subject="corrupt").json()["id"]
    with api.sessions() as session:
        row = session.scalars(select(db.Volume).where(db.Volume.id == made)).one()
    path: Path = api.store.path_of(row.voxels_sha256)
    kept = path.read_bytes()
    path.unlink()
    try:
        response = api("GET", f"/volumes/{made}/file")
    finally:
        path.write_bytes(kept)

    assert (response.status_code, response.json()["code"]) == (500, "blob_corrupt")
