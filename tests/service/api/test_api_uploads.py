"""Uploads in pieces, over HTTP: kept whole or not at all, found again, complete once."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from service import db, uploads

PIECE = 4000


def announced(data: bytes, **more) -> dict:
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **more}


def begun(api, data: bytes, *, role="annotator", **more):
    return api("POST", "/uploads", role=role, json=announced(data, **more))


def headers_of(piece: bytes, offset: int, total: int) -> dict[str, str]:
    digest = base64.b64encode(hashlib.sha256(piece).digest()).decode()
    return {
        "Content-Type": "application/octet-stream",
        "Content-Range": f"bytes {offset}-{offset + len(piece) - 1}/{total}",
        "Content-Digest": f"sha-256=:{digest}:",
    }


def send(api, upload_id: str, data: bytes, offset: int, size: int = PIECE, **changed):
    piece = data[offset : offset + size]
    headers = {**headers_of(piece, offset, len(data)), **changed}
    return api("PUT", f"/uploads/{upload_id}", role="annotator", content=piece, headers=headers)


def send_all(api, upload_id: str, data: bytes) -> None:
    for offset in range(0, len(data), PIECE):
        assert send(api, upload_id, data, offset).status_code == 200


def complete(api, upload_id: str, *, role="annotator"):
    return api("POST", f"/uploads/{upload_id}:complete", role=role)


def bytes_of(api, upload_id: str):
    return api.store.uploads / upload_id / "bytes"


def other(scans, text: bytes) -> bytes:
    """The same voxels in another file each time: what follows them is not read."""
    return scans.nifti + gzip.compress(text, mtime=0)


def test_pieces_become_the_volume_that_one_body_becomes(api, scans):
    data = scans.nifti
    first = begun(api, data, subject="pieces")
    upload_id = first.json()["id"]
    offsets = [send(api, upload_id, data, at).json()["offset_bytes"] for at in (0, PIECE)]
    for at in range(2 * PIECE, len(data), PIECE):
        send(api, upload_id, data, at)
    made = complete(api, upload_id)
    again = complete(api, upload_id)
    whole = api.upload(data, subject="pieces")

    assert first.status_code == 201
    assert first.headers["location"] == f"/api/v1/uploads/{upload_id}"
    assert (first.json()["state"], first.json()["offset_bytes"]) == ("open", 0)
    assert offsets == [PIECE, 2 * PIECE]
    assert (made.status_code, again.status_code, whole.status_code) == (201, 200, 200)
    assert made.json() == again.json() == whole.json()
    assert made.headers["location"] == f"/api/v1/volumes/{made.json()['id']}"
    shown = api("GET", f"/uploads/{upload_id}", role="annotator").json()
    assert (shown["state"], shown["volume_id"]) == ("complete", made.json()["id"])
    assert not bytes_of(api, upload_id).parent.exists()


def test_the_same_announcement_finds_the_upload_where_it_has_got(api, scans):
    data = other(scans, b"found again")
    first = begun(api, data)
    send(api, first.json()["id"], data, 0)

    again = begun(api, data)
    for_labels = begun(api, data, kind="labels")
    by_another = begun(api, data, role="researcher")

    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert again.json()["offset_bytes"] == PIECE
    assert len({first.json()["id"], for_labels.json()["id"], by_another.json()["id"]}) == 3
    assert for_labels.status_code == by_another.status_code == 201


def test_a_file_that_is_there_already_is_not_sent_again(api, scans):
    data = scans.nifti
    first = begun(api, data, subject="twice").json()["id"]
    for at in range(0, len(data), PIECE):
        send(api, first, data, at)
    volume_id = complete(api, first).json()["id"]
    before = api.counts()["files"]

    response = begun(api, data, subject="twice")
    made = complete(api, response.json()["id"])

    assert (response.status_code, response.json()["state"]) == (200, "complete")
    assert response.json()["volume_id"] == made.json()["id"] == volume_id
    assert api.counts()["files"] == before


def test_an_upload_is_its_callers_and_an_admins(api, scans):
    upload_id = begun(api, other(scans, b"mine")).json()["id"]

    foreign = api("GET", f"/uploads/{upload_id}", role="researcher")
    absent = api("GET", f"/uploads/upl_{'0' * 32}", role="researcher")
    admins = api("GET", f"/uploads/{upload_id}", role="admin")
    sent = api(
        "PUT",
        f"/uploads/{upload_id}",
        role="researcher",
        content=b"x",
        headers=headers_of(b"x", 0, 9),
    )

    assert foreign.status_code == absent.status_code == sent.status_code == 404
    assert foreign.json()["detail"] == absent.json()["detail"]
    assert admins.status_code == 200


@pytest.mark.parametrize(
    ("size", "changed", "status", "code"),
    [
        (PIECE, {"Content-Digest": f"sha-256=:{'A' * 43}=:"}, 422, "digest_mismatch"),
        (PIECE, {"Content-Digest": "md5=:AAAA:"}, 422, "invalid_request"),
        (PIECE, {"Content-Range": "bytes 9-1/5"}, 422, "invalid_request"),
        (PIECE, {"Content-Range": "bytes 0-9999999999999999999999/5"}, 422, "invalid_request"),
        (PIECE, {"Content-Range": "bytes 0-3999/4001"}, 422, "invalid_request"),
        (PIECE, {"Content-Range": "bytes 0-8388608/99999999"}, 413, "request_too_large"),
        (PIECE, {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (PIECE + 1, {"Content-Range": None}, 422, "invalid_request"),
    ],
)
def test_a_piece_that_is_not_right_is_not_kept(api, scans, size, changed, status, code):
    data = other(scans, b"not right")
    upload_id = begun(api, data).json()["id"]
    if changed.get("Content-Range", "") is None:
        changed = {"Content-Range": f"bytes 0-{PIECE - 1}/{len(data)}"}

    response = send(api, upload_id, data, 0, size, **changed)
    right = send(api, upload_id, data, 0)

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert (right.status_code, right.json()["offset_bytes"]) == (200, PIECE)
    api("DELETE", f"/uploads/{upload_id}", role="annotator")


def test_a_piece_without_a_length_is_cut_where_its_range_ends(api, scans):
    data = other(scans, b"chunked")
    upload_id = begun(api, data).json()["id"]
    headers = headers_of(data[:PIECE], 0, len(data))

    def body(size: int):
        for at in range(0, size, 100):
            yield data[at : at + 100]

    long, short, right = (
        api("PUT", f"/uploads/{upload_id}", role="annotator", content=body(size), headers=headers)
        for size in (PIECE + 100, PIECE - 100, PIECE)
    )

    assert (long.status_code, long.json()["code"]) == (422, "digest_mismatch")
    assert (short.status_code, short.json()["code"]) == (422, "digest_mismatch")
    assert (right.status_code, right.json()["offset_bytes"]) == (200, PIECE)


def test_a_piece_at_another_place_is_told_the_right_one(api, scans):
    data = other(scans, b"places")
    upload_id = begun(api, data).json()["id"]
    send(api, upload_id, data, 0)

    for offset in (0, 2 * PIECE):
        response = send(api, upload_id, data, offset)
        assert (response.status_code, response.json()["code"]) == (409, "upload_offset_mismatch")
        assert response.json()["offset_bytes"] == PIECE
    early = complete(api, upload_id)

    assert (early.status_code, early.json()["code"]) == (409, "upload_incomplete")
    assert early.json()["offset_bytes"] == PIECE


def test_what_a_killed_process_left_behind_is_cut_away(api, scans):
    data = other(scans, b"killed")
    upload_id = begun(api, data, subject="killed").json()["id"]
    send(api, upload_id, data, 0)
    with bytes_of(api, upload_id).open("ab") as file:
        file.write(b"half of a piece that was never counted")

    shown = api("GET", f"/uploads/{upload_id}", role="annotator").json()
    for offset in range(PIECE, len(data), PIECE):
        assert send(api, upload_id, data, offset).status_code == 200
    made = complete(api, upload_id)
    whole = api.upload(data, subject="killed")

    assert shown["offset_bytes"] == PIECE
    assert (made.status_code, whole.status_code) == (201, 200)
    assert made.json() == whole.json()


def test_bytes_that_the_disk_lost_are_asked_for_again(api, scans):
    data = other(scans, b"lost")
    upload_id = begun(api, data).json()["id"]
    send(api, upload_id, data, 0)
    os.truncate(bytes_of(api, upload_id), 100)

    response = send(api, upload_id, data, PIECE)
    right = send(api, upload_id, data, 100)

    assert (response.status_code, response.json()["offset_bytes"]) == (409, 100)
    assert right.json()["offset_bytes"] == 100 + PIECE


def test_a_file_that_is_not_the_announced_one_begins_anew(api, scans):
    data = other(scans, b"flipped")
    upload_id = begun(api, data, subject="flipped").json()["id"]
    send_all(api, upload_id, data)
    with bytes_of(api, upload_id).open("r+b") as file:
        file.seek(5000)
        (byte,) = file.read(1)
        file.seek(5000)
        file.write(bytes([byte ^ 1]))

    refused = complete(api, upload_id)
    shown = api("GET", f"/uploads/{upload_id}", role="annotator").json()
    send_all(api, upload_id, data)
    made = complete(api, upload_id)

    assert (refused.status_code, refused.json()["code"]) == (422, "digest_mismatch")
    assert (shown["state"], shown["offset_bytes"]) == ("open", 0)
    assert made.status_code == 201


def test_the_same_digest_with_another_size_is_refused(api, scans):
    data = other(scans, b"sizes")
    begun(api, data)

    response = api(
        "POST", "/uploads", role="annotator", json={**announced(data), "size_bytes": len(data) + 1}
    )

    assert (response.status_code, response.json()["code"]) == (422, "digest_mismatch")


def test_a_bad_scan_is_refused_as_in_one_body_and_leaves_nothing(api):
    data = b"this is a letter, not a scan" * 500
    before = api.counts()
    upload_id = begun(api, data).json()["id"]
    send_all(api, upload_id, data)

    refused = complete(api, upload_id)

    assert (refused.status_code, refused.json()["code"]) == (422, "not_a_scan")
    assert api.counts() == before
    assert complete(api, upload_id).status_code == 404


def test_a_reader_that_could_not_work_may_be_asked_again(api, scans, monkeypatch):
    """What is no fault of the file keeps the file: it need not be sent again."""
    data = other(scans, b"again")
    upload_id = begun(api, data, subject="again").json()["id"]
    send_all(api, upload_id, data)

    def fail(*_args, **_how):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("service.volumes.sandbox.run_intake", fail)
        refused = complete(api, upload_id)
    made = complete(api, upload_id)

    assert (refused.status_code, refused.json()["code"]) == (507, "insufficient_storage")
    assert made.status_code == 201


def test_one_request_at_a_time_holds_an_upload(api, scans):
    data = other(scans, b"busy")
    upload_id = begun(api, data).json()["id"]

    with api.store.draft(upload_id):
        answers = [
            send(api, upload_id, data, 0),
            complete(api, upload_id),
            api("DELETE", f"/uploads/{upload_id}", role="annotator"),
        ]
    free = send(api, upload_id, data, 0)

    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (409, "upload_busy")
        assert int(answer.headers["retry-after"]) > 0
    assert free.status_code == 200


def test_a_piece_that_breaks_off_leaves_the_upload_where_it_was(api, scans):
    data = other(scans, b"broken off")
    upload_id = begun(api, data).json()["id"]
    send(api, upload_id, data, 0)
    piece = data[PIECE : 2 * PIECE]
    headers = headers_of(piece, PIECE, len(data)) | {
        "Authorization": f"Bearer {api.tokens['annotator']}"
    }
    messages = [
        {"type": "http.request", "body": piece[:1000], "more_body": True},
        {"type": "http.disconnect"},
    ]
    path = f"/api/v1/uploads/{upload_id}"
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "PUT",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "state": {},
        "headers": [(name.lower().encode(), text.encode()) for name, text in headers.items()],
    }  # fmt: skip

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def ignore(_message):
        pass

    asyncio.run(api.app(scope, receive, ignore))

    assert bytes_of(api, upload_id).stat().st_size == PIECE
    assert send(api, upload_id, data, PIECE).status_code == 200


def test_an_upload_that_is_given_up_leaves_nothing(api, scans):
    before = api.counts()
    data = other(scans, b"given up")
    upload_id = begun(api, data).json()["id"]
    send(api, upload_id, data, 0)
    assert api.counts() != before

    gone = api("DELETE", f"/uploads/{upload_id}", role="annotator")

    assert gone.status_code == 204
    assert api.counts() == before
    assert api("GET", f"/uploads/{upload_id}").status_code == 404


def test_a_deleted_volume_takes_its_upload_along(api, scans):
    data = other(scans, b"deleted volume")
    upload_id = begun(api, data, subject="deleted").json()["id"]
    send_all(api, upload_id, data)
    volume_id = complete(api, upload_id).json()["id"]

    assert api("DELETE", f"/volumes/{volume_id}").status_code == 204
    assert complete(api, upload_id).status_code == 404
    assert begun(api, data, subject="deleted").json()["state"] == "open"


def test_announcements_over_the_limits_are_refused(serve):
    small = serve(max_upload_bytes=1000)
    large = begun(small, bytes(1001))
    fits = begun(small, bytes(1000))
    small.store.min_free_bytes = 2**60
    full = begun(small, bytes(999))
    no_room = send(small, fits.json()["id"], bytes(1000), 0)

    assert (large.status_code, large.json()["code"]) == (413, "request_too_large")
    assert fits.status_code == 201
    assert (full.status_code, full.json()["code"]) == (507, "insufficient_storage")
    assert (no_room.status_code, no_room.json()["code"]) == (507, "insufficient_storage")


def test_the_bytes_are_on_the_disk_before_the_row_says_so(api, scans, monkeypatch):
    data = other(scans, b"order")
    upload_id = begun(api, data).json()["id"]
    seen: list[str] = []
    fsync, advance = os.fsync, uploads.Appending._advance

    def traced_fsync(descriptor):
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def traced_advance(self, received):
        seen.append("row")
        advance(self, received)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(uploads.Appending, "_advance", traced_advance)
    send(api, upload_id, data, 0)
    send(api, upload_id, data, PIECE)

    assert seen == ["bytes", upload_id, "uploads", "row", "bytes", "row"]


def test_a_disk_that_fills_up_is_507_and_costs_no_piece(serve, scans, tmp_path):
    """T-D3, on a real file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        full = serve()
        full.store.uploads = disk
        data = os.urandom(6 << 20)
        upload_id = begun(full, data).json()["id"]
        first = send(full, upload_id, data, 0, 3 << 20)
        second = send(full, upload_id, data, 3 << 20, 3 << 20)
        shown = full("GET", f"/uploads/{upload_id}", role="annotator").json()
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        third = send(full, upload_id, data, 3 << 20, 3 << 20)
    finally:
        subprocess.run(["umount", disk], check=True)

    assert (first.status_code, third.status_code) == (200, 200)
    assert (second.status_code, second.json()["code"]) == (507, "insufficient_storage")
    assert shown["offset_bytes"] == 3 << 20


def test_stale_uploads_are_swept_and_fresh_ones_are_not(api, scans):
    data = [other(scans, text) for text in (b"stale", b"fresh", b"held")]
    stale, fresh, held = (begun(api, one).json()["id"] for one in data)
    for upload_id, one in zip((stale, fresh, held), data, strict=True):
        send(api, upload_id, one, 0)
    orphan = api.store.uploads / "upl_orphan"
    orphan.mkdir()
    os.utime(orphan, (0, 0))
    with api.sessions() as session:
        for upload_id in (stale, held):
            row = session.get(db.Upload, upload_id)
            row.updated_at = db.db_now(-7200.0)
        session.commit()
        with api.store.draft(held):
            uploads.sweep(session, api.store, older_than_s=3600.0)

    left = {path.name for path in api.store.uploads.iterdir()}
    assert {stale, "upl_orphan"} & left == set()
    assert {fresh, held} <= left
    assert api("GET", f"/uploads/{stale}").status_code == 404
    assert api("GET", f"/uploads/{fresh}").status_code == 200
