"""One project a session: whatever is asked, what another project has is not there."""

import pytest
from sqlalchemy import delete, func, inspect, select, text, update

from service import db, experiments, queue, registry, runs, schemas
from service.db import scope

SHARED = {
    db.Blob,
    db.EmbeddingSpace,  # how often a bundle's vectors changed
    db.EmbeddingChange,  # ids of volumes whose vector did; read under the scope of `Embedding`
    db.Idempotency,  # of one token
    db.Token,
    db.WarmModel,
    db.WarmRequest,
    db.WorkerHeartbeat,
}
"""Tables without a project, of which no route shows a row of another's."""


@pytest.fixture
def two(sessions):
    """Sessions of two projects, of which the first has a run."""
    with sessions() as session:
        for name in ("a", "b"):
            session.add(db.Project(id=f"prj_{name}", name=name))
        session.commit()
    return db.of_project(sessions, "prj_a"), db.of_project(sessions, "prj_b")


@pytest.fixture
def run_id(two):
    with two[0]() as session:
        run = runs.create(session, kind="segment", spec={}, principal="tok_a")
        session.commit()
        return run.id


def test_every_table_is_owned_or_shared_on_purpose():
    tables = {mapper.class_ for mapper in db.Base.registry.mappers}
    with_column = {one for one in tables if "project_id" in inspect(one).columns} - {db.Token}

    assert tables == {*scope.OWNED, *scope.OWNER, *SHARED, db.Project}
    assert with_column == set(scope.OWNED)


ASKED = {
    "by key": lambda run_id: select(db.Run).where(db.Run.id == run_id),
    "a column": lambda run_id: select(db.Run.id),
    "a count": lambda run_id: select(func.count()).where(db.Run.id == run_id),
    "a count from": lambda run_id: select(func.count()).select_from(db.Run),
    "in a subquery": lambda run_id: select(func.count()).select_from(select(db.Run).subquery()),
    "its events": lambda run_id: select(db.RunEvent).where(db.RunEvent.run_id == run_id),
    "joined": lambda run_id: select(db.RunEvent.seq).join(db.Run, db.Run.id == db.RunEvent.run_id),
    "an alias": lambda run_id: select(scope_alias().id),
    "a union": lambda run_id: select(db.Run.id).union_all(select(db.RunEvent.run_id)),
    "an update": lambda run_id: update(db.Run).values(priority=1).returning(db.Run.id),
    "a delete": lambda run_id: delete(db.RunEvent).returning(db.RunEvent.seq),
}


def scope_alias():
    from sqlalchemy.orm import aliased

    return aliased(db.Run)


@pytest.mark.parametrize("asked", ASKED)
def test_a_session_finds_and_changes_its_projects_rows_alone(two, run_id, asked):
    """The first project's own session is the control: there it is found."""
    options = {"synchronize_session": False}

    def found(sessions):
        with sessions() as session:
            rows = session.execute(ASKED[asked](run_id), execution_options=options).all()
            return [row for row in rows if row[0] != 0]

    assert found(two[1]) == []
    assert found(two[0]) != []


def test_a_row_got_by_its_key_is_one_of_the_project(two, run_id):
    with two[1]() as session:
        assert session.get(db.Run, run_id) is None
    with two[0]() as session:
        assert session.get(db.Run, run_id) is not None


@pytest.mark.parametrize(
    "statement",
    [
        text("SELECT id FROM run"),
        text("UPDATE run SET priority = 1"),
        text("DELETE FROM run_event"),
        text("SELECT e.seq FROM worker_heartbeat, run_event AS e"),
        select(db.Run.__table__.c.id),
        db.Run.__table__.update().values(priority=1),
    ],
)
def test_a_statement_that_could_slip_through_is_refused(two, sessions, statement):
    """A session of all projects is the control: it may."""
    with two[0]() as session, pytest.raises(scope.UnscopedError):
        session.execute(statement)
    with sessions() as session:
        session.execute(statement)


def test_new_rows_are_the_sessions_projects_and_no_others(two, run_id):
    with two[1]() as session:
        session.add(db.Dataset(id="ds_x", name="n", digest="0" * 64, created_by="t"))
        session.commit()
        session.add(
            db.Dataset(id="ds_y", name="n", digest="0" * 64, created_by="t", project_id="prj_a")
        )
        with pytest.raises(scope.UnscopedError):
            session.flush()
    with two[1]() as session:
        assert session.scalars(select(db.Dataset.project_id)).all() == ["prj_b"]


def test_a_model_of_the_same_name_is_another_in_another_project(two):
    for sessions in two:
        with sessions() as session:
            made = [
                registry.register(session, "liver", kind="encoder", digest="0" * 64, manifest={})
                for _ in range(2)
            ]
            registry.set_alias(session, "liver", "champion", 1, principal="t")
            session.commit()
            assert [one.version for one in made] == [1, 2]
    with two[0]() as session:
        registry.set_alias(session, "liver", "champion", 2, principal="t")
        session.commit()

    with two[1]() as session:
        assert registry.get_alias(session, "liver", "champion").version == 1


def test_what_a_run_made_is_registered_in_its_project(two, sessions):
    with two[1]() as session:
        run_id = runs.create(session, kind="pretrain", spec={}, principal="tok").id
        session.commit()
    new = runs.NewVersion("encoder", "encoder", "1" * 64, {})
    with sessions() as session:  # a worker's
        lease = runs.claim(session, run_id, "train", "w")
        runs.started(session, lease)
        runs.finish(session, lease, db.RunState.SUCCEEDED, outcome="done", register=new)

    with two[1]() as session:
        assert registry.of_run(session, run_id).model_name == "encoder"
    with two[0]() as session:
        assert registry.listing(session) == []


def test_what_upkeep_queues_for_an_experiment_is_its_projects(two, sessions):
    finetune = {"kind": "finetune", "network": {"base_width": 2}, "labels": {"liver": 1}}
    asked = {
        "name": "Liver",
        "source_dataset_id": f"ds_{'0' * 32}",
        "target_dataset_id": f"ds_{'0' * 32}",
        "methods": [{"name": "scratch"}],
        "finetune": finetune,
    }
    plan = schemas.ExperimentCreate.model_validate(asked).plan().model_dump(mode="json")
    named = {"name": "n", "created_by": "t"}
    both = {f"{one}_dataset_id": f"ds_{'0' * 32}" for one in ("source", "target")}
    with two[1]() as session:
        session.add(db.Dataset(id=f"ds_{'0' * 32}", digest="0" * 64, **named))
        session.flush()
        session.add(db.Experiment(id="exp_x", plan=plan, **both, **named))
        session.commit()

    with sessions() as session:
        made = experiments.advance(session, "exp_x")
        session.commit()

    assert {run.project_id for run in made} == {"prj_b"}


def test_a_position_counts_the_runs_of_every_project(two, run_id):
    with two[1]() as session:
        run = runs.create(session, kind="segment", spec={}, principal="tok_b")
        session.commit()

        assert queue.position(session, run) == 2


def test_what_projects_share_is_seen_everywhere_on_purpose(two, run_id):
    with two[1]() as session:
        count = select(func.count()).select_from(db.Run)

        assert session.scalar(count) == 0
        assert session.scalar(db.everywhere(count)) == 1
