"""What was live when, and the way back."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from service import moves, registry
from service.db import AliasEvent
from service.errors import ServiceError

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def session(sessions):
    with sessions() as session:
        for digest in "abc":
            registry.register(
                session, "liver", kind="segmenter", digest=digest * 64, manifest={"kind": "x"}
            )
        session.commit()
        yield session


def move(session, *versions):
    for version in versions:
        registry.set_alias(session, "liver", "champion", version, principal="t")
    session.commit()


def back(session, revision):
    row = moves.rollback(session, "liver", "champion", if_match=revision, principal="t")
    session.commit()
    return row.version


def test_rollbacks_go_back_one_version_each_and_never_forth(session):
    move(session, 1, 2, 2, 3)

    assert [back(session, 4), back(session, 5)] == [2, 1]
    with pytest.raises(ServiceError) as refused:
        back(session, 6)

    assert refused.value.code == "no_version_before"
    rows, after = moves.listing(session, "liver", "champion", size=2)
    assert [(row.version, row.cause) for row in rows] == [(1, "rollback"), (2, "rollback")]
    older, end = moves.listing(session, "liver", "champion", size=9, before=after)
    assert ([row.version for row in older], end) == ([3, 2, 2, 1], None)


def test_a_move_after_a_rollback_goes_back_to_where_the_rollback_led(session):
    move(session, 1, 2)
    back(session, 2)
    move(session, 3)

    assert back(session, 4) == 1


def test_of_many_rollbacks_at_once_one_happens(session, sessions):
    move(session, 1, 2, 3)
    start = threading.Barrier(6)

    def one(_):
        start.wait()
        with sessions() as mine:
            try:
                return back(mine, 3)
            except ServiceError as error:
                return error.code

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(one, range(6)))

    assert sorted(map(str, answers)) == ["2", *["precondition_failed"] * 5]
    session.rollback()
    assert registry.get_alias(session, "liver", "champion").revision == 4


def test_the_past_of_an_alias_is_found_by_time(session):
    move(session, 1, 3)
    registry.delete_alias(session, "liver", "champion", principal="t")
    session.commit()
    for day, event in enumerate(registry.alias_history(session, "liver", "champion")):
        session.execute(
            update(AliasEvent)
            .where(AliasEvent.seq == event.seq)
            .values(created_at=START + timedelta(days=day))
        )
    session.commit()

    def live(hours):
        try:
            return moves.at(session, "liver", "champion", START + timedelta(hours=hours)).version
        except ServiceError as error:
            return error.code

    assert [live(h) for h in (-1, 0, 23, 24, 47, 49)] == ["not_found", 1, 1, 3, 3, "not_found"]
    with pytest.raises(ServiceError):  # the version itself came later
        moves.resolve_at(session, "liver/1", START)
    assert moves.resolve_at(session, "liver", datetime.now(UTC) + timedelta(days=1)).version == 3
