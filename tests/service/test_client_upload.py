"""The client's upload when the service answers and refuses every piece."""

from __future__ import annotations

import httpx
import pytest

from service import client_upload
from service.answers import ApiError


@pytest.mark.parametrize("code", ["digest_mismatch", "upload_busy"])
def test_a_piece_that_is_refused_again_and_again_ends_the_upload(tmp_path, monkeypatch, code):
    monkeypatch.setattr(client_upload, "_PAUSE_S", 0.05)
    path, asked = tmp_path / "scan", []
    path.write_bytes(bytes(100))
    shown = {
        "id": "upl_" + "0" * 32, "state": "open", "kind": "image", "size_bytes": 100,
        "offset_bytes": 0, "chunk_bytes": 50, "sha256": "0" * 64, "volume_id": None,
        "subject": None, "series_uid": None,
        "created_at": "2026-11-25T00:00:00Z", "expires_at": "2026-11-26T00:00:00Z",
    }  # fmt: skip

    def send(method: str, address: str, **_: object) -> httpx.Response:
        asked.append(method)
        if method == "PUT":
            raise ApiError(409, code, "no")
        return httpx.Response(200, json=shown)

    with pytest.raises(ApiError, match="no"):
        client_upload.send_in_pieces(
            send, path, {"kind": "image"}, patience_s=0.4, complete_timeout=httpx.Timeout(1.0)
        )

    assert 2 <= asked.count("PUT") < 10
