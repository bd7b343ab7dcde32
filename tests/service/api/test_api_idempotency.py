"""A creating request with an `Idempotency-Key` creates once."""

import threading
import uuid

import pytest
from sqlalchemy import select, update

from service import db, idempotency
from service.auth import site_pseudonyms


@pytest.fixture
def key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


@pytest.fixture
def body(world) -> dict[str, object]:
    return {"name": "Once", "items": [{"volume_id": world.image}]}


def test_a_repeat_gets_the_first_answer_and_creates_nothing(api, key, body):
    first = api("POST", "/datasets", json=body, headers=key)
    before = api.counts()
    second = api("POST", "/datasets", json=body, headers=key)

    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert second.headers["location"] == first.headers["location"]
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert api.counts() == before


def test_without_a_key_a_repeat_creates_again(api, body):
    first, second = (api("POST", "/datasets", json=body).json()["id"] for _ in range(2))

    assert first != second


def test_another_body_under_the_same_key_is_refused(api, key, body):
    api("POST", "/datasets", json=body, headers=key)

    response = api("POST", "/datasets", json={**body, "name": "Twice"}, headers=key)

    assert (response.status_code, response.json()["code"]) == (422, "idempotency_mismatch")


def test_keys_of_different_callers_never_meet(api, key, body):
    first = api("POST", "/datasets", role="admin", json=body, headers=key)
    second = api("POST", "/datasets", role="researcher", json=body, headers=key)

    assert first.json()["id"] != second.json()["id"]


def test_a_request_that_failed_may_be_sent_again_with_its_key(api, key, body, monkeypatch):
    def fail(*_args, **_how):
        raise RuntimeError

    with monkeypatch.context() as broken:
        broken.setattr("service.datasets.create", fail)
        failed = api("POST", "/datasets", json=body, headers=key)
    again = api("POST", "/datasets", json=body, headers=key)

    assert (failed.status_code, again.status_code) == (500, 201)


def test_while_the_first_is_being_answered_a_repeat_gets_409(api, key, body, monkeypatch):
    from service import datasets

    create, entered, leave = datasets.create, threading.Event(), threading.Event()

    def slowly(session, **how):
        session.rollback()  # SQLite has one writer: the repeat must be able to look
        entered.set()
        assert leave.wait(20)
        return create(session, **how)

    monkeypatch.setattr("service.datasets.create", slowly)
    answers = []
    send = lambda: answers.append(api("POST", "/datasets", json=body, headers=key))  # noqa: E731
    first = threading.Thread(target=send)
    first.start()
    assert entered.wait(20)
    repeat = api("POST", "/datasets", json=body, headers=key)
    leave.set()
    first.join()

    assert (repeat.status_code, repeat.json()["code"]) == (409, "idempotency_in_flight")
    assert "retry-after" in repeat.headers
    assert answers[0].status_code == 201


@pytest.mark.parametrize("is_old", [True, False])
def test_a_claim_whose_process_was_killed_is_taken_over_after_a_while(api, key, body, is_old):
    _claim_as_if_killed(api, key, body, is_old=is_old)

    response = api("POST", "/datasets", json=body, headers=key)

    assert response.status_code == (201 if is_old else 409)


def _kept(api, key) -> str:
    """What the database has of a caller's key."""
    return site_pseudonyms(api.settings.data_dir).text(key["Idempotency-Key"])


def _claim_as_if_killed(api, key, body, *, is_old: bool) -> None:
    """Leave the row that a process leaves which is killed before it could answer."""
    api("POST", "/datasets", json=body, headers=key)
    name = _kept(api, key)
    change: dict[str, object] = {"status": None}
    if is_old:
        change["created_at"] = db.db_now(-idempotency.ABANDONED_S - 60)
    with api.sessions() as session:
        session.execute(
            update(db.Idempotency).where(db.Idempotency.key == name).values(**change),
            execution_options={"synchronize_session": False},
        )
        session.commit()
        assert session.scalars(select(db.Idempotency).where(db.Idempotency.key == name)).one()


def test_a_late_first_request_creates_nothing_once_its_repeat_took_over(api, key, body):
    _claim_as_if_killed(api, key, body, is_old=True)
    with api.sessions() as session:
        row = session.scalars(
            select(db.Idempotency).where(db.Idempotency.key == _kept(api, key))
        ).one()
        late = idempotency.Claim(row.principal, row.route, row.key, row.created_at)
    api("POST", "/datasets", json=body, headers=key)

    with api.sessions() as session, pytest.raises(Exception, match="idempotency_in_flight"):
        idempotency.record(session, late, idempotency.Answer(201, {}, {"id": "late"}))


@pytest.mark.parametrize("value", ["", "a b", "x" * 201, "ä"])
def test_a_key_that_is_none_is_refused(api, body, value):
    headers = {"Idempotency-Key": value.encode()}

    response = api("POST", "/datasets", json=body, headers=headers)

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_a_posted_run_is_queued_once(api, world, key):
    body = {
        "kind": "pretrain",
        "dataset_id": world.unlabelled,
        "model_name": "once",
        "recipe": {},
    }

    first, second = (api("POST", "/runs", json=body, headers=key) for _ in range(2))

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    assert second.headers["retry-after"] == first.headers["retry-after"]
