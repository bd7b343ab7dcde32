"""No identifier anywhere but where it was sent: planted tokens through the real service (T-P1).

Tokens stand in every place in which a site sends a patient's name by design or by mistake. They go
through an API, workers and upkeep of their own, in uploads that succeed and that fail, datasets, a
training, a segmentation, and requests that are wrong. Then every file of the data folder, every
row, every queue, every answer, and the command lines of all processes are searched.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pydicom
import pytest
import redis
from pydicom.dataset import Dataset
from sqlalchemy import MetaData, select
from starlette.testclient import TestClient
from typer.testing import CliRunner

from imaging import phantom, phantom_dicom
from imaging.dicom_header import patient_key, quiet
from service import auth, client_upload, db, migrate
from service.app import create_app
from service.auth import Role
from service.cli import app as cli
from service.client import Client
from service.client import scans as client_module
from service.settings import Settings
from service.stack import Stack

SHAPE, SPACING_MM = (48, 48, 32), (8.0, 8.0, 9.0)
FINETUNE = {
    "labels": {"liver": 1, "tumour": 2},
    "network": {"base_width": 2},
    "preprocessing": {"spacing_mm": [8.0, 8.0, 9.0]},
    "patch_size": [16, 16, 16],
    "num_steps": 2,
    "batch_size": 2,
    "validate_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
}
IN_DICOM = (
    "patient_name", "patient_id", "accession", "institution", "private", "nested", "overlay",
    "invalid_vr", "comments", "preamble", "file_meta", "text_without_rule",
)  # fmt: skip
IN_ZIP = ("member_name", "member_text", "zip_comment", "member_extra")
IN_NIFTI = ("gzip_name", "descrip", "aux_file", "db_name", "intent_name", "extension", "tail")
IN_REQUESTS = ("query", "header", "json_value", "json_name", "bearer", "path", "file_name", "body")
TOKENS = {
    name: f"CNRY{number:02d}ZQ"
    for number, name in enumerate((*IN_DICOM, *IN_ZIP, *IN_NIFTI, *IN_REQUESTS))
} | {
    "birth_date": "19310213",
    "study_date": "20170819",
    "series_uid": "1.2.826.0.1.47110815.1",
    "instance_uid": "1.2.826.0.1.47110815.2",
}
BY_DESIGN_IN_OWN_ANSWER = {"path"}
"""A problem's `instance` is the address that its caller asked for (RFC 9457)."""


def traces(token: str) -> list[bytes]:
    """What gives a token away: it in any case or encoding, and a hash that can be guessed again."""
    text = token.encode()
    return [
        *(text, text.lower(), token.encode("utf-16-le"), text.hex().encode()),
        base64.b64encode(text * 3)[4:-4],
        hashlib.sha256(text).hexdigest().encode(),
        patient_key(token).encode(),
    ]


TRACES = {name: traces(token) for name, token in TOKENS.items()}


def unpacked(data: bytes) -> Iterator[bytes]:
    """The bytes, and what they hold packed."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield from unpacked(archive.read(name))


def hits(data: bytes) -> set[str]:
    """Names of the tokens that are in some bytes."""
    return {
        name
        for part in unpacked(data)
        for name, found in TRACES.items()
        if any(trace in part for trace in found)
    }


@dataclass
class Searched:
    """What was found, and where."""

    found: dict[str, set[str]] = field(default_factory=dict)
    num_bytes: int = 0

    def look(
        self, place: str, data: bytes, *, but: frozenset[str] | set[str] = frozenset()
    ) -> None:
        self.num_bytes += len(data)
        if names := hits(data) - but:
            self.found.setdefault(place, set()).update(names)

    def look_in_folder(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            self.look(f"name of {path.relative_to(folder)}", str(path).encode())
            if path.is_file():
                self.look(f"file {path.relative_to(folder)}", path.read_bytes())

    def look_in_database(self, url: str) -> None:
        engine = db.connect(url)
        tables = MetaData()
        tables.reflect(engine)
        assert len(tables.tables) > 10
        with engine.connect() as connection:
            for table in tables.sorted_tables:
                for row in connection.execute(select(table)):
                    self.look(f"table {table.name}", repr(tuple(row)).encode())
        engine.dispose()

    def look_in_redis(self, url: str) -> None:
        with redis.Redis.from_url(url) as client:
            for key in client.scan_iter():
                self.look(f"redis {key!r}", bytes(key) + (client.dump(key) or b""))


class Watch:
    """Command lines and environments of all processes but this one, seen twenty times a second."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for process in Path("/proc").iterdir():
                if process.name.isdecimal() and process.name != str(
                    threading.main_thread().native_id
                ):
                    for name in ("cmdline", "environ"):
                        try:
                            self.seen.add((process / name).read_bytes())
                        except OSError:
                            continue


# --- what is sent


@dataclass(frozen=True)
class Planted:
    """Files with tokens in them."""

    series: Path
    burned_in: Path
    cut: Path
    two_series: Path
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    garbage: Path


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp(f"{TOKENS['file_name']}-sent")
    made = [phantom.make(seed, shape=SHAPE, spacing_mm=SPACING_MM) for seed in range(3)]
    slices = [
        _slice(path, number)
        for number, path in enumerate(
            phantom_dicom.write_dicom_series(made[2].volume, folder / "s", seed=2)
        )
    ]
    other = phantom_dicom.write_dicom_series(made[1].volume, folder / "o", seed=1)
    pairs = [
        (_nifti(folder, f"i{n}", one.volume.voxels, one), one) for n, one in enumerate(made[:2])
    ]
    burned = [_slice_bytes(data, BurnedInAnnotation="YES") for data in slices]
    garbage = folder / "garbage"
    garbage.write_bytes(f"a letter about {TOKENS['body']}".encode())
    return Planted(
        series=_zip(folder / f"{TOKENS['file_name']}.zip", slices),
        burned_in=_zip(folder / "burned.zip", burned),
        cut=_zip(folder / "cut.zip", [data[: len(data) // 2] for data in slices]),
        two_series=_zip(folder / "two.zip", [*slices, *(path.read_bytes() for path in other)]),
        images=tuple(path for path, _ in pairs),
        labels=tuple(_nifti(folder, f"l{n}", one.labels, one) for n, (_, one) in enumerate(pairs)),
        garbage=garbage,
    )


def _slice(path: Path, number: int) -> bytes:
    with quiet():
        image = pydicom.dcmread(path)
        image.PatientName, image.PatientID = TOKENS["patient_name"], TOKENS["patient_id"]
        image.PatientBirthDate, image.StudyDate = TOKENS["birth_date"], TOKENS["study_date"]
        image.AccessionNumber, image.InstitutionName = TOKENS["accession"], TOKENS["institution"]
        image.PatientComments = f"{TOKENS['comments']} wrote this"
        image.SeriesInstanceUID = TOKENS["series_uid"]
        image.SOPInstanceUID = f"{TOKENS['instance_uid']}.{number}"
        image.WindowCenterWidthExplanation = TOKENS["text_without_rule"]
        image.private_block(0x0029, "ACME", create=True).add_new(1, "LO", TOKENS["private"])
        inner, outer = Dataset(), Dataset()
        inner.TextValue = TOKENS["nested"]
        outer.DerivationCodeSequence = [inner]
        image.SourceImageSequence = [outer]
        image.add_new(0x60000022, "LO", TOKENS["overlay"])
        image.add_new("KVP", "LO", TOKENS["invalid_vr"])
        image.file_meta.SourceApplicationEntityTitle = TOKENS["file_meta"]
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.preamble = TOKENS["preamble"].encode().ljust(128, b"\0")
        written = io.BytesIO()
        image.save_as(written)
    return written.getvalue()


def _slice_bytes(data: bytes, **attributes: str) -> bytes:
    with quiet():
        image = pydicom.dcmread(io.BytesIO(data))
        for keyword, value in attributes.items():
            setattr(image, keyword, value)
        written = io.BytesIO()
        image.save_as(written)
    return written.getvalue()


def _zip(path: Path, files: list[bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = TOKENS["zip_comment"].encode()
        archive.writestr("letter.txt", f"Dear {TOKENS['member_text']}")
        for number, data in enumerate(files):
            entry = zipfile.ZipInfo(f"{TOKENS['member_name']}/IM{number}")
            note = TOKENS["member_extra"].encode()
            entry.extra = b"\xfe\xca" + len(note).to_bytes(2, "little") + note
            archive.writestr(entry, data)
    return path


def _nifti(folder: Path, name: str, voxels: np.ndarray, made: phantom.Phantom) -> Path:
    image = nib.nifti1.Nifti1Image(voxels, made.volume.affine)
    image.header.set_xyzt_units("mm")
    for token in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[token] = TOKENS[token].encode()
    note = nib.nifti1.Nifti1Extension("comment", TOKENS["extension"].encode())
    image.header.extensions.append(note)
    path = folder / f"{TOKENS['file_name']}_{name}.nii.gz"
    with (
        path.open("wb") as raw,
        gzip.GzipFile(f"{TOKENS['gzip_name']}.nii", "wb", 4, raw, mtime=0) as packed,
    ):
        packed.write(image.to_bytes() + TOKENS["tail"].encode())
    return path


def test_the_search_sees_every_token_where_it_was_planted(planted: Planted) -> None:
    sent = Searched()
    for path in (planted.series, *planted.images, *planted.labels, planted.garbage):
        sent.look("sent", str(path).encode() + b"\n" + path.read_bytes())
        sent.look("sent", path.read_bytes())

    names = set(IN_DICOM) | set(IN_ZIP) | set(IN_NIFTI)
    names |= {"birth_date", "study_date", "series_uid", "instance_uid", "file_name", "body"}
    assert sent.found["sent"] == names
    assert len(TOKENS) >= 24


# --- the way through the service


@pytest.fixture(
    params=[
        pytest.param("embedded", marks=pytest.mark.nightly),
        pytest.param("servers", marks=pytest.mark.services),
    ]
)
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    servers = {}
    if request.param == "servers":
        servers = {
            "database_url": request.getfixturevalue("postgres_url"),
            "broker_url": request.getfixturevalue("redis_url"),
        }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(
        data_dir=tmp_path / "data",
        port=port,
        device="cpu",
        train_threads=1,
        inference_threads=1,
        min_free_bytes=0,
        log_level="DEBUG",
        **servers,
    )
    with Stack(settings) as started:
        yield started


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_planted_token_is_found_anywhere(
    stack: Stack, planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = Searched()
    token = str(stack.admin_token)

    with Watch() as processes:
        _send_what_is_wrong(stack.url, token, planted, searched)
        _work(stack.url, token, planted, searched, tmp_path, monkeypatch)
    if "redis" in stack.settings.broker_url:
        searched.look_in_redis(stack.settings.broker_url)
    searched.look_in_database(stack.settings.database_url)
    stack.stop()
    searched.look_in_folder(stack.settings.data_dir)
    for seen in processes.seen:
        searched.look("a process", seen)

    assert searched.found == {}
    assert searched.num_bytes > 2_000_000
    logs = b"".join(path.read_bytes() for path in stack.log_dir.iterdir())
    assert b"/api/v1/volumes" in logs
    assert any(b"imaging.forkserver" in seen for seen in processes.seen)


def _send_what_is_wrong(url: str, token: str, planted: Planted, searched: Searched) -> None:
    """Requests with tokens where callers put them by mistake; each must be refused."""
    headers = {
        "Authorization": f"Bearer {token}",
        "User-Agent": TOKENS["header"],
        "X-Request-Id": TOKENS["header"],
        "Referer": f"http://viewer/{TOKENS['header']}",
        "X-Patient": TOKENS["header"],
        "Cookie": f"patient={TOKENS['header']}",
    }
    body = {"Content-Type": "application/octet-stream"}
    value, name = TOKENS["json_value"], TOKENS["json_name"]
    with httpx.Client(base_url=f"{url}/api/v1", headers=headers, timeout=120.0) as http:
        answers = [
            http.post("/volumes", content=planted.burned_in.read_bytes(), headers=body),
            http.post("/volumes", content=planted.cut.read_bytes(), headers=body),
            http.post("/volumes", content=planted.two_series.read_bytes(), headers=body),
            http.post("/volumes", content=planted.garbage.read_bytes(), headers=body),
            http.post("/volumes?kind=labels", content=planted.series.read_bytes(), headers=body),
            http.post(f"/volumes?subject={TOKENS['query']} x", content=b"x", headers=body),
            http.post(f"/volumes?series_uid={TOKENS['query']}", content=b"x", headers=body),
            http.get(f"/volumes?kind={TOKENS['query']}"),
            http.get(f"/volumes?page_token={TOKENS['query']}"),
            http.post("/datasets", json={"name": "d", "items": [{"volume_id": value}]}),
            http.post("/datasets", json={"name": "d", name: value, "items": []}),
            http.post("/datasets", content=f'{{"{name}": "{value}', headers=body),
            http.post("/runs", json={"kind": value, "recipe": {name: value}, "model_name": "m"}),
            http.post("/segmentations", json={"volume_id": value, "model": f"models:/{value}@x"}),
            http.post("/segmentations", json={"volume_id": f"vol_{value}", "model": value}),
            http.get(f"/models/{TOKENS['path']}"),
            http.get(f"/models/{TOKENS['path']}/versions/1"),
            http.get(f"/volumes/{TOKENS['path']}"),
            http.get(f"/{TOKENS['path']}"),
            http.get("/volumes", headers={"Authorization": f"Bearer {TOKENS['bearer']}"}),
            http.get("/volumes", headers={"Authorization": TOKENS["bearer"]}),
        ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, (answer.url, answer.text)
        _look_at_answer(answer, searched)
    codes = [answer.json()["code"] for answer in answers[:4]]
    assert codes[0] == "burned_in_annotation"
    assert codes[2] == "several_series"


def _look_at_answer(answer: httpx.Response, searched: Searched) -> None:
    sent = str(answer.request.url.path)
    data = repr(answer.headers.multi_items()).encode() + answer.content
    searched.look(f"answer to {sent}", data, but=BY_DESIGN_IN_OWN_ANSWER)


def _work(
    url: str,
    token: str,
    planted: Planted,
    searched: Searched,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uploads, a dataset, a training, a segmentation, and every file that comes out."""
    runner = CliRunner(env={"PCRL_URL": url, "PCRL_TOKEN": token})

    def run_cli(*arguments: str) -> str:
        result = runner.invoke(cli, list(arguments))
        assert result.exit_code == 0, result.output
        searched.look(f"output of {arguments[0]}", result.output.encode())
        return str(result.stdout.strip())

    refused = runner.invoke(cli, ["upload", str(planted.burned_in)])
    assert "burned_in_annotation" in refused.output
    searched.look("output of a refused upload", refused.output.encode())
    pairs = []
    for number, (image, labels) in enumerate(zip(planted.images, planted.labels, strict=True)):
        image_id = run_cli("upload", str(image), "--subject", f"p{number}")
        labels_id = run_cli("upload", str(labels), "--kind", "labels", "--subject", f"p{number}")
        pairs.append(f"{image_id}:{labels_id}")
    series_id = run_cli("upload", str(planted.series))
    dataset = run_cli("dataset", "create", "canary", *pairs)
    (tmp_path / "finetune.json").write_text(json.dumps(FINETUNE))
    run_cli(
        *("finetune", str(tmp_path / "finetune.json"), "--dataset", dataset, "--model", "liver"),
    )
    found = run_cli("segment", series_id, "--model", "liver", "--mask", str(tmp_path / "m.nii.gz"))
    assert "volumes_ml" in found

    monkeypatch.setattr(client_module, "PIECES_FROM_BYTES", 1000)
    monkeypatch.setattr(client_upload, "PATIENCE_S", 30.0, raising=False)
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": TOKENS["header"]}
    with Client(url, token) as client:
        again = client.upload(planted.series)
        assert again.id == series_id  # the same file, in pieces
        one = client.upload(planted.two_series, series_uid=TOKENS["series_uid"])
        assert one.subject == again.subject
        assert one.id != again.id
    with httpx.Client(base_url=f"{url}/api/v1", headers=headers, timeout=120.0) as http:
        asked = {"volume_id": series_id, "model": "liver"}
        first = http.post("/segmentations", json=asked, headers={"Prefer": "wait=60"})
        repeat = http.post("/segmentations", json=asked)
        assert repeat.json()["id"] == first.json()["id"]
        made = first.json()["id"]
        kept = http.get(f"/volumes/{series_id}/file?format=original")
        with zipfile.ZipFile(io.BytesIO(kept.content)) as archive:
            assert len(archive.namelist()) == SHAPE[2]
        runs = http.get("/runs").json()["items"]
        paths = [
            *("/volumes", "/datasets", "/runs", "/models", "/segmentations", "/capabilities"),
            *(f"/volumes/{series_id}", f"/volumes/{series_id}/file", f"/datasets/{dataset}"),
            *(f"/segmentations/{made}/mask", f"/segmentations/{made}/preview"),
            "/models/liver/versions/1/bundle",
        ]
        answers = [first, repeat, kept, *(http.get(path) for path in paths)]
        events = {"Accept": "application/json"}
        for run in runs:
            answers.append(http.get(f"/runs/{run['id']}/events", headers=events))
            answers.append(http.get(f"/runs/{run['id']}/metrics"))
        answers += [http.get(f"{url}/readyz"), http.get(f"{url}/healthz")]
    for answer in answers:
        assert answer.status_code < 400, (answer.url, answer.text)
        _look_at_answer(answer, searched)


# --- the negative control


def test_without_de_identification_the_same_search_finds_what_was_sent(
    planted: Planted, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data", min_free_bytes=0, deidentify=False)
    migrate.upgrade(settings.database_url)
    app = create_app(settings)
    with TestClient(app) as http:
        with app.state.sessions() as session:
            _, token = auth.create_token(session, "t", Role.ANNOTATOR)
            session.commit()
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/octet-stream",
        }
        for path in (planted.series, planted.images[0]):
            answer = http.post("/api/v1/volumes", content=path.read_bytes(), headers=headers)
            assert answer.status_code == 201, answer.text

    kept = Searched()
    kept.look_in_folder(settings.data_dir / "store")
    rows = Searched()
    rows.look_in_database(settings.database_url)

    assert set.union(*kept.found.values()) >= {*IN_DICOM, *IN_ZIP, *IN_NIFTI, "birth_date"}
    assert rows.found == {"table volume": {"series_uid", "instance_uid"}}
