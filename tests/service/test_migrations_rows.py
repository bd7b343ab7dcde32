"""T-O1: every revision down and up with a row in every table; one migrator; no wrong schema."""

import fcntl
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import func, inspect, select, text
from sqlalchemy.exc import IntegrityError

from service import db, migrate
from service.db import scope
from service.stack import environment

pytestmark = pytest.mark.usefixtures("unshared")

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def fill(engine) -> dict[str, int]:
    """At least one row in every table, in the order of the foreign keys; returns the counts."""
    sha = "0" * 64
    known = {
        ("volume", "kind"): "image",
        ("upload", "kind"): "image",
        ("dataset_item", "split"): "train",
        ("dataset_item", "labels_id"): None,
        ("run", "state"): "queued",
        ("run", "queue"): "inference",
        ("batch", "kind"): "segment",
        ("embedding", "dims"): 1,
        ("embedding", "region"): "",
        ("embedding", "vector"): b"\0\0\0\0",
        ("upload", "received_bytes"): 0,
        ("upload", "size_bytes"): 1,
    }

    def value(table, column):
        if column.name == "project_id":
            return db.DEFAULT_PROJECT
        if (table.name, column.name) in known:
            return known[table.name, column.name]
        for key in column.foreign_keys:
            return value(key.column.table, key.column)
        if "sha256" in column.name or (column.name == "digest" and table.name != "token"):
            return sha
        kind = column.type.python_type if not isinstance(column.type, db.UtcDateTime) else datetime
        values = {str: "x", int: 1, bytes: b"1" * 32, datetime: NOW, dict: {}, list: []}
        return values.get(kind, {})

    with engine.begin() as connection:
        by_triggers = ("embedding_space", "embedding_change")  # of the row of `embedding`
        for table in db.Base.metadata.sorted_tables:
            if table.name in by_triggers:
                continue
            row = {column.name: value(table, column) for column in table.columns}
            connection.execute(table.insert().values(**row))
    return counts(engine)


def counts(engine) -> dict[str, int]:
    with engine.connect() as connection:
        there = set(inspect(engine).get_table_names()) - {"alembic_version"}
        return {
            name: connection.scalar(select(func.count()).select_from(text(f'"{name}"')))
            for name in sorted(there)
        }


def revisions() -> list[str]:
    return [script.revision for script in scripts().walk_revisions()]


def scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(migrate._config(""))


def test_the_revisions_are_those_that_alembic_knows():
    assert migrate.head() == "+".join(scripts().get_heads())
    assert all(migrate.is_known(revision) for revision in revisions())
    assert not migrate.is_known("9999")


def test_t_o1_each_revision_goes_down_and_up_with_rows_in_every_table(engine, database_url):
    before = fill(engine)
    assert set(before) == set(db.Base.metadata.tables)
    assert min(before.values()) == 1  # the control: there is something to lose

    for below in [*revisions()[1:]]:
        migrate.downgrade(database_url, below)
        kept = counts(engine)
        assert {name: before[name] for name in kept} == kept
        assert migrate.found(engine) == below
        migrate.upgrade(database_url)
        assert migrate.is_current(engine)
        after = counts(engine)
        assert {name: after[name] for name in kept} == kept
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert list(compare_metadata(context, db.Base.metadata)) == []


def test_going_below_regions_keeps_the_vectors_of_whole_volumes_alone(engine, database_url):
    fill(engine)
    copied = (
        "INSERT INTO embedding SELECT bundle_digest, 'liver', volume_id, model_name, "
        "model_version, run_id, dims, vector, created_at FROM embedding"
    )
    with engine.begin() as connection:
        connection.execute(text(copied))

    migrate.downgrade(database_url, "0008")
    below = counts(engine)
    migrate.upgrade(database_url)

    assert below["embedding"] == 1
    with engine.begin() as connection:
        assert connection.scalars(text("SELECT region FROM embedding")).all() == [""]
        connection.execute(text(copied))  # the triggers are there, and tell spaces apart
        spaces = connection.execute(text("SELECT region, revision FROM embedding_space")).all()
        changes = connection.scalar(text("SELECT count(*) FROM embedding_change"))
    assert sorted(tuple(one) for one in spaces) == [("", 1), ("liver", 1)]
    assert changes == 2


def test_a_migration_that_breaks_off_leaves_the_tables_as_they_were(engine, database_url):
    fill(engine)
    migrate.downgrade(database_url, "0003")
    engine.dispose()  # SQLite would look for names among the tables that it read before
    with engine.begin() as connection:  # the last step of 0006 will meet it
        connection.execute(text("CREATE INDEX ix_run_share ON run (queue)"))
    columns = {column["name"] for column in inspect(engine).get_columns("run")}

    with pytest.raises(Exception, match="ix_run_share"):
        migrate.upgrade(database_url)

    assert migrate.found(engine) == "0003"
    assert {column["name"] for column in inspect(engine).get_columns("run")} == columns
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_run_share"))
    migrate.upgrade(database_url)
    assert migrate.is_current(engine)


def test_going_below_projects_is_refused_while_another_owns_something(engine, database_url):
    fill(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE dataset SET project_id = 'x'"))

    with pytest.raises(RuntimeError, match="project x owns rows of dataset"):
        migrate.downgrade(database_url, "0010")

    assert migrate.is_current(engine)


def test_what_was_there_before_projects_is_the_default_ones(engine, database_url):
    fill(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE token SET role = 'viewer'"))
    migrate.downgrade(database_url, "0010")
    migrate.upgrade(database_url)

    with engine.connect() as connection:
        for table in (*scope.OWNED, db.Token):
            found = connection.scalars(select(table.__table__.c.project_id)).all()
            assert set(found) == {db.DEFAULT_PROJECT}, table


def at(engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})


@pytest.mark.parametrize(
    ("revision", "says"), [("0003", "run `pcrl migrate`"), ("9999", "does not know")]
)
def test_tables_of_another_version_are_refused_with_what_to_do(engine, revision, says):
    migrate.require_current(engine)  # the control
    at(engine, revision)

    with pytest.raises(migrate.SchemaError, match=says):
        migrate.require_current(engine)


def test_nothing_migrates_a_newer_versions_database(engine, database_url):
    at(engine, "9999")

    with pytest.raises(migrate.SchemaError, match="9999"):
        migrate.upgrade(database_url)


@pytest.mark.parametrize("command", [["api"], ["upkeep"], ["worker", "--queue", "train"]])
def test_no_process_starts_on_tables_of_another_version(tmp_path, command):
    from service.settings import Settings

    settings = Settings(data_dir=tmp_path)
    migrate.upgrade(settings.database_url, "0003")
    env = environment(settings)
    env.pop("PCRL_SUPERVISOR_PID")

    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *command],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == os.EX_CONFIG
    assert "run `pcrl migrate`" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_migrator_of_a_sqlite_database_waits_for_the_first(sqlite_url, tmp_path):
    lock = os.open(tmp_path / "test.sqlite3.migrate", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    second = threading.Thread(target=migrate.upgrade, args=(sqlite_url,))
    second.start()
    second.join(0.5)
    waited = second.is_alive() and not (tmp_path / "test.sqlite3").exists()
    os.close(lock)
    second.join(60)

    assert waited
    engine = db.connect(sqlite_url)
    assert migrate.is_current(engine)
    engine.dispose()


def test_going_below_classes_is_refused_while_a_dataset_has_some(engine, database_url):
    fill(engine)
    classes = text("UPDATE dataset_item SET classes = :classes")
    with engine.begin() as connection:
        connection.execute(classes, {"classes": '{"nodule": 1}'})

    with pytest.raises(RuntimeError, match="1 items of datasets have classes"):
        migrate.downgrade(database_url, "0011")

    assert migrate.is_current(engine)
    with engine.begin() as connection:
        connection.execute(classes, {"classes": None})
    migrate.downgrade(database_url, "0011")


@pytest.mark.parametrize("table", ["volume", "upload"])
def test_going_below_2d_images_is_refused_while_there_is_one(engine, database_url, table):
    fill(engine)
    kinds = text(f"UPDATE {table} SET kind = :kind")
    with engine.begin() as connection:
        connection.execute(kinds, {"kind": "image_2d"})

    with pytest.raises(RuntimeError, match=f"1 rows of {table} are 2D images"):
        migrate.downgrade(database_url, "0011")

    assert migrate.is_current(engine)
    with engine.begin() as connection:
        connection.execute(kinds, {"kind": "image"})
    migrate.downgrade(database_url, "0011")
    with pytest.raises(IntegrityError), engine.begin() as connection:  # nobody below knows it
        connection.execute(kinds, {"kind": "image_2d"})
