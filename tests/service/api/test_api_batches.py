"""One request over a dataset: progress by scan, partial failure, retry, cancel, one table."""

import csv
import io
import uuid

import pytest

from service import db, runs

FAILED = {"code": "host_out_of_memory", "detail": "the worker ran out of memory"}


@pytest.fixture
def dataset(api, world):
    items = [{"volume_id": world.image}, {"volume_id": world.zipped}]
    return api("POST", "/datasets", json={"name": "Two", "items": items}).json()["id"]


def start(api, world, dataset, **how):
    body = {"dataset_id": dataset, "model": world.segmenter, "kind": "segment"}
    return api("POST", "/batches", json=body, **how)


def items(api, batch, query=""):
    return api("GET", f"/batches/{batch}/items{query}").json()["items"]


def result(volume_ml):
    return {
        "volumes_ml": {"liver": volume_ml},
        "voxels": {"liver": 5},
        "lesions": {"liver": {"num": 2, "largest": []}},
        "timings_s": {},
    }


def test_a_batch_reports_each_scan_and_retries_what_failed(api, world, dataset):
    made = start(api, world, dataset)
    batch = made.json()["id"]
    early = api("GET", f"/batches/{batch}/table")
    first, second = items(api, batch)
    api.work(first["run_id"], result=result(1.5))
    half = api("GET", f"/batches/{batch}").json()
    api.work(second["run_id"], state="failed", error=FAILED)
    ended = api("GET", f"/batches/{batch}").json()
    (failed,) = items(api, batch, "?state=failed")
    again = api("POST", f"/batches/{batch}:retry")
    nothing = api("POST", f"/batches/{batch}:retry")
    retried = items(api, batch)[1]
    api.work(retried["run_id"], result=result(2.5))

    assert (made.status_code, made.json()["state"]) == (202, "queued")
    assert made.headers["location"] == f"/api/v1/batches/{batch}"
    assert early.json()["code"] == "not_ready"
    assert (half["state"], half["fraction"], half["finished_at"]) == ("running", 0.5, None)
    assert (ended["state"], ended["counts"]) == ("failed", {"succeeded": 1, "failed": 1})
    assert (failed["volume_id"], failed["error"]) == (world.zipped, FAILED)
    assert (again.status_code, nothing.json()["code"]) == (202, "nothing_to_retry")
    assert (retried["tries"], retried["run_id"] != second["run_id"]) == (2, True)
    assert api("GET", f"/batches/{batch}").json()["state"] == "succeeded"
    rows = api("GET", f"/batches/{batch}/table").json()["rows"]
    assert [row["volumes_ml"] for row in rows] == [{"liver": 1.5}, {"liver": 2.5}]
    text = api("GET", f"/batches/{batch}/table?format=csv").text
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["volume_ml:liver"] for line in lines] == ["1.5", "2.5"]
    assert [line["num_lesions:liver"] for line in lines] == ["2", "2"]


def test_a_single_request_goes_before_the_scans_of_an_older_batch(api, world, dataset):
    batch = start(api, world, dataset).json()["id"]
    single = api(
        "POST", "/segmentations", json={"volume_id": world.image, "model": world.segmenter}
    ).json()["id"]

    with api.sessions() as session:
        order = []
        while (lease := runs.claim(session, None, "inference", "t")) is not None:
            order.append(lease.run_id)
            runs.started(session, lease)
            runs.finish(session, lease, db.RunState.FAILED, outcome="error", error=FAILED)

    assert order.index(single) < min(order.index(one["run_id"]) for one in items(api, batch))


def test_cancel_ends_what_waits_and_keeps_what_is_done(api, world, dataset):
    batch = start(api, world, dataset).json()["id"]
    api.work(items(api, batch)[0]["run_id"], result=result(1.0))

    canceled = api("POST", f"/batches/{batch}:cancel")
    again = api("POST", f"/batches/{batch}:cancel")

    assert (canceled.status_code, canceled.json()["state"]) == (202, "canceled")
    assert [one["state"] for one in items(api, batch)] == ["succeeded", "canceled"]
    assert again.json()["code"] == "run_already_ended"


def test_a_batch_is_not_retried_beyond_the_quota(api, world, dataset):
    """The last is the control: without the limit it is."""
    batch = start(api, world, dataset).json()["id"]
    api("POST", f"/batches/{batch}:cancel")
    api("POST", "/segmentations", json={"volume_id": world.image, "model": world.segmenter})

    api("PATCH", "/projects/prj_default", json={"max_queued": 1})
    refused = api("POST", f"/batches/{batch}:retry")
    api("PATCH", "/projects/prj_default", json={"max_queued": None})

    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert api("POST", f"/batches/{batch}:retry").status_code == 202


def test_a_batch_sent_twice_with_one_key_is_made_once(api, world, dataset):
    key = {"Idempotency-Key": uuid.uuid4().hex}

    first, second = (start(api, world, dataset, headers=key) for _ in range(2))

    assert first.json() == second.json()
    assert second.headers["idempotent-replayed"] == "true"
    listed = api("GET", f"/batches?dataset_id={dataset}").json()["items"]
    assert [one["id"] for one in listed] == [first.json()["id"]]
    page = api("GET", f"/batches/{first.json()['id']}/items?page_size=1").json()
    rest = items(api, first.json()["id"], f"?page_token={page['next_page_token']}")
    assert [one["position"] for one in page["items"] + rest] == [0, 1]


def test_an_encoder_makes_no_masks_and_an_empty_split_no_batch(api, world, dataset):
    body = {"dataset_id": world.unlabelled, "model": world.encoder, "kind": "segment"}
    before = api.counts()

    wrong = api("POST", "/batches", json=body)
    empty = api("POST", "/batches", json={**body, "kind": "embed", "options": {"split": "test"}})

    assert (wrong.json()["code"], empty.json()["code"]) == ("wrong_model_kind", "invalid_request")
    assert api.counts() == before
