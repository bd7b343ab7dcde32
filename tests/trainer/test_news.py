"""What a training says reaches the database, and when it has stopped saying anything."""

from __future__ import annotations

import json

import pytest
from sqlalchemy.exc import OperationalError

from service import db, migrate, patience, runs
from trainer import news as news_file
from trainer.news import Follower, News
from trainer.stall import StallWatch


@pytest.fixture
def sessions(sqlite_url):
    migrate.upgrade(sqlite_url)
    engine = db.connect(sqlite_url)
    yield db.sessions(engine)
    engine.dispose()


def line(step, **values):
    return json.dumps({"event": "metric", "step": step, "values": values}) + "\n"


def claim(sessions):
    with sessions() as session:
        return runs.claim(session, None, "train", "w")


def test_metrics_that_a_killed_supervisor_had_not_written_are_replayed_once(sessions, tmp_path):
    with sessions() as session:
        run = runs.create(session, kind="pretrain", spec={}, principal="t")
        session.commit()
    first = claim(sessions)
    said = "".join([line(1, loss=3.0), "a library's print\n", line(2, loss=2.0), line(3, loss=1.0)])
    news_file.path_of(tmp_path, first).write_text(said + '{"event": "metric", "st')  # cut by a kill
    with sessions() as session:
        runs.record(session, first, "metric", {"step": 1, "values": {"loss": 3.0}})
        runs.give_back(session, first, "lost")
    second = claim(sessions)
    news_file.path_of(tmp_path, second).write_text(line(4, loss=0.5))  # its own: not replayed

    num = [News(sessions, second).replay(tmp_path) for _ in range(2)]

    assert num == [2, 0]
    with sessions() as session:
        points = [(one.step, one.value) for one in runs.metrics(session, run.id)]
    assert points == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_file_is_followed_line_by_line(tmp_path):
    path = tmp_path / "events"
    path.write_bytes(b"")
    with path.open("rb") as reading, path.open("ab", buffering=0) as writing:
        follower = Follower(reading)
        assert list(follower.lines()) == []
        writing.write(b"one\ntw")
        assert list(follower.lines()) == [b"one"]
        writing.write(b"o\nthree\n")
        assert list(follower.lines()) == [b"two", b"three"]
        writing.write(b"x" * (news_file.MAX_LINE_BYTES + 1))
        assert list(follower.lines()) == []  # no line of ours is so long
        writing.write(b"\nfour\n")
        assert list(follower.lines())[-1] == b"four"


def test_a_stage_without_a_pace_has_the_long_limit_and_one_with_a_pace_the_short():
    watch = StallWatch(3600.0, now=0.0)
    assert watch.limit_s() == 3600.0
    for step in range(5):
        watch.heard("train", step, now=float(step))
    assert watch.limit_s() == 600.0  # 20 x 1 s is less
    assert not watch.is_stalled(604.0)
    assert watch.is_stalled(604.1)
    watch.heard("train", 4, now=604.0)  # the same step told again
    assert watch.is_stalled(604.1)
    watch.heard("export", 0, now=605.0)
    assert (watch.limit_s(), watch.is_stalled(3000.0)) == (3600.0, False)


def test_slow_steps_are_given_twenty_times_their_pace():
    watch = StallWatch(3600.0, now=0.0)
    for step in range(5):
        watch.heard("train", step, now=step * 100.0)

    assert watch.limit_s() == 2000.0


def test_a_write_is_repeated_while_the_database_is_away_and_no_longer(sessions, monkeypatch):
    monkeypatch.setattr(patience, "PAUSE_S", 0.01)
    tries = []

    def write():
        tries.append(1)
        if len(tries) < 3:
            raise OperationalError("", {}, Exception())
        return "done"

    with sessions() as session:
        assert patience.patiently(session, write, for_s=5.0) == "done"
        assert len(tries) == 3
        tries.clear()
        with pytest.raises(OperationalError):  # the control: it ends
            patience.patiently(session, write, for_s=0.0)
        assert len(tries) == 1
