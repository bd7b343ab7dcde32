"""What tests share: a fresh database of each kind, a Redis of their own, a store."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, MetaData, create_engine, func, make_url, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

POSTGRES_URL = os.environ.get(
    "PCRL_TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1:5432"
)
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
REDIS_URL = os.environ.get("PCRL_TEST_REDIS_URL", f"redis://127.0.0.1:6379/{9 + WORKER}")

if WORKERS > 1:  # each process, and what it starts, keeps to its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


def _absent(what: str) -> None:
    """Skip, or fail where the servers were promised."""
    if os.environ.get("PCRL_TEST_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what}, and PCRL_TEST_REQUIRE_SERVICES=1 forbids to skip")
    pytest.skip(what)


@pytest.fixture(scope="session")
def postgres_admin() -> Iterator[Engine]:
    """The test server of PostgreSQL, for making databases."""
    url = make_url(POSTGRES_URL)
    engine = create_engine(
        url.set(database=url.database or "postgres"),
        isolation_level="AUTOCOMMIT",
        connect_args={"connect_timeout": 3},
    )
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except OperationalError:
        engine.dispose()
        _absent(f"no PostgreSQL answers at {url.host}:{url.port}")
    yield engine
    engine.dispose()


@pytest.fixture
def new_postgres(postgres_admin: Engine) -> Iterator[Callable[[], str]]:
    """Makes databases on the test server, and drops them after the test."""
    names: list[str] = []

    def make() -> str:
        names.append(f"pcrl_test_{uuid.uuid4().hex}")
        with postgres_admin.connect() as connection:
            connection.execute(text(f'CREATE DATABASE "{names[-1]}"'))
        url = make_url(POSTGRES_URL).set(database=names[-1])
        return url.render_as_string(hide_password=False)

    yield make
    with postgres_admin.connect() as connection:
        for name in names:
            connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


@pytest.fixture
def postgres_url(new_postgres: Callable[[], str]) -> str:
    """A fresh, empty PostgreSQL database."""
    return new_postgres()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A fresh, empty SQLite database."""
    return f"sqlite:///{tmp_path / 'test.sqlite3'}"


class SharedPostgres:
    """One migrated database for many tests of a process, each of which finds it as a new one."""

    def __init__(self, admin: Engine) -> None:
        self._admin = admin
        self._name = f"pcrl_shared_{uuid.uuid4().hex}"
        url = make_url(POSTGRES_URL).set(database=self._name)
        self.url = url.render_as_string(hide_password=False)
        self._engine = create_engine(url, poolclass=NullPool)
        self._make()

    def _make(self) -> None:
        from service import migrate

        with self._admin.connect() as connection:
            connection.execute(text(f'CREATE DATABASE "{self._name}"'))
        migrate.upgrade(self.url)
        metadata = MetaData()
        metadata.reflect(self._engine)
        revisions = metadata.tables["alembic_version"]
        metadata.remove(revisions)
        self._tables = list(metadata.tables.values())
        with self._engine.connect() as connection:
            self._revision = connection.scalar(select(revisions.c.version_num))
            self._rows = {
                table: [dict(row) for row in connection.execute(select(table)).mappings()]
                for table in self._tables
            }

    def drop(self) -> None:
        """Remove it, whoever is connected."""
        with self._admin.connect() as connection:
            connection.execute(text(f'DROP DATABASE IF EXISTS "{self._name}" WITH (FORCE)'))

    def renew(self) -> None:
        """Close what a test left open, and put the rows back that the migrations made."""
        with self._engine.begin() as connection:
            revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
            assert revision == self._revision, "a test that migrates has to ask for `unshared`"
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
            connection.execute(text("SET session_replication_role = replica"))  # no foreign keys
            names = [f'"{table.name}"' for table in self._tables]
            sizes = [select(func.pg_relation_size(name)).scalar_subquery() for name in names]
            if any(size > 1 << 20 for size in connection.execute(select(*sizes)).one()):
                connection.execute(text(f"TRUNCATE {', '.join(names)}"))
            else:  # sooner done where there are few rows
                connection.execute(text("; ".join(f"DELETE FROM {name}" for name in names)))
            for table, rows in self._rows.items():
                if rows:
                    connection.execute(table.insert(), rows)
            connection.execute(
                text("SELECT setval(c.oid, 1, false) FROM pg_class c WHERE c.relkind = 'S'")
            )


@pytest.fixture(scope="session")
def shared_postgres(postgres_admin: Engine) -> Iterator[SharedPostgres]:
    """The migrated database of this process."""
    shared = SharedPostgres(postgres_admin)
    yield shared
    shared.drop()


@pytest.fixture
def unshared() -> None:
    """For a test that changes tables: its database is no other's."""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh, empty database: the test runs once on SQLite and once on PostgreSQL.

    For a test that has it migrated at once (`engine`), PostgreSQL's is there already.
    """
    asked = set(request.fixturenames)
    if request.param == "postgresql" and "engine" in asked and "unshared" not in asked:
        shared: SharedPostgres = request.getfixturevalue("shared_postgres")
        shared.renew()
        return shared.url
    fixture = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    url: str = request.getfixturevalue(fixture)
    return url


@pytest.fixture(scope="session")
def newest_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite database at the newest revision: a copy of it spares a test its migration."""
    from service import migrate

    path = tmp_path_factory.mktemp("newest") / "pcrl.sqlite3"
    migrate.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated(newest_sqlite: Path) -> Callable[[str], None]:
    """Brings an empty database to the newest revision; on SQLite by a copy of one that is there.

    `SharedPostgres` is there already.
    """
    from service import migrate

    def make(url: str) -> None:
        path = Path(make_url(url).database or "")
        if not url.startswith("sqlite") or path.exists():
            if "pcrl_shared" not in url:
                migrate.upgrade(url)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(newest_sqlite, path)

    return make


@pytest.fixture
def engine(database_url: str, migrated: Callable[[str], None]) -> Iterator[Engine]:
    """An engine on a fresh database at the newest revision."""
    from service import db

    migrated(database_url)
    engine = db.connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions on a fresh, migrated database."""
    from service import db

    return db.sessions(engine)


@pytest.fixture
def redis_url() -> Iterator[str]:
    """The test server's Redis database, emptied before and after."""
    import redis

    client = redis.Redis.from_url(REDIS_URL, socket_connect_timeout=3)
    try:
        client.ping()
    except redis.ConnectionError:
        client.close()
        _absent("no Redis answers at PCRL_TEST_REDIS_URL")
    client.flushdb()
    yield REDIS_URL
    client.flushdb()
    client.close()
