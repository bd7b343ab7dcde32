"""Health, metrics, quotas, placement, verified downloads and idempotency under load."""

import base64
import hashlib
import io
import logging
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, func, select, update

from service import db, quota, retention, runs
from service.queue import Able
from service.routers import files
from service.settings import Settings
from service.storage import Store

HEX = "0" * 32


@pytest.fixture
def own(serve, scans):
    """An app of the test's own, with a volume and a dataset: `own(**settings)`."""

    def start(**settings):
        api = serve(**settings)
        volume = api.upload(scans.nifti, subject="s1").json()["id"]
        body = {"name": "d", "items": [{"volume_id": volume, "split": "train"}]}
        api.dataset = api("POST", "/datasets", json=body).json()["id"]
        api.volume = volume
        return api

    return start


def training(api, **more):
    body = {"kind": "pretrain", "dataset_id": api.dataset, "model_name": "m", "recipe": {}, **more}
    return body


def alive(api, *queues, ago_s=0.0, **columns):
    with api.sessions() as session:
        session.execute(delete(db.WorkerHeartbeat))
        for queue in queues:
            row = {"worker": f"h:1:{queue}", "queue": queue, "device": "cpu", **columns}
            session.add(db.WorkerHeartbeat(**row, seen_at=db.db_now(-ago_s)))
        session.commit()


def failed(api):
    answer = api("GET", "/readyz", role=None)
    checks = {check["check"]: check["result"] for check in answer.json()["checks"]}
    assert answer.status_code == (200 if "failed" not in checks.values() else 503)
    return {name for name, result in checks.items() if result == "failed"}


def test_t_o4_readyz_turns_with_each_thing_that_is_missing_and_healthz_never(own, monkeypatch):
    api = own(queued_limit_s=60.0)
    alive(api, "train", "inference")
    assert failed(api) == set()  # the control

    alive(api, "inference")
    assert failed(api) == {"worker:train"}
    alive(api, "train", "inference", ago_s=10.1)
    assert failed(api) == {"worker:train", "worker:inference"}
    alive(api, "train", "inference")
    monkeypatch.setattr(Store, "free_bytes", lambda _self: -1)
    assert failed(api) == {"disk"}
    monkeypatch.undo()
    with monkeypatch.context() as full:
        full.setattr("pathlib.Path.write_bytes", _no_space)
        assert failed(api) == {"storage"}
    api.sessions.kw["bind"].dispose()
    database = api.settings.data_dir / "pcrl.sqlite3"
    away = database.with_suffix(".away")
    database.rename(away)
    database.mkdir()
    assert "database" in failed(api)
    assert api("GET", "/healthz", role=None).status_code == 200
    database.rmdir()
    away.rename(database)
    assert failed(api) == set()


def _no_space(*_args):
    raise OSError(28, "No space left on device")


def test_t_o4_a_queue_that_stands_still_turns_readyz_and_one_that_works_does_not(own):
    api = own(queued_limit_s=60.0)
    alive(api, "train", "inference", memory_bytes=2**30)
    with api.sessions() as session:
        old = runs.create(session, kind="segment", spec={}, principal="t")
        waits = runs.create(session, kind="segment", spec={}, principal="t", needs=Able("cuda"))
        session.execute(update(db.Run).values(created_at=db.db_now(-100.0)))
        session.commit()
    assert failed(api) == {"queue:inference"}

    with api.sessions() as session:
        lease = runs.claim(session, None, "inference", "w", able=Able("cpu", 2**30))
        assert lease.run_id == old.id
    assert failed(api) == set()  # a worker is at it, and what waits needs a GPU that nobody has
    with api.sessions() as session:
        runs.finish(session, lease, db.RunState.FAILED, outcome="error")
        assert runs.get(session, waits.id).state == "queued"
    assert failed(api) == set()


def test_metrics_tell_of_queues_runs_workers_disk_and_requests(own, new_model):
    api = own()
    alive(api, "train", device_kind="cuda", memory_bytes=100, used_bytes=40)
    made = api("POST", "/runs", json=training(api)).json()["id"]
    api("GET", f"/runs/{made}")
    api("GET", f"/runs/run_{HEX}")

    first = api.http.get("/metrics", headers=_bearer(api)).text
    with api.sessions() as session:
        lease = runs.claim(session, None, "train", "w")
        result = {"timings_s": {"infer": 2.0}, "model_was_resident": False}
        runs.finish(session, lease, db.RunState.SUCCEEDED, outcome="done", result=result)
    second = api.http.get("/metrics", headers=_bearer(api)).text
    third = api.http.get("/metrics", headers=_bearer(api)).text

    def has(text, line):
        return any(one.startswith(line) for one in text.splitlines())

    assert has(first, 'pcrl_runs{queue="train",state="queued"} 1.0')
    assert has(second, 'pcrl_runs{queue="train",state="queued"} 0.0')
    assert has(second, 'pcrl_run_attempts_total{kind="pretrain",outcome="done"} 1.0')
    for text in (second, third):  # each run is counted once
        assert has(text, 'pcrl_run_stage_seconds_count{kind="pretrain",stage="infer"} 1.0')
        assert has(text, 'pcrl_model_loads_total{how="cold"} 1.0')
    assert has(first, 'pcrl_gpu_memory_bytes{device="cpu",host="h",what="used"} 40.0')
    assert has(first, 'pcrl_worker_heartbeat_age_seconds{device="cpu",host="h",queue="train"}')
    assert has(first, "pcrl_disk_free_bytes ")
    line = 'pcrl_http_requests_total{method="GET",route="/api/v1/runs/{run_id}",status="404"} 1.0'
    assert has(first, line)
    assert has(first, 'pcrl_oldest_run_age_seconds{queue="train",what="queued"}')
    for secret in (made, api.volume, HEX, "s1"):  # no identifier in any label
        assert f'"{secret}"' not in third


def test_metrics_need_a_token_unless_they_are_open(own):
    api = own()
    assert api("GET", "/metrics", role=None).status_code == 401
    assert api("GET", "/metrics", role="viewer").status_code == 200
    opened = own(metrics_open=True)
    assert opened("GET", "/metrics", role=None).status_code == 200


def _bearer(api):
    return {"Authorization": f"Bearer {api.tokens['viewer']}"}


@pytest.mark.parametrize(("limit", "status"), [(1, 429), (0, 404)])
def test_a_batch_counts_against_the_quota_too(own, limit, status):
    """The second is the control: without a quota the model is looked for, and is not there."""
    api = own(max_queued=limit)
    assert api("POST", "/runs", json=training(api)).status_code == 202

    body = {"dataset_id": api.dataset, "model": "nobody", "kind": "segment"}
    refused = api("POST", "/batches", json=body)

    assert refused.status_code == status


def test_more_waiting_runs_than_the_quota_are_refused_and_leave_nothing(own):
    api = own(max_queued=2)
    for _ in range(2):
        assert api("POST", "/runs", json=training(api)).status_code == 202

    before = api.counts()
    key = {"Idempotency-Key": uuid.uuid4().hex}
    refused = api("POST", "/runs", json=training(api), headers=key)

    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert int(refused.headers["retry-after"]) > 0
    assert (refused.json()["found"], refused.json()["limit"]) == (2, 2)
    assert api.counts() == before
    assert api("POST", "/runs", role="researcher", json=training(api)).status_code == 429
    elsewhere = {"PCRL-Project": api("POST", "/projects", json={"name": "other"}).json()["id"]}
    passed = api("POST", "/runs", json=training(api), headers=elsewhere)
    assert passed.status_code == 404  # its quota is its own; the dataset is not there
    first = api("GET", "/runs").json()["items"][-1]["id"]
    api("POST", f"/runs/{first}:cancel")
    assert api("POST", "/runs", json=training(api), headers=key).status_code == 202


def test_more_stored_bytes_than_the_quota_are_refused(own, scans):
    api = own(max_stored_bytes=len(scans.nifti) + 10)

    again = api.upload(scans.zipped)
    announced = {"size_bytes": 10**6, "sha256": "0" * 64}
    pieces = api("POST", "/uploads", json=announced)

    assert (again.status_code, again.json()["code"]) == (429, "quota_exceeded")
    assert (pieces.status_code, pieces.json()["code"]) == (429, "quota_exceeded")
    more = {"max_stored_bytes": 10**9}
    assert api("PATCH", "/projects/prj_default", json=more).json()["max_stored_bytes"] == 10**9
    assert api("POST", "/uploads", json=announced).status_code == 201  # its own limit goes before


def wanted(data: bytes, **more) -> dict:
    return {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **more}


def limit_bytes(api, more: int) -> None:
    """Let the project keep `more` bytes than it has."""
    with api.sessions() as session:
        limit = quota.stored_bytes(session, "prj_default") + more
    changed = api("PATCH", "/projects/prj_default", json={"max_stored_bytes": limit})
    assert changed.status_code == 200


def test_uploads_that_were_begun_count_against_the_quota(own):
    """The third is the control: what was given up leaves room."""
    api = own()
    limit_bytes(api, 1500)

    begun = [api("POST", "/uploads", json=wanted(bytes([n]) * 1000)) for n in range(2)]
    again = api("POST", "/uploads", json=wanted(bytes([0]) * 1000))
    api("DELETE", f"/uploads/{begun[0].json()['id']}")
    third = api("POST", "/uploads", json=wanted(bytes([2]) * 1000))

    assert [one.status_code for one in (*begun, again, third)] == [201, 429, 200, 201]


def test_an_upload_is_not_completed_beyond_the_quota_and_stays(own, scans):
    api = own()
    data = scans.labels
    made = api("POST", "/uploads", json=wanted(data, kind="labels")).json()["id"]
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}",
        "Content-Digest": f"sha-256=:{digest}:",
    }
    assert api("PUT", f"/uploads/{made}", content=data, headers=headers).status_code == 200

    limit_bytes(api, len(data) - 1)
    refused = api("POST", f"/uploads/{made}:complete")
    limit_bytes(api, len(data))
    done = api("POST", f"/uploads/{made}:complete")
    limit_bytes(api, -1)
    again = api("POST", f"/uploads/{made}:complete")

    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert (done.status_code, again.status_code) == (201, 200)


def test_a_scan_that_is_sent_in_chunks_is_held_to_the_quota(own, scans):
    api = own()

    def send():
        kind = {"Content-Type": "application/octet-stream"}
        data = iter([scans.labels])  # without a Content-Length
        return api("POST", "/volumes?kind=labels", content=data, headers=kind)

    limit_bytes(api, len(scans.labels) - 1)
    refused = send()
    limit_bytes(api, len(scans.labels))

    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert send().status_code == 201


def test_models_that_are_sent_count_against_the_quota_of_bytes(own):
    api = own()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.onnx", b"x")
    data = packed.getvalue()

    def send(name: str, content):
        return api("POST", f"/models:import?name={name}", content=content)

    limit_bytes(api, 2 * len(data) - 1)
    first, second = send("a", data), send("b", data + b"x")
    chunked = send("c", iter([data + b"y"]))

    assert first.status_code == 202
    assert [second.json()["code"], chunked.json()["code"]] == ["quota_exceeded"] * 2


def test_a_run_says_where_it_stands_and_what_it_needs(own):
    api = own()
    needs = {"device": "cuda", "memory_bytes": 2**34}
    made = [
        api("POST", "/runs", json=training(api, requires=needs, priority=p)).json()["id"]
        for p in (0, 0, -5, 7)
    ]

    found = [api("GET", f"/runs/{run_id}").json() for run_id in made]

    assert [run["queue_position"] for run in found] == [2, 3, 4, 1]
    assert found[0]["requires"] == needs
    assert [run["priority"] for run in found] == [0, 0, -5, 7]
    refused = api("POST", "/runs", role="researcher", json=training(api, priority=1))
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(5, 20))]
)
def test_t_i1_fifty_equal_requests_at_once_create_one(api, world, seed):
    key = {"Idempotency-Key": f"{seed}-{uuid.uuid4().hex}"}
    body = {"name": f"T-I1 {seed}", "items": [{"volume_id": world.image}]}
    with api.sessions() as session:
        before = session.scalar(select(func.count()).select_from(db.Dataset))

    with ThreadPoolExecutor(10) as pool:
        answers = list(
            pool.map(lambda _: api("POST", "/datasets", json=body, headers=key), range(50))
        )

    created = [answer.json() for answer in answers if answer.status_code == 201]
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert created
    assert all(one == created[0] for one in created)
    with api.sessions() as session:
        after = session.scalar(select(func.count()).select_from(db.Dataset))
    assert after == before + 1
    other = api("POST", "/datasets", json={**body, "name": "other"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    elsewhere = {"size_bytes": 10, "sha256": uuid.uuid4().hex * 2}
    assert api("POST", "/uploads", json=elsewhere, headers=key).status_code == 201


def test_t_d1_of_a_hundred_flipped_bytes_none_is_served(own, monkeypatch):
    monkeypatch.setattr(files, "LARGE_BYTES", 0)  # each is remembered, as a large file is
    api = own()
    with api.sessions() as session:
        row = session.get(db.Volume, api.volume)
        path = api.store.path_of(row.voxels_sha256)
    whole = path.read_bytes()
    url = f"/volumes/{api.volume}/file"

    served = 0
    for number in range(100):
        assert api("GET", url).status_code == 200  # the control, and now it is remembered
        content = bytearray(whole)
        content[number * len(whole) // 100] ^= 1
        path.chmod(0o600)
        path.write_bytes(content)
        answer = api("GET", url, headers={"Range": "bytes=0-99"} if number % 2 else {})
        served += answer.status_code != 500
        assert answer.json()["code"] == "blob_corrupt"
        path.write_bytes(whole)

    assert served == 0


def test_a_download_carries_its_digest(own):
    import base64
    import hashlib

    api = own()
    answer = api("GET", f"/volumes/{api.volume}/file")

    digest = base64.b64encode(hashlib.sha256(answer.content).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"


def test_originals_and_results_go_when_their_time_is_over(own, new_model):
    api = own()
    with api.sessions() as session:
        run = runs.create(session, kind="segment", spec={}, principal="t", volume_id=api.volume)
        session.commit()
        with api.store.receive() as writer:
            writer.write(b"mask")
            sha256, size = api.store.commit_blob(writer)
        lease = runs.claim(session, None, "inference", "w")
        mask = runs.NewArtifact("mask.nii.gz", sha256, size, "application/gzip")
        done = db.RunState.SUCCEEDED
        runs.finish(session, lease, done, outcome="done", artifacts=[mask], result={"n": 1})
    urls = (f"/segmentations/{run.id}/mask", f"/volumes/{api.volume}/file?format=original")
    days = Settings(data_dir=api.settings.data_dir, results_days=1.0, originals_days=1.0)

    def sweep(settings):
        with api.sessions() as session:
            return retention.sweep(session, api.store, settings)

    assert sweep(days) == 0  # too young
    with api.sessions() as session:
        session.execute(update(db.Run).values(finished_at=db.db_now(-90000.0)))
        session.execute(update(db.Volume).values(created_at=db.db_now(-90000.0)))
        session.commit()
    assert sweep(Settings(data_dir=api.settings.data_dir)) == 0  # not asked for
    assert [api("GET", url).status_code for url in urls] == [200, 200]
    assert sweep(days) == 2

    answers = [api("GET", url) for url in urls]
    assert [answer.status_code for answer in answers] == [410, 410]
    assert {answer.json()["code"] for answer in answers} == {"no_longer_kept"}
    assert not api.store.path_of(sha256).exists()
    assert api("GET", f"/volumes/{api.volume}/file").status_code == 200  # the voxels stay
    assert api("GET", f"/runs/{run.id}").json()["result"]["n"] == 1


def test_sending_a_scan_again_brings_its_file_back(own, scans):
    api = own()
    with api.sessions() as session:
        session.execute(update(db.Volume).values(created_at=db.db_now(-90000.0)))
        session.commit()
        days = Settings(data_dir=api.settings.data_dir, originals_days=1.0)
        assert retention.sweep(session, api.store, days) == 1

    assert api.upload(scans.nifti, subject="s1").status_code == 200

    assert api("GET", f"/volumes/{api.volume}/file?format=original").status_code == 200


def test_what_a_request_logs_carries_its_id(own, caplog):
    from service import logs

    api = own()
    handler = logging.Handler()
    lines = []
    handler.addFilter(logs._add_ids)
    handler.setFormatter(logs.JsonLines())
    handler.emit = lambda record: lines.append(handler.format(record))
    logger = logging.getLogger("service.errors")
    logger.addHandler(handler)
    try:
        answer = api("GET", "/volumes", headers={"X-Request-Id": HEX})
        logger.warning("outside")
        with logs.about(request_id=HEX, run_id="run_1"):
            try:
                int("CANARY^NAME")
            except ValueError:
                logger.exception("inside")
    finally:
        logger.removeHandler(handler)

    assert answer.headers["x-request-id"] == HEX
    assert '"request_id"' not in lines[0]
    assert f'"request_id": "{HEX}", "run_id": "run_1"' in lines[1]
    assert "CANARY" not in lines[1]
    assert "ValueError at" in lines[1]
