"""A segmentation's formats: asked for, downloaded, or refused with the reason on record."""

import pytest

from service.client import Client
from service.runs import NewArtifact

SHA = "ab" * 32
CERTIFICATE = {
    "format": "dicom-seg",
    "readers": ["a reader 1.0"],
    "shape": [32, 32, 16],
    "affine": [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0] * 3 + [1.0]],
    "mapping": "identity",
    "max_corner_error_mm": 0.0,
    "num_labelled": 5000,
    "voxels": {"liver": 5000},
    "sha256": SHA,
}
RESULT = {
    "labels": [{"name": "liver", "value": 1, "voxels": 5000, "volume_ml": 1450.5}],
    "volumes_ml": {"liver": 1450.5},
    "voxels": {"liver": 5000},
    "lesions": {
        "liver": {
            "num": 1,
            "largest": [
                {
                    "voxels": 5000,
                    "volume_ml": 1450.5,
                    "longest_mm": 180.5,
                    "centroid_mm": [60.0, -14.5, 1033.0],
                }
            ],
        }
    },
    "removed_voxels": {"liver": 3},
    "filled_voxels": {"liver": 0},
    "provider": "CPUExecutionProvider",
    "certificate": {**CERTIFICATE, "format": "nifti"},
    "files": [
        {
            "format": "dicom-seg",
            "media_type": "application/dicom",
            "sha256": SHA,
            "size_bytes": 3,
            "certificate": CERTIFICATE,
            "notes": [],
        }
    ],
    "not_made": [{"format": "rtstruct", "code": "nothing_found", "detail": "no label has a voxel"}],
    "timings_s": {"model": 0.5},
}


def stored(api, name: str, data: bytes, media_type: str) -> NewArtifact:
    with api.store.receive() as writer:
        writer.write(data)
        sha256, size = api.store.commit_blob(writer)
    return NewArtifact(name, sha256, size, media_type)


@pytest.fixture
def done(api, world) -> str:
    """A segmentation with a NIfTI mask and a SEG, without an RTSTRUCT."""
    body = {"volume_id": world.zipped, "model": world.segmenter}
    made = str(api("POST", "/segmentations", json=body).json()["id"])
    artifacts = (
        stored(api, "mask.nii.gz", b"mask " + made.encode(), "application/gzip"),
        stored(api, "seg.dcm", b"seg " + made.encode(), "application/dicom"),
    )
    api.work(made, result=RESULT, artifacts=artifacts)
    return made


@pytest.mark.parametrize(
    ("query", "start", "suffix", "media_type"),
    [
        ("", b"mask ", ".nii.gz", "application/octet-stream"),
        ("?format=nifti", b"mask ", ".nii.gz", "application/octet-stream"),
        ("?format=dicom-seg", b"seg ", ".seg.dcm", "application/dicom"),
    ],
)
def test_a_mask_is_downloaded_in_its_formats(api, done, query, start, suffix, media_type):
    response = api("GET", f"/segmentations/{done}/mask{query}")

    assert response.status_code == 200
    assert response.content == start + done.encode()
    assert f'filename="{done}{suffix}"' in response.headers["content-disposition"]
    assert response.headers["content-type"] == media_type
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("form", "reason"), [("rtstruct", "nothing_found"), ("dicom-sr", "not_asked")]
)
def test_a_format_that_there_is_not_is_refused_with_the_reason(api, done, form, reason):
    response = api("GET", f"/segmentations/{done}/mask?format={form}")

    problem = response.json()
    assert (response.status_code, problem["code"]) == (409, "format_not_made")
    assert problem["reason"] == reason
    assert form in problem["detail"]


def test_an_unknown_format_is_an_invalid_request(api, done):
    response = api("GET", f"/segmentations/{done}/mask?format=stl")

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_the_result_shows_its_files_with_certificates(api, done):
    found = api("GET", f"/segmentations/{done}").json()["result"]

    assert {name: found[name] for name in RESULT} == RESULT


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ["dicom-seg", "dicom-sr"]),
        ({"formats": []}, []),
        ({"formats": ["rtstruct"]}, ["rtstruct"]),
    ],
)
def test_the_run_keeps_which_formats_were_asked_for(api, world, asked, expected):
    from service import runs

    body = {"volume_id": world.zipped, "model": world.segmenter, **asked}

    made = api("POST", "/segmentations", json=body).json()["id"]

    with api.sessions() as session:
        assert runs.get(session, made).spec["formats"] == expected


@pytest.mark.parametrize("formats", [["nifti"], ["stl"], ["rtstruct", "rtstruct"], "rtstruct"])
def test_formats_that_make_no_sense_are_refused(api, world, formats):
    before = api.counts()
    body = {"volume_id": world.zipped, "model": world.segmenter, "formats": formats}

    response = api("POST", "/segmentations", json=body)

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert api.counts() == before


def test_an_embedding_has_no_formats(api, world):
    body = {"volume_id": world.zipped, "model": world.encoder, "formats": ["rtstruct"]}

    assert api("POST", "/embeddings", json=body).status_code == 422


def test_the_client_asks_for_a_format_and_saves_it(api, done, world, monkeypatch, tmp_path):
    client = Client("http://testserver", api.tokens["annotator"])
    monkeypatch.setattr(client, "_http", _Routed(api))

    client.download_mask(done, tmp_path / "mask.dcm", format="dicom-seg")
    made = client.segment(world.zipped, "segmenter", formats=["rtstruct"], wait=False)

    assert (tmp_path / "mask.dcm").read_bytes() == b"seg " + done.encode()
    with api.sessions() as session:
        from service import runs

        assert runs.get(session, made.id).spec["formats"] == ["rtstruct"]


def test_the_command_line_saves_the_format_that_it_was_asked_for(api, world, monkeypatch, tmp_path):
    import contextlib
    import threading

    from typer.testing import CliRunner

    from service import cli, cli_client

    client = Client("http://testserver", api.tokens["annotator"])
    monkeypatch.setattr(client, "_http", _Routed(api))
    monkeypatch.setattr(cli_client, "talk", lambda *_: contextlib.nullcontext(client))
    done = threading.Event()

    def queued() -> set[str]:
        found = api("GET", "/segmentations?state=queued&page_size=500").json()["items"]
        return {run["id"] for run in found}

    left_by_others = queued()

    def work() -> None:
        while not done.wait(0.05):
            for run_id in queued() - left_by_others:
                seg = stored(api, "seg.dcm", b"the seg", "application/dicom")
                api.work(run_id, result=RESULT, artifacts=(seg,))
                return

    worker = threading.Thread(target=work)
    worker.start()
    command = ["segment", world.zipped, "--model", "segmenter", "--mask", str(tmp_path / "m.dcm")]
    ended = CliRunner().invoke(cli.app, [*command, "--format", "dicom-seg", "--token", "t"])
    done.set()
    worker.join()

    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "m.dcm").read_bytes() == b"the seg"


class _Routed:
    """The client's connection, to the app in this process."""

    def __init__(self, api) -> None:
        self._http = api.http
        self._headers = {"Authorization": f"Bearer {api.tokens['annotator']}"}

    def _how(self, how):
        return {**how, "headers": {**self._headers, **(how.get("headers") or {})}}

    def request(self, method, path, **how):
        return self._http.request(method, f"/api/v1/{path}", **self._how(how))

    def stream(self, method, path, **how):
        return self._http.stream(method, f"/api/v1/{path}", **self._how(how))

    def close(self) -> None:
        pass
