"""A server that forks a child for each task: many at once, none left, and itself replaced."""

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imaging.forkserver import ForkServer

PROGRAM = """
import json, os, socket, sys, time
from imaging import forkserver
def work(arguments):
    confined, seconds, status = arguments
    descriptors = os.listdir("/proc/self/fd")
    print(json.dumps([os.getpid(), confined, os.getcwd(), sys.stdin.read(), descriptors]))
    time.sleep(float(seconds))
    if status == "crash":
        os.abort()
    if status == "raise":
        raise RuntimeError
    return int(status)
forkserver.serve(socket.socket(fileno=int(sys.argv[1])), work)
"""

FAILING = """
import errno, os
forks, real = [], os.fork
def fork():
    forks.append(1)
    if len(forks) == 3:
        raise BlockingIOError(errno.EAGAIN, "no more processes")
    return real()
os.fork = fork
"""


@pytest.fixture
def server(monkeypatch):
    made = ForkServer("none")
    monkeypatch.setattr(made, "_command", lambda fd: [sys.executable, "-c", PROGRAM, fd])
    yield made
    made.close()


@pytest.fixture
def do(server, tmp_path):
    """Do a task; its status, and what it printed."""

    def run(seconds: float = 0.0, status: str = "0", wall_s: float = 30.0, stdin: bytes = b"hello"):
        with (tmp_path / f"{threading.get_ident()}.out").open("w+b") as told:
            code = server.run(
                [str(seconds), status],
                folder=tmp_path,
                stdin=stdin,
                stdout=told.fileno(),
                wall_s=wall_s,
            )
            told.seek(0)
            return code, json.loads(told.read() or "null")

    return run


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_for(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_child_has_its_task_its_folder_its_input_and_no_descriptor_of_another(
    server, do, tmp_path
):
    code, (pid, confined, folder, stdin, descriptors) = do(status="65")

    assert code == 65
    assert pid != server.start()
    assert confined == f"--confine={server.start()}"
    assert (folder, stdin) == (str(tmp_path), "hello")
    assert set(descriptors) <= {"0", "1", "2", "3"}  # 3 is the listing's own


def test_children_work_side_by_side_each_with_its_own_input(do):
    begin = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: do(1.0, str(n), stdin=f"{n}".encode()), range(8)))

    assert [code for code, _ in answers] == list(range(8))
    assert [told[3] for _, told in answers] == [str(n) for n in range(8)]
    assert time.monotonic() - begin < 7  # eight of a second each, and the server's start


def test_a_child_that_takes_too_long_is_gone_when_it_is_told(server, do, tmp_path):
    started = server.start()
    with pytest.raises(TimeoutError):
        do(60.0, wall_s=1.5)

    children = Path(f"/proc/{started}/task/{started}/children").read_text()
    assert children == ""
    assert do()[0] == 0
    assert server.start() == started


def test_a_status_that_cannot_be_is_none_of_success(do):
    assert do(status="raise")[0] == 1


def test_a_server_that_was_killed_is_replaced(server, do):
    assert do()[0] == 0
    first = server.start()
    os.kill(first, signal.SIGKILL)
    assert wait_for(lambda: "\nState:\tZ" in Path(f"/proc/{first}/status").read_text())

    assert do()[0] == 0
    assert server.start() != first
    assert not is_alive(first)


def test_a_server_that_ends_under_a_task_is_an_error_and_not_a_hang(server, do):
    server.start()
    threading.Timer(1.5, lambda: os.kill(server.start(), signal.SIGKILL)).start()

    with pytest.raises(OSError, match="ended"):
        do(30.0)


def test_a_server_whose_child_crashed_ends_with_its_last_child(server, do):
    first = server.start()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(do, 1.5, "7")
        assert wait_for(lambda: Path(f"/proc/{first}/task/{first}/children").read_text() != "")
        assert do(status="crash")[0] == -signal.SIGABRT
        second = server.start()
        assert do(status="8")[0] == 8
        assert slow.result()[0] == 7

    assert server.start() == second != first
    assert wait_for(lambda: "\nState:\tZ" in Path(f"/proc/{first}/status").read_text())


def test_crashes_side_by_side_replace_their_server_once(server, do):
    with ThreadPoolExecutor(4) as pool:
        assert {code for code, _ in pool.map(lambda _: do(0.5, "crash"), range(4))} == {-6}

    assert len(server._processes) <= 2


def test_a_server_is_replaced_after_so_many_tasks(server, do, monkeypatch):
    monkeypatch.setattr("imaging.forkserver.TASKS_OF_ONE", 3)
    do()
    pids = []
    for _ in range(7):
        pids.append(server.start())
        assert do()[0] == 0

    assert len(set(pids)) == 3
    assert pids[0] == pids[1]


def test_output_that_cannot_be_written_is_no_success(server, tmp_path):
    with Path("/dev/full").open("wb") as full:
        status = server.run(
            ["0", "0"], folder=tmp_path, stdin=b"", stdout=full.fileno(), wall_s=30.0
        )

    assert status == 1


def test_a_fork_that_fails_costs_its_own_task_alone(server, do, monkeypatch):
    monkeypatch.setattr(
        server, "_command", lambda fd: [sys.executable, "-c", FAILING + PROGRAM, fd]
    )
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(do, 2.0, "7") for _ in range(2)]
        assert wait_for(lambda: len(children_of(server.start())) == 2)
        with pytest.raises(OSError, match="could not fork"):
            do()
        assert [one.result()[0] for one in slow] == [7, 7]
    assert do()[0] == 0


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_forked_client_has_a_server_of_its_own(server, do):
    assert do()[0] == 0
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if do()[0] == 0 and server.start() else 2
            server.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert do()[0] == 0


def test_nothing_is_left_after_the_end(server, do):
    do()
    pid = server.start()
    server.close()

    assert not is_alive(pid)
    assert do()[0] == 0  # and it can be used again
