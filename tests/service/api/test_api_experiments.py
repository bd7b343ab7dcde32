"""Experiments over the API: planned, followed, extended, canceled, reported."""

import sqlite3
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from sqlalchemy import make_url, update

from models.experiment.cases import FILE, CaseResult, CaseResults
from service import db, experiment_reports, experiments, runs

FINETUNE = {"kind": "finetune", "network": {"base_width": 2}, "labels": {"liver": 1}}
PRETRAIN = {"kind": "pretrain", "network": {"base_width": 2}}


@pytest.fixture
def target(api, world):
    """Labelled scans of two patients, one of whom tests."""
    items = [{"volume_id": world.image, "labels_id": world.labels, "split": "train"}]
    body = {"name": "Target", "items": items}
    made = api("POST", "/datasets", json=body)
    assert made.status_code == 201
    return made.json()["id"]


@pytest.fixture
def tested(api, scans):
    """A target with a test patient."""
    items = []
    for subject, split in (("exp-a", "train"), ("exp-b", "test")):
        ids = []
        for data, kind in ((scans.nifti, "image"), (scans.labels, "labels")):
            sent = api.upload(data, kind=kind, subject=subject)
            assert sent.status_code in (200, 201), sent.text
            ids.append(sent.json()["id"])
        items.append({"volume_id": ids[0], "labels_id": ids[1], "split": split})
    made = api("POST", "/datasets", json={"name": "Tested", "items": items})
    assert made.status_code == 201, made.text
    return made.json()["id"]


def body(source, target, **more):
    return {
        "name": "Liver",
        "source_dataset_id": source,
        "target_dataset_id": target,
        "methods": [{"name": "pcrl", "pretrain": PRETRAIN}, {"name": "scratch"}],
        "finetune": FINETUNE,
        "ratios": [1.0],
        "seeds": [0],
        **more,
    }


def test_an_experiment_is_planned_followed_extended_reported_and_canceled(api, tested):
    key = {"Idempotency-Key": uuid.uuid4().hex}
    made = api("POST", "/experiments", json=body(tested, tested), headers=key)
    again = api("POST", "/experiments", json=body(tested, tested), headers=key)

    assert made.status_code == 202, made.text
    assert again.json() == made.json() and again.headers["Idempotent-Replayed"] == "true"
    where = f"/experiments/{made.json()['id']}"
    assert made.headers["Location"] == f"/api/v1{where}"
    assert made.json()["counts"] == {"queued": 2, "waiting": 1}
    listed = api("GET", "/experiments", role="viewer").json()["items"]
    assert made.json()["id"] in [one["id"] for one in listed]
    trainings = api("GET", f"{where}/trainings", role="viewer").json()["items"]
    assert [one["key"] for one in trainings] == [
        "pretrain/pcrl/0",
        "finetune/pcrl/100%/0",
        "finetune/scratch/100%/0",
    ]
    run = api("GET", f"/runs/{trainings[0]['run_id']}").json()
    assert run["recipe"]["network"]["base_width"] == 2 and run["priority"] == -10
    queued = api("GET", f"{where}/trainings?state=waiting").json()["items"]
    assert [one["key"] for one in queued] == ["finetune/pcrl/100%/0"]
    more = api("POST", f"{where}:extend", json={"seeds": [1]})
    assert (more.status_code, more.json()["num_trainings"]) == (202, 6)
    for form, media in (
        ("json", "application/json"),
        ("markdown", "text/markdown"),
        ("svg", "image/svg+xml"),
        ("csv", "text/csv"),
    ):
        report = api("GET", f"{where}/report?format={form}", role="viewer")
        assert report.status_code == 200
        assert report.headers["content-type"].startswith(media) and report.text
    canceled = api("POST", f"{where}:cancel")
    assert (canceled.status_code, canceled.json()["state"]) == (202, "canceled")
    late = api("POST", f"{where}:cancel"), api("POST", f"{where}:extend", json={"seeds": [2]})
    codes = [(one.status_code, one.json()["code"]) for one in late]
    assert codes == [(409, "run_already_ended"), (409, "experiment_canceled")]
    revived = api("POST", f"{where}:extend", json={"retry": True})
    assert revived.json()["state"] == "running"
    api("POST", f"{where}:cancel")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"methods": []}, "at least 1"),
        ({"methods": [{"name": "a"}, {"name": "a"}]}, "names one twice"),
        ({"ratios": [0.0]}, "greater than 0"),
        ({"finetune": {**FINETUNE, "channels": ["t1", "t2"]}}, "one image"),
        ({"finetune": {**FINETUNE, "network": {"base_width": 4}}}, "network of pcrl"),
    ],
)
def test_a_plan_that_cannot_be_right_changes_nothing(api, tested, more, says):
    before = api.counts()

    refused = api("POST", "/experiments", json=body(tested, tested, **more))

    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert says in str(refused.json()["errors"])
    assert api.counts() == before


def test_who_may_not_and_what_is_not_there(api, tested, target):
    where = f"/experiments/exp_{'0' * 32}"
    asked = body(tested, tested)

    assert api("POST", "/experiments", json=asked, role="annotator").status_code == 403
    for path in (where, f"{where}/trainings", f"{where}/report"):
        assert api("GET", path).json()["code"] == "not_found"
    untested = api("POST", "/experiments", json=body(tested, target))
    assert untested.json()["code"] == "dataset_without_labels"
    unknown = api("POST", "/experiments", json=body(f"ds_{'0' * 32}", tested))
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")


def succeed(api, where, key):
    """End a fine-tuning as its worker would; returns where its results lie."""
    (run_id,) = [
        one["run_id"]
        for one in api("GET", f"{where}/trainings").json()["items"]
        if one["key"] == key
    ]
    case = CaseResult(case_id="c", subject="c", values={"liver": 0.5})
    results = CaseResults(measure="dice", labels=("liver",), cases=(case,))
    path = api.store.tmp / uuid.uuid4().hex
    path.write_text(results.model_dump_json())
    sha256, size = api.store.put_file(path)
    with api.sessions() as session:
        session.execute(update(db.Run).where(db.Run.id == run_id).values(priority=100))
        lease = runs.claim(session, run_id, "train", "w")
        assert lease.run_id == run_id
        runs.started(session, lease)
        kept = (runs.NewArtifact(FILE, sha256, size, "application/json"),)
        done = db.RunState.SUCCEEDED
        runs.finish(session, lease, done, outcome="done", artifacts=kept)
    return api.store.path_of(sha256)


def write_at_once(path):
    """Begin to write, which fails while another transaction is open."""
    with closing(sqlite3.connect(path, timeout=0.1, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("ROLLBACK")


def test_a_report_is_built_once_and_holds_no_transaction_meanwhile(api, tested, monkeypatch):
    made = api("POST", "/experiments", json=body(tested, tested)).json()
    where = f"/experiments/{made['id']}"
    path, build, num_built = (
        make_url(api.settings.database_url).database,
        experiment_reports.build,
        [],
    )

    def watched(*args, **names):
        write_at_once(path)
        num_built.append(1)
        return build(*args, **names)

    monkeypatch.setattr(experiment_reports, "build", watched)
    with api.sessions() as held, pytest.raises(sqlite3.OperationalError):  # the control
        experiments.get(held, made["id"])
        write_at_once(path)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: api("GET", f"{where}/report"), range(4)))
    api("GET", f"{where}/report?format=csv")

    assert {one.status_code for one in answers} == {200} and len(num_built) == 1
    assert "finetune/scratch/100%/0" in {one["key"] for one in answers[0].json()["missing"]}
    succeed(api, where, "finetune/scratch/100%/0")
    after = api("GET", f"{where}/report").json()
    assert len(num_built) == 2 and after["num_cases"] == 1
    assert "finetune/scratch/100%/0" not in {one["key"] for one in after["missing"]}


def test_a_report_of_a_changed_file_is_refused(api, tested):
    made = api("POST", "/experiments", json=body(tested, tested, seeds=[7])).json()
    where = f"/experiments/{made['id']}"
    cases = succeed(api, where, "finetune/scratch/100%/7")
    whole = cases.read_bytes()
    cases.chmod(0o600)
    cases.write_bytes(whole.replace(b"0.5", b"0.9"))

    refused = api("GET", f"{where}/report")

    assert (refused.status_code, refused.json()["code"]) == (500, "blob_corrupt")
    cases.write_bytes(whole)
    assert api("GET", f"{where}/report").status_code == 200


def test_a_plan_of_another_version_is_listed_and_canceled_and_breaks_no_list(api, tested):
    made = api("POST", "/experiments", json=body(tested, tested)).json()
    where = f"/experiments/{made['id']}"
    with api.sessions() as session:
        experiments.get(session, made["id"]).plan = {**made["plan"], "of_a_newer_version": 1}
        session.commit()

    listed = {one["id"]: one for one in api("GET", "/experiments").json()["items"]}
    shown = api("GET", where)
    refused = [
        api("GET", f"{where}/trainings"),
        api("GET", f"{where}/report"),
        api("POST", f"{where}:extend", json={"seeds": [5]}),
    ]
    canceled = api("POST", f"{where}:cancel")

    assert listed[made["id"]] == shown.json()
    assert shown.json()["counts"] == {"queued": 2, "waiting": 1}
    assert {(one.status_code, one.json()["code"]) for one in refused} == {(500, "plan_unreadable")}
    assert (canceled.status_code, canceled.json()["counts"]) == (202, {"canceled": 3})
    assert api("POST", f"{where}:cancel").json()["code"] == "run_already_ended"
