"""Who waits for runs: one question for all of them, and everybody is told."""

import anyio
import pytest

from service import ends, events, runs
from service.db import RunState


@pytest.fixture
def database_url(sqlite_url):
    return sqlite_url


def queued(sessions, number):
    with sessions() as session:
        made = [
            runs.create(session, kind="embed", spec={}, principal="t").id for _ in range(number)
        ]
        session.commit()
    return made


def end(sessions, run_id):
    with sessions() as session:
        runs.request_cancel(session, run_id)  # of a queued run this is its end
        session.commit()
        assert runs.get(session, run_id).state == RunState.CANCELED


def test_everybody_who_waits_is_told_and_the_database_is_asked_for_all_at_once(
    sessions, monkeypatch
):
    ids, asked, told = queued(sessions, 5), [], {}
    ask = ends.Ends._going_on
    monkeypatch.setattr(
        ends.Ends, "_going_on", lambda self, which: asked.append(which) or ask(self, which)
    )

    async def wait(run_id):
        found = await events.wait_for_end(sessions, run_id, 5.0)
        told[run_id] = found and found.state

    async def everything():
        async with anyio.create_task_group() as group:
            for run_id in ids:
                group.start_soon(wait, run_id)
            await anyio.sleep(0.3)
            assert not told  # the control: nobody is told before
            for run_id in ids:
                await anyio.to_thread.run_sync(end, sessions, run_id)

    anyio.run(everything)

    assert told == dict.fromkeys(ids, "canceled")
    assert max(map(len, asked)) == len(ids)


def test_who_asks_about_an_ended_run_is_told_at_once_and_who_waits_in_vain_is_not(sessions):
    over, going_on = queued(sessions, 2)
    end(sessions, over)

    async def both():
        return [await events.wait_for_end(sessions, one, 0.0) for one in (over, going_on)]

    first, second = anyio.run(both)

    assert (first.state, second) == ("canceled", None)
