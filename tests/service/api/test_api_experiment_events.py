"""The events of an experiment: followed live, taken up after a break, and by the client."""

import json
import threading
from collections import Counter

import pytest
from sqlalchemy import update
from typer.testing import CliRunner

from service import db, experiment_events, experiments, runs, schemas
from service.answers import ApiError
from service.cli import app
from service.client import Client
from service.db import RunState

NETWORK = {"base_width": 2}
PRE, TUNED, SCRATCH = "pretrain/pcrl/0", "finetune/pcrl/100%/0", "finetune/scratch/100%/0"
STATES = ["queued", "starting", "running"]


@pytest.fixture(scope="module")
def target(api, scans):
    """Labelled scans of two patients, one of whom tests."""
    items = []
    for subject, split in (("events-a", "train"), ("events-b", "test")):
        sent = [
            api.upload(data, kind=kind, subject=subject).json()["id"]
            for data, kind in ((scans.nifti, "image"), (scans.labels, "labels"))
        ]
        items.append({"volume_id": sent[0], "labels_id": sent[1], "split": split})
    return api("POST", "/datasets", json={"name": "Events", "items": items}).json()["id"]


@pytest.fixture
def made(api, target):
    """The id of an experiment of three trainings: two are queued, one waits."""
    body = {
        "name": "Followed",
        "source_dataset_id": target,
        "target_dataset_id": target,
        "methods": [
            {"name": "pcrl", "pretrain": {"kind": "pretrain", "network": NETWORK}},
            {"name": "scratch"},
        ],
        "finetune": {"kind": "finetune", "network": NETWORK, "labels": {"liver": 1}},
        "ratios": [1.0],
        "seeds": [0],
    }
    answer = api("POST", "/experiments", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def end(api, experiment_id):
    """Be the worker: the training from scratch succeeds, the pretraining fails."""
    trainings = api("GET", f"/experiments/{experiment_id}/trainings").json()["items"]
    run_of = {one["key"]: one["run_id"] for one in trainings}
    for key, state in ((SCRATCH, RunState.SUCCEEDED), (PRE, RunState.FAILED)):
        with api.sessions() as session:
            mine = db.Run.id == run_of[key]
            session.execute(update(db.Run).where(mine).values(priority=100))
            lease = runs.claim(session, run_of[key], "train", "w")
            assert lease.run_id == run_of[key]
            runs.started(session, lease)
            error = {"code": "non_finite_loss", "detail": "of step 3"}
            error = error if state is RunState.FAILED else None
            outcome = "done" if error is None else "error"
            runs.finish(session, lease, state, outcome=outcome, error=error)
            experiments.advance_after(session, lease.run_id)


def parsed(text):
    """(event, id, data) of each."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if "data" in fields:
            found.append((fields["event"], int(fields["id"]), json.loads(fields["data"])))
    return found


def followed(api, experiment_id, after=None):
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    answer = api("GET", f"/experiments/{experiment_id}/events", role="viewer", headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    return parsed(answer.text)


def test_a_stream_follows_the_whole_and_ends_with_it(api, made, monkeypatch):
    look, num_looks, is_followed = experiment_events.look, [], threading.Event()

    def watched(*args):
        found = look(*args)
        num_looks.append(1)
        if len(num_looks) == 2:  # the route's, and the stream's first
            is_followed.set()
        return found

    monkeypatch.setattr(experiment_events, "look", watched)
    worker = threading.Thread(target=lambda: is_followed.wait(60) and end(api, made))
    worker.start()

    found = followed(api, made)
    worker.join()

    progress = [data for name, _, data in found if name == "progress"]
    assert progress[0]["counts"] == {"queued": 2, "waiting": 1}
    assert (progress[0]["state"], progress[0]["stage"]) == ("running", "pretrain")
    assert found[-1][0] == "progress" and progress[-1] == {
        "state": "failed", "stage": None, "num_trainings": 3, "num_ended": 3, "fraction": 1.0,
        "stages": {
            "pretrain": {"num_trainings": 1, "num_ended": 1},
            "finetune": {"num_trainings": 2, "num_ended": 2},
        },
        "counts": {"failed": 2, "succeeded": 1}, "running": [],
        "finished_at": api("GET", f"/experiments/{made}").json()["finished_at"],
    }  # fmt: skip
    told = [data for name, _, data in found if name == "training"]
    for key, last in ((PRE, "failed"), (SCRATCH, "succeeded")):
        assert [one["state"] for one in told if one["key"] == key] == [*STATES, last]
    assert TUNED not in {one["key"] for one in told}  # it had no run: `progress` tells of it
    assert max(Counter(one["id"] for one in told).values()) == 1
    ids = [number for _, number, _ in found]
    assert ids == sorted(ids)


def test_a_stream_that_broke_anywhere_is_taken_up_without_loss(api, made):
    end(api, made)
    whole = followed(api, made)
    assert [name for name, _, _ in whole] == ["training"] * 8 + ["progress"]

    for at, (_, number, _) in enumerate(whole):
        rest = followed(api, made, number)
        assert rest == (whole[at + 1 :] or whole[-1:])
    listed = api("GET", f"/experiments/{made}/events?after={whole[2][1]}").json()
    assert listed["trainings"] == [data for _, _, data in whole[3:-1]]
    assert (listed["progress"], listed["id"]) == (whole[-1][2], whole[-1][1])
    plain = api("GET", f"/experiments/{made}/events", headers={"Accept": "application/json"})
    assert len(plain.json()["trainings"]) == 8


def test_a_silent_stream_sends_pings(api, made, monkeypatch):
    monkeypatch.setattr("service.experiment_events.PING_S", 0.1)
    worker = threading.Timer(1.0, end, args=[api, made])
    worker.start()

    text = api("GET", f"/experiments/{made}/events").text
    worker.join()

    assert "\n: ping\n" in text


def test_what_is_not_there_is_a_problem_and_the_example_is_of_the_form(api):
    where = f"/experiments/exp_{'0' * 32}/events"
    refused = api("GET", where, headers={"Accept": "text/event-stream"})
    operation = api.app.openapi()["paths"]["/api/v1/experiments/{experiment_id}/events"]["get"]

    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    content = operation["responses"]["200"]["content"]
    (first, _, training), (second, _, progress) = parsed(content["text/event-stream"]["example"])
    assert (first, second) == ("training", "progress")
    schemas.ExperimentTraining.model_validate(training)
    schemas.ExperimentProgress.model_validate(progress)
    assert "ExperimentEvents" in content["application/json"]["schema"]["$ref"]


def test_the_client_follows_by_stream_and_else_by_asking(api, url, made, monkeypatch):
    told = {"stream": [], "asked": []}

    def on_change(progress):
        if not told["stream"]:
            end(api, made)
        told["stream"].append(progress)

    with Client(url, api.tokens["viewer"]) as client:
        streamed = client.wait_experiment(made, on_change)

        def held_back(*_args, **_names):
            raise ApiError(0, "unreachable", "a proxy held the stream back")

        monkeypatch.setattr(client, "_listen", held_back)
        monkeypatch.setattr("service.client.experiments.time.sleep", lambda _s: None)
        asked = client.wait_experiment(made, told["asked"].append)

    assert streamed == asked and asked.state == "failed"
    assert told["stream"][0].counts == {"queued": 2, "waiting": 1}
    assert told["asked"] == told["stream"][-1:]


def test_the_client_takes_up_a_stream_and_gives_up_on_a_refusal(api, url, made, monkeypatch):
    with Client(url, api.tokens["viewer"]) as client:
        listen, asked = client._listen, []

        def cut(path, after):
            asked.append(after)
            for number, event in enumerate(listen(path, after)):
                yield event
                if number == 2 and len(asked) == 1:
                    end(api, made)
                    raise ApiError(0, "unreachable", "cut")

        monkeypatch.setattr(client, "_listen", cut)
        ended = client.wait_experiment(made)
        with pytest.raises(ApiError) as refused:
            client.wait_experiment(f"exp_{'0' * 32}")

    assert ended.state == "failed" and asked[0] == 0 and asked[1] > 0
    assert (refused.value.status, refused.value.code) == (404, "not_found")


def test_the_command_follows_an_experiment(api, url, made):
    end(api, made)

    told = CliRunner().invoke(
        app, ["experiment", "wait", made, "--url", url, "--token", api.tokens["viewer"]]
    )

    assert told.exit_code == 65 and "2 failed, 1 succeeded" in told.output
    assert f"pcrl experiment show {made} says why" in " ".join(told.output.split())
