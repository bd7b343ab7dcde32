"""Trainings: what may start, how they are followed, how they stop."""

import json
import threading
import time

import pytest

HEX = "0" * 32
NET = {"network": {"base_width": 8}}


def pretrain(dataset: str, **more: object) -> dict[str, object]:
    return {
        "kind": "pretrain",
        "dataset_id": dataset,
        "model_name": "new-encoder",
        "recipe": NET,
        **more,
    }


def finetune(dataset: str, **more: object) -> dict[str, object]:
    return {
        "kind": "finetune",
        "dataset_id": dataset,
        "model_name": "new-segmenter",
        "recipe": {"labels": {"liver": 1}, **NET},
        **more,
    }


def test_a_posted_recipe_is_queued_with_every_default_in_it(api, world):
    response = api("POST", "/runs", json=pretrain(world.unlabelled))

    body = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/api/v1/runs/{body['id']}"
    assert int(response.headers["retry-after"]) > 0
    assert (body["kind"], body["state"], body["attempt"]) == ("pretrain", "queued", 0)
    assert body["recipe"]["method"]["queue_size"] == 16384
    assert body["recipe"]["network"] == {"kind": "unet3d", "base_width": 8}
    found = api("GET", f"/runs/{body['id']}").json()
    assert found == {**body, "queue_position": found["queue_position"]}


def test_a_fine_tuning_remembers_which_version_its_parent_was(api, world):
    body = finetune(world.labelled, parent="encoder")

    made = api("POST", "/runs", json=body).json()

    version = api("GET", "/models/encoder/versions/1").json()
    assert (made["parent"], made["parent_digest"]) == ("encoder", version["digest"])


@pytest.mark.parametrize(
    ("make", "more", "status", "code"),
    [
        (pretrain, {"recipe": {"learning_rat": 1}}, 422, "invalid_request"),
        (pretrain, {"recipe": {"kind": "finetune", "labels": {"a": 1}}}, 422, "invalid_request"),
        (pretrain, {"parent": "encoder"}, 422, "invalid_request"),
        (finetune, {"recipe": {"kind": "classify", "labels": ["a"]}}, 422, "invalid_request"),
        (
            finetune,
            {"recipe": {"labels": {"a": 1}, "channels": ["t1", "t2"]}},
            422,
            "invalid_request",
        ),
        (pretrain, {"dataset_id": f"ds_{HEX}"}, 404, "not_found"),
        (pretrain, {"model_name": "segmenter"}, 422, "wrong_model_kind"),
        (pretrain, {"model_name": "Not A Name"}, 422, "invalid_request"),
        (finetune, {"parent": "segmenter"}, 422, "wrong_model_kind"),
        (finetune, {"parent": "models:/absent@champion"}, 404, "not_found"),
        (finetune, {"parent": f"run_{HEX}"}, 404, "not_found"),
        (
            finetune,
            {"parent": "encoder", "recipe": {"labels": {"liver": 1}}},
            422,
            "incompatible_parent",
        ),
    ],
)
def test_a_run_that_could_only_fail_is_refused(api, world, make, more, status, code):
    before = api.counts()

    response = api("POST", "/runs", json=make(world.labelled, **more))

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert api.counts() == before
    assert api("POST", "/runs", json=make(world.labelled)).status_code == 202


def test_fine_tuning_needs_labels_and_pretraining_does_not(api, world):
    refused = api("POST", "/runs", json=finetune(world.unlabelled))
    queued = api("POST", "/runs", json=pretrain(world.unlabelled))

    assert (refused.status_code, refused.json()["code"]) == (422, "dataset_without_labels")
    assert queued.status_code == 202


def test_an_incompatible_parent_says_both_widths(api, world):
    body = finetune(world.labelled, parent="encoder", recipe={"labels": {"liver": 1}})

    problem = api("POST", "/runs", json=body).json()

    assert problem["found"]["base_width"] == 8
    assert problem["expected"]["base_width"] == 32


def test_a_run_is_a_parent_once_it_has_registered_a_model(api, world, new_model):
    run = api("POST", "/runs", json=pretrain(world.unlabelled)).json()["id"]

    early = api("POST", "/runs", json=finetune(world.labelled, parent=run))
    new_model(api, "from-a-run", "encoder", run_id=run)
    late = api("POST", "/runs", json=finetune(world.labelled, parent=run))

    assert (early.status_code, early.json()["code"]) == (409, "not_ready")
    assert late.status_code == 202
    assert late.json()["parent"] == run


def test_a_run_in_the_queue_is_canceled_at_once_and_only_once(api, world):
    run = api("POST", "/runs", json=pretrain(world.unlabelled)).json()["id"]

    canceled = api("POST", f"/runs/{run}:cancel")
    again = api("POST", f"/runs/{run}:cancel")

    assert (canceled.status_code, canceled.json()["state"]) == (202, "canceled")
    assert (again.status_code, again.json()["code"]) == (409, "run_already_ended")
    assert again.json()["state"] == "canceled"


def test_runs_are_listed_by_kind_and_state(api, world):
    run = api("POST", "/runs", json=pretrain(world.unlabelled)).json()["id"]
    api("POST", f"/runs/{run}:cancel")

    def ids(query: str) -> list[str]:
        return [item["id"] for item in api("GET", f"/runs?{query}").json()["items"]]

    assert run in ids("kind=pretrain&state=canceled")
    assert run not in ids("kind=finetune")
    assert run not in ids("state=queued")
    assert api("GET", "/runs?state=asleep").status_code == 422


def test_metrics_are_given_by_name_and_step(api, world):
    run = api("POST", "/runs", json=pretrain(world.unlabelled)).json()["id"]
    api.work(run)

    points = api("GET", f"/runs/{run}/metrics").json()["points"]

    assert points == [
        {"name": "loss", "step": 1, "value": 2.5},
        {"name": "loss", "step": 2, "value": 1.5},
    ]


def _events(response) -> list[dict[str, object]]:
    """Parse a stream of server-sent events."""
    found = []
    for block in response.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in fields:
            found.append({**fields, "data": json.loads(fields["data"])})
    return found


@pytest.fixture
def ended(api, world) -> str:
    run = api("POST", "/runs", json=pretrain(world.unlabelled)).json()["id"]
    api.work(run)
    return run


def test_the_stream_gives_every_event_and_ends_with_the_run(api, ended):
    response = api("GET", f"/runs/{ended}/events")

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    found = _events(response)
    states = [event["data"]["data"]["state"] for event in found if event["event"] == "state"]
    assert states == ["queued", "starting", "running", "succeeded"]
    assert [event["event"] for event in found].count("metric") == 2
    assert [int(event["id"]) for event in found] == sorted({int(e["id"]) for e in found})
    assert all(int(event["id"]) == event["data"]["id"] for event in found)


def test_a_stream_is_taken_up_after_the_last_event_that_came(api, ended):
    whole = _events(api("GET", f"/runs/{ended}/events"))
    third = whole[2]["id"]

    rest = _events(api("GET", f"/runs/{ended}/events", headers={"Last-Event-ID": third}))

    assert rest == whole[3:]
    last = whole[-1]["id"]
    assert _events(api("GET", f"/runs/{ended}/events", headers={"Last-Event-ID": last})) == []


def test_who_cannot_stream_asks_for_a_list(api, ended):
    whole = [event["data"] for event in _events(api("GET", f"/runs/{ended}/events"))]

    listed = api("GET", f"/runs/{ended}/events", headers={"Accept": "application/json"})
    later = api("GET", f"/runs/{ended}/events?after={whole[1]['id']}")

    assert listed.json() == {"events": whole}
    assert later.json() == {"events": whole[2:]}


def test_a_stream_follows_a_run_that_goes_on(api, world):
    run = api("POST", "/runs", json=pretrain(world.unlabelled)).json()["id"]
    worker = threading.Timer(0.6, api.work, args=[run])
    begun_at = time.monotonic()
    worker.start()

    found = _events(api("GET", f"/runs/{run}/events"))
    worker.join()

    assert time.monotonic() - begun_at >= 0.6
    assert found[-1]["data"]["data"]["state"] == "succeeded"


def test_a_silent_stream_sends_pings(api, world, monkeypatch):
    monkeypatch.setattr("service.events.PING_S", 0.1)
    run = api("POST", "/runs", json=pretrain(world.unlabelled)).json()["id"]
    worker = threading.Timer(1.0, api.work, args=[run])
    worker.start()

    text = api("GET", f"/runs/{run}/events").text
    worker.join()

    assert "\n: ping\n" in text


def test_events_of_an_unknown_run_are_a_problem_and_not_a_stream(api):
    response = api("GET", f"/runs/run_{HEX}/events", headers={"Accept": "text/event-stream"})

    assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_a_run_that_failed_says_why(api, world):
    run = api("POST", "/runs", json=pretrain(world.unlabelled)).json()["id"]
    error = {"code": "non_finite_loss", "detail": "the loss is not finite at step 3"}
    api.work(run, state="failed", error=error)

    body = api("GET", f"/runs/{run}").json()

    assert (body["state"], body["error"]) == ("failed", error)
