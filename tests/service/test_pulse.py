"""A worker's listening process beats in SQLite and forks the process that works: both in one."""

import os
import socket
import threading
import time

import pytest

from service import db, pulse
from service.settings import Settings


@pytest.fixture
def database_url(sqlite_url):
    return sqlite_url


def child_writes(database_url: str, ready: int) -> int:
    """Fork; the child exits with 0 if it could write, 1 if the database was locked, 2 otherwise."""
    pid = os.fork()
    if pid:
        return pid
    status = 2
    try:
        os.read(ready, 1)
        engine = db.connect(database_url)
        connection = engine.raw_connection()
        connection.execute("PRAGMA busy_timeout=1500")
        connection.execute("BEGIN IMMEDIATE")
        status = 0
    except Exception as error:  # noqa: BLE001
        status = 1 if "locked" in str(error) else 2
    finally:
        os._exit(status)


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_forked_in_an_open_transaction_never_gets_the_write_lock(database_url, sessions):
    """The control: why a fork has to wait."""
    ready, go = os.pipe()
    with sessions() as session:
        db.insert_if_absent(session, db.WorkerHeartbeat, worker="w", queue="q", device="cpu")
        pid = child_writes(database_url, ready)
        session.commit()
    os.write(go, b"x")

    assert exit_status(pid) == 1


def test_a_fork_waits_for_the_end_of_a_beat(database_url, sessions, tmp_path, monkeypatch):
    beating, ready = threading.Event(), os.pipe()
    whole = pulse.beat

    def long_beat(sessions, name, *rest):
        with sessions() as session:
            db.insert_if_absent(session, db.WorkerHeartbeat, worker=name, queue="q", device="cpu")
            beating.set()
            time.sleep(0.5)
            session.commit()
        whole(sessions, name, *rest)

    monkeypatch.setattr(pulse, "beat", long_beat)
    settings = Settings(data_dir=tmp_path, database_url=database_url, device="cpu")
    a_pulse = pulse.Pulse()
    a_pulse.start(settings, ["inference"])
    assert beating.wait(30)
    pid = child_writes(database_url, ready[0])
    a_pulse.stop()
    os.write(ready[1], b"x")

    assert exit_status(pid) == 0


def test_the_rows_are_there_while_it_beats_and_no_longer(database_url, sessions, tmp_path):
    settings = Settings(data_dir=tmp_path, database_url=database_url, device="cpu")
    a_pulse = pulse.Pulse()
    a_pulse.start(settings, ["inference", "train"])
    names = {pulse.heartbeat_name(queue, os.getpid()) for queue in ("inference", "train")}

    def rows():
        with sessions() as session:
            return {row.worker for row in session.query(db.WorkerHeartbeat)}

    deadline = time.monotonic() + 30
    while rows() != names and time.monotonic() < deadline:
        time.sleep(0.02)
    assert rows() == names
    a_pulse.stop()
    assert rows() == set()


def test_an_absent_database_costs_a_beat_and_not_the_thread(tmp_path):
    url = f"sqlite:///{tmp_path / 'none' / 'pcrl.db'}"
    settings = Settings(data_dir=tmp_path, database_url=url, device="cpu", heartbeat_s=0.05)
    a_pulse = pulse.Pulse()
    a_pulse.start(settings, ["inference"])
    time.sleep(0.3)

    assert a_pulse._thread.is_alive()
    a_pulse.stop()
    assert not a_pulse._thread.is_alive()


def test_a_silent_postgresql_holds_up_no_fork(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://nobody@127.0.0.1:{silent.getsockname()[1]}/none"
        a_pulse = pulse.Pulse()
        a_pulse.start(Settings(data_dir=tmp_path, database_url=url, device="cpu"), ["inference"])
        there, _ = silent.accept()  # the beat waits for an answer
        begin = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert exit_status(pid) == 0
        assert time.monotonic() - begin < 5
        there.close()
    a_pulse.stop()
