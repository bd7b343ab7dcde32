"""The migrations make exactly the tables that the models describe, forth and back, with rows."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from service import db, migrate, runs
from service.db import connection

pytestmark = pytest.mark.usefixtures("unshared")


def differences(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, db.Base.metadata))


def test_the_migrated_tables_are_the_models_tables(engine):
    assert differences(engine) == []


def test_the_comparison_sees_a_missing_column(engine):
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE run DROP COLUMN progress"))

    assert any("progress" in str(found) for found in differences(engine))


def test_it_goes_down_and_up_again_with_rows_in_the_tables(engine, sessions, database_url):
    with sessions() as session:
        runs.create(session, kind="pretrain", spec={}, principal="tok_test")
        session.add(db.Model(name="liver", kind="segmenter"))
        session.flush()
        session.add(db.ModelVersion(model_name="liver", version=1, digest="0" * 64, manifest={}))
        session.commit()

    migrate.downgrade(database_url, "base")
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    migrate.upgrade(database_url)

    assert migrate.is_current(engine)
    assert differences(engine) == []


def test_constraints_have_the_names_of_the_convention(engine):
    names = {check["name"] for check in inspect(engine).get_check_constraints("run")}

    assert names == {"ck_run_state"}


def test_an_empty_database_is_not_current(database_url):
    engine = db.connect(database_url)

    assert not migrate.is_current(engine)
    engine.dispose()


@pytest.mark.parametrize(
    "database_url",
    [pytest.param("sqlite", marks=pytest.mark.nightly), "postgresql"],
    indirect=True,
)
def test_several_processes_may_migrate_at_once(database_url):
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(migrate.upgrade, [database_url] * 3))

    engine = db.connect(database_url)
    assert migrate.is_current(engine)
    engine.dispose()


def test_migrations_work_from_another_folder(sqlite_url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    migrate.upgrade(sqlite_url)

    assert (tmp_path / "test.sqlite3").is_file()


def test_the_folder_of_a_sqlite_database_is_made(tmp_path: Path):
    migrate.upgrade(f"sqlite:///{tmp_path / 'new' / 'db.sqlite3'}")

    assert (tmp_path / "new" / "db.sqlite3").is_file()


@pytest.mark.parametrize("seconds", [-5.0, 0.0, 7.5])
def test_the_databases_clock_shifts_by_seconds(engine, seconds):
    with engine.connect() as connection:
        from sqlalchemy import select

        now, shifted = connection.execute(select(db.db_now(), db.db_now(seconds))).one()

    assert abs((shifted - now).total_seconds() - seconds) < 0.05


@pytest.mark.services
def test_a_lock_is_waited_for_so_long_and_another_migrator_however_long(postgres_url, monkeypatch):
    other = db.connect(postgres_url)
    with other.connect() as holder, ThreadPoolExecutor(1) as pool:
        assert holder.execute(text("SHOW lock_timeout")).scalar_one() == connection.LOCK_TIMEOUT
        holder.execute(text(f"SELECT pg_advisory_xact_lock({0x7063726C})"))
        monkeypatch.setattr(connection, "LOCK_TIMEOUT", "1ms")
        migrated = pool.submit(migrate.upgrade, postgres_url)
        waits = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        while not (migrated.done() or holder.execute(waits).scalar_one()):
            time.sleep(0.01)
        time.sleep(0.1)  # a hundred times as long as any other lock would be waited for

        assert not migrated.done()
        holder.rollback()
        migrated.result()
    other.dispose()
