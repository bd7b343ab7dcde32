"""Whose turn it is: priority, then fair shares, then age; and only what fits the worker."""

import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from sqlalchemy import select, text, update

from service import db, migrate, queue, runs
from service.queue import Able
from service.runs import claiming
from service.settings import Settings


@pytest.fixture
def postgres_sessions(postgres_url):
    """Sessions on PostgreSQL, where writers are beside each other."""
    migrate.upgrade(postgres_url)
    engine = db.connect(postgres_url)
    yield db.sessions(engine)
    engine.dispose()


def put(session, project: str, number: int = 1, **how) -> list[str]:
    kind = how.pop("kind", "segment")
    db.insert_if_absent(session, db.Project, id=f"prj_{project}", name=project)
    with db.within(session, f"prj_{project}"):
        made = [
            runs.create(session, kind=kind, spec={}, principal="tok", **how).id
            for _ in range(number)
        ]
    session.commit()
    return made


NEXT = {"lease_s": 30.0, "able": queue.ANYTHING, "only": None}


def taking(sessions, limit: int) -> str | None:
    """Claim in a session of its own, as another process does."""
    with sessions() as session:
        return take(session, finish=False, max_running=limit)


def until_it_waits(sessions, claim: Future) -> None:
    """Until the claim waits for a lock on the project, or has gone on without."""
    waits = text(
        "SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database "
        "WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()"
    )
    with sessions() as session:
        while not claim.done() and not session.scalar(waits):
            session.rollback()


def take(session, *, finish: bool = True, **how) -> str | None:
    """Claim a run and end it; returns whose it was."""
    lease = runs.claim(session, None, how.pop("queue", "inference"), "w", **how)
    if lease is None:
        return None
    project = lease.project_id.removeprefix("prj_")
    session.rollback()
    if finish:
        runs.finish(session, lease, db.RunState.SUCCEEDED, outcome="done")
    return project


def test_a_projects_hundred_runs_do_not_starve_anothers_one(sessions):
    with sessions() as session:
        put(session, "busy", 100)
        put(session, "quiet", 1)

        order = [take(session) for _ in range(3)]

    assert "quiet" in order[:2]


@pytest.mark.parametrize(("other", "taken"), [("segment", 1), ("embed", 4)])
def test_runs_done_together_end_where_anothers_turn_comes(sessions, other, taken):
    """The second is the control: of one kind they go on, each project in turn."""
    with sessions() as session:
        put(session, "busy", 3, kind="embed")
        put(session, "quiet", 1, kind=other)

        order = [take(session, finish=False)]
        while (project := take(session, finish=False, only=db.RunKind.EMBED)) is not None:
            order.append(project)

    assert len(order) == taken


def test_by_age_alone_the_one_would_have_waited_for_all_hundred(sessions):
    """The control: the fallback is in order of age, and there the hundred come first."""
    with sessions() as session:
        put(session, "busy", 100)
        (last,) = put(session, "quiet", 1)
        first = session.scalar(select(queue.any_turn("inference")))

    assert first != last


def test_shares_are_even_among_projects_that_all_want_much(sessions):
    with sessions() as session:
        for project, number in (("a", 30), ("b", 20), ("c", 10)):
            put(session, project, number)

        taken = Counter(take(session) for _ in range(30))

    assert taken == {"a": 10, "b": 10, "c": 10}


def test_runs_under_way_count_however_long_ago_they_began(sessions):
    with sessions() as session:
        put(session, "busy", 3, kind="pretrain")
        assert take(session, queue="train", finish=False) == "busy"
        session.execute(
            update(db.Run)
            .where(db.Run.state == "starting")
            .values(started_at=db.db_now(-30 * 86400.0)),
            execution_options={"synchronize_session": False},
        )
        session.commit()
        put(session, "quiet", 1, kind="pretrain")

        assert take(session, queue="train") == "quiet"


def test_runs_that_began_long_ago_and_ended_are_forgotten(sessions):
    with sessions() as session:
        put(session, "busy", 2)
        take(session)
        session.execute(
            update(db.Run).where(db.Run.state == "succeeded").values(started_at=db.db_now(-7200.0)),
            execution_options={"synchronize_session": False},
        )
        session.commit()
        put(session, "quiet", 1)

        assert take(session) == "busy"  # older, and nothing counts against it any more


def test_priority_goes_before_fairness(sessions):
    with sessions() as session:
        put(session, "quiet", 1)
        put(session, "busy", 3, priority=5)

        assert [take(session) for _ in range(4)] == ["busy"] * 3 + ["quiet"]


@pytest.mark.parametrize(
    ("needs", "takes"),
    [
        (Able(), True),
        (Able("cpu"), True),
        (Able("cuda"), False),
        (Able("cpu", 2 * 2**30), True),
        (Able("cpu", 64 * 2**30), False),
        (Able("", 64 * 2**30), False),
    ],
)
def test_a_worker_takes_what_fits_it(sessions, needs, takes):
    with sessions() as session:
        put(session, "a", 1, needs=needs)

        assert (take(session, able=Able("cpu", 8 * 2**30)) == "a") is takes


def test_a_run_that_fits_goes_past_one_that_does_not(sessions):
    with sessions() as session:
        put(session, "a", 1, needs=Able("cuda"), priority=9)
        put(session, "b", 1)

        assert take(session, able=Able("cpu", 2**30)) == "b"
        assert take(session, able=Able("cpu", 2**30)) is None
        assert take(session, able=Able("cuda", 2**30)) == "a"


def test_a_project_at_its_limit_waits_while_others_go_on(sessions):
    with sessions() as session:
        put(session, "busy", 5)
        put(session, "quiet", 1)
        taken = [take(session, finish=False, max_running=2) for _ in range(4)]

        assert Counter(taken) == {"busy": 2, "quiet": 1, None: 1}
        assert take(session, finish=False) == "busy"  # the control: without a limit


@pytest.mark.parametrize(("limit", "taken"), [(1, ["busy", "quiet", None]), (0, ["busy"] * 3)])
def test_claims_at_once_do_not_pass_a_projects_limit(postgres_sessions, limit, taken):
    """The first is not committed when the second chooses; without a limit it is no matter."""
    with postgres_sessions() as session:
        put(session, "busy", 5, priority=1)
        put(session, "quiet", 1)
    with postgres_sessions() as first, ThreadPoolExecutor(1) as pool:
        run = claiming._next(first, "inference", "w", max_running=limit, **NEXT)

        second = pool.submit(taking, postgres_sessions, limit)
        until_it_waits(postgres_sessions, second)
        first.commit()

        found = [run.project_id.removeprefix("prj_"), second.result()]
    assert [*found, taking(postgres_sessions, limit)] == taken


def test_a_claimer_that_is_frozen_stops_nobody_elses_runs(postgres_sessions, monkeypatch):
    monkeypatch.setattr(claiming, "ROOM_WAIT_MS", 10)
    with postgres_sessions() as session:
        put(session, "busy", 5, priority=1)
        put(session, "quiet", 1)
    with postgres_sessions() as frozen:
        assert claiming._next(frozen, "inference", "w", max_running=2, **NEXT) is not None

        assert [taking(postgres_sessions, 2) for _ in range(2)] == ["quiet", None]
    assert taking(postgres_sessions, 2) == "busy"  # the control: it is gone, and there is room


def test_a_projects_own_limit_goes_before_the_sites(sessions):
    with sessions() as session:
        for project, own in (("one", 1), ("any", 0), ("sites", None)):
            put(session, project, 4)
            found = session.get(db.Project, f"prj_{project}")
            found.max_running = own
        session.commit()

        taken = Counter(take(session, finish=False, max_running=2) for _ in range(12))

    assert taken == {"one": 1, "any": 4, "sites": 2, None: 5}


def test_positions_are_the_order_in_which_runs_are_claimed(sessions):
    with sessions() as session:
        put(session, "a", 4)
        put(session, "b", 2)
        put(session, "c", 1, priority=3)
        put(session, "a", 1, priority=-3)
        take(session)
        waiting = session.scalars(select(db.Run).where(db.Run.state == "queued")).all()
        told = {run.id: queue.position(session, run) for run in waiting}
        session.rollback()

        claimed = []
        while (lease := runs.claim(session, None, "inference", "w")) is not None:
            claimed.append(lease.run_id)
            runs.finish(session, lease, db.RunState.SUCCEEDED, outcome="done")

    assert sorted(told, key=told.__getitem__) == claimed
    assert sorted(told.values()) == list(range(1, len(claimed) + 1))


@pytest.mark.parametrize(("num_claimed", "position"), [(0, 2), (1, 1)])
def test_a_run_that_is_claimed_while_a_position_is_asked_is_no_longer_ahead(
    postgres_sessions, monkeypatch, num_claimed, position
):
    """The claim commits between the counting and the look (each statement its own snapshot)."""
    sessions = postgres_sessions
    with sessions() as session:
        put(session, "other", 1)
        (mine,) = put(session, "a")
    count = queue._waiting_counts

    def then_claim(*asked):
        counted = count(*asked)
        with sessions() as worker:
            for _ in range(num_claimed):
                assert take(worker, finish=False) == "other"
        return counted

    monkeypatch.setattr(queue, "_waiting_counts", then_claim)
    with sessions() as session:
        assert queue.position(session, runs.get(session, mine)) == position


def test_a_run_that_does_not_wait_has_no_position(sessions):
    with sessions() as session:
        (run_id,) = put(session, "a")
        assert queue.position(session, runs.get(session, run_id)) == 1
        take(session)

        assert queue.position(session, runs.get(session, run_id)) is None


def test_claims_at_once_take_different_runs_of_few_projects(sessions):
    with sessions() as session:
        put(session, "a", 20)
        put(session, "b", 5)
    taken, lock = [], threading.Lock()

    def work():
        with sessions() as session:
            while (lease := runs.claim(session, None, "inference", "w")) is not None:
                with lock:
                    taken.append(lease.run_id)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(taken) == len(set(taken)) == 25


def test_while_a_callers_only_run_is_being_claimed_others_are_taken(postgres_sessions):
    """A claimer that is frozen inside its transaction stops nobody (PostgreSQL's row locks)."""
    make = postgres_sessions
    with make() as session:
        (locked,) = put(session, "quiet", 1)
        put(session, "busy", 3)
        take(session, finish=False)  # quiet's, the oldest
        session.execute(update(db.Run).where(db.Run.id == locked).values(state="queued"))
        session.execute(update(db.Run).values(started_at=None))
        session.commit()
    with make() as frozen, make() as session:
        frozen.execute(text("SELECT id FROM run WHERE id = :id FOR UPDATE"), {"id": locked})

        assert take(session) == "busy"


def test_settings_know_a_gpu_by_its_number(tmp_path):
    assert Settings(data_dir=tmp_path, device="cuda:1").device == "cuda:1"
