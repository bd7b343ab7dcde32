"""The same API over PostgreSQL: what differs there between databases."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update

from service import db, idempotency

pytestmark = pytest.mark.services


@pytest.fixture
def pg(serve, postgres_url, new_model):
    running = serve(database_url=postgres_url)
    new_model(running, "encoder", "encoder")
    yield running
    running.sessions.kw["bind"].dispose()


@pytest.fixture
def volume(pg, scans) -> str:
    made = pg.upload(scans.nifti, subject="s1")
    assert made.status_code == 201
    return str(made.json()["id"])


def test_the_chain_from_upload_to_events_runs(pg, volume):
    body = {"name": "d", "items": [{"volume_id": volume, "split": "train"}]}
    dataset = pg("POST", "/datasets", json=body).json()["id"]
    run = {"kind": "pretrain", "dataset_id": dataset, "model_name": "m", "recipe": {}}
    made = pg("POST", "/runs", json=run).json()
    pg.work(made["id"])

    events = pg("GET", f"/runs/{made['id']}/events?after=0").json()["events"]
    stream = pg("GET", f"/runs/{made['id']}/events").text

    assert [event["type"] for event in events].count("state") == 4
    assert stream.count("event: ") == len(events)
    assert pg("GET", f"/runs/{made['id']}").json()["state"] == "succeeded"
    assert pg("DELETE", f"/datasets/{dataset}").json()["code"] == "dataset_in_use"
    assert pg("DELETE", f"/volumes/{volume}").json()["code"] == "volume_in_use"


def test_of_many_equal_requests_at_once_one_creates(pg, volume):
    key = {"Idempotency-Key": uuid.uuid4().hex}
    body = {"name": "d", "items": [{"volume_id": volume}]}

    def send(_number):
        return pg("POST", "/datasets", json=body, headers=key)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(16)))

    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({a.json()["id"] for a in answers if a.status_code == 201}) == 1
    assert len(pg("GET", "/datasets").json()["items"]) == 1


def test_a_request_that_names_a_model_of_the_longest_name_has_room_for_its_path(pg, new_model):
    name = "m" * 100
    new_model(pg, name, "encoder")
    path = f"/models/{name}/versions/1:check"

    answer = pg("POST", path, headers={"Idempotency-Key": "k"})

    assert (answer.status_code, answer.json()["code"]) == (409, "no_golden_cases")


def test_an_abandoned_key_is_taken_over(pg, volume):
    key = {"Idempotency-Key": "left-behind"}
    body = {"name": "d", "items": [{"volume_id": volume}]}
    first = pg("POST", "/datasets", json=body, headers=key)
    with pg.sessions() as session:
        session.execute(
            update(db.Idempotency).values(
                status=None, created_at=db.db_now(-idempotency.ABANDONED_S - 60)
            ),
            execution_options={"synchronize_session": False},
        )
        session.commit()

    second = pg("POST", "/datasets", json=body, headers=key)
    third = pg("POST", "/datasets", json=body, headers=key)

    assert second.json()["id"] != first.json()["id"]
    assert third.json() == second.json()


def test_of_many_that_move_an_alias_from_one_revision_one_succeeds(pg):
    path = "/models/encoder/aliases/champion"
    etag = pg("PUT", path, json={"version": 1}).headers["etag"]

    def move(_number):
        return pg("PUT", path, json={"version": 1}, headers={"If-Match": etag}).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(move, range(8)))

    assert statuses == [200] + [412] * 7


@pytest.mark.parametrize("query", ["subject=a%00b", "page_token=W10", "page_size=2147483648"])
def test_what_postgresql_could_not_hold_is_422(pg, query):
    assert pg("GET", f"/volumes?{query}").status_code == 422


def test_pages_follow_each_other(pg, volume):
    body = {"name": "d", "items": [{"volume_id": volume}]}
    made = [pg("POST", "/datasets", json=body).json()["id"] for _ in range(3)]

    first = pg("GET", "/datasets?page_size=2").json()
    second = pg("GET", f"/datasets?page_size=2&page_token={first['next_page_token']}").json()

    assert [item["id"] for item in first["items"] + second["items"]] == made[::-1]


def test_a_database_that_went_away_is_503(pg, postgres_admin):
    from sqlalchemy import text

    name = pg.sessions.kw["bind"].url.database
    with postgres_admin.connect() as connection:
        connection.execute(text(f'DROP DATABASE "{name}" WITH (FORCE)'))

    response = pg("GET", "/volumes")

    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert pg("GET", "/readyz", role=None).status_code == 503
