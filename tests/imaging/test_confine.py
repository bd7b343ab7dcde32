"""The walls around whoever reads hostile bytes: each stops what goes through without it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from imaging.errors import ScanError
from imaging.sandbox import run_intake

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are of Linux")

ACTS = {
    "network": "import socket; socket.create_connection(('127.0.0.1', int(argument)), 5)",
    "unix socket": "import socket; socket.socketpair()",
    "another program": "import subprocess; subprocess.run(['/bin/true'], check=True)",
    "a process": "import os; os.fork() or os._exit(0); os.wait()",
    "a signal": "import os; os.kill(os.getppid(), 0)",
    "a parent's limits": "import os, resource as r; "
    "r.prlimit(os.getppid(), r.RLIMIT_NOFILE, r.prlimit(os.getppid(), r.RLIMIT_NOFILE))",
    "a parent's priority": "import os; p = os.getppid(); "
    "os.setpriority(os.PRIO_PROCESS, p, os.getpriority(os.PRIO_PROCESS, p))",
    "a signal by a pipe": "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "a link": "import os; os.symlink(argument, out + '/link' + str(os.getpid()))",
    "a mode": "import os; os.chmod(argument, 0o600)",
    "a pipe": "import os; os.mkfifo(out + '/pipe' + str(os.getpid()))",
    "a secret": "open(argument).read()",
    "a file elsewhere": "open(argument, 'a')",
    "memory": "bytearray(1 << 30)",
    "time": "import time\nend = time.process_time() + 1.7\nwhile time.process_time() < end: pass",
    "a large file": "open(out + '/large', 'wb').write(bytes(3 << 20))",
    "open files": "held = [open(out + '/' + str(n), 'w') for n in range(200)]",
}
ALLOWED = {
    "output": "open(out + '/small', 'w').write('x')",
    "input": "open(given).read()",
    "a library": "import numpy.fft, wave, sqlite3",
    "a thread": "import threading; t = threading.Thread(target=print); t.start(); t.join()",
}
CONFINE = """
import os
from pathlib import Path
from imaging.confine import confine
confine(memory_bytes=1 << 29, cpu_s=1, file_bytes=2 << 20, open_files=100,
        parent_pid=os.getppid(), readable=[Path(given)], writable=Path(out))
"""


def outcome(act: str, tmp_path: Path, argument: object, *, confined: bool) -> int:
    out, given = tmp_path / "out", tmp_path / "given"
    out.mkdir(exist_ok=True)
    given.write_text("scan")
    names = f"argument, out, given = {str(argument)!r}, {str(out)!r}, {str(given)!r}\n"
    script = names + (CONFINE if confined else "") + act
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-s", "-P", "-c", script], env=env, capture_output=True, timeout=60
    )
    return done.returncode


@pytest.fixture
def argument(request, tmp_path):
    """What an act is about: a port that listens, or a file outside of what is allowed."""
    if request.node.callspec.params["name"] == "network":
        import socket

        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server.getsockname()[1]
        return
    path = tmp_path / "secret"
    path.write_text("hunter2")
    yield path


@pytest.mark.parametrize("name", ACTS)
def test_a_wall_stops_what_goes_through_without_it(tmp_path, argument, name):
    free = outcome(ACTS[name], tmp_path, argument, confined=False)
    confined = outcome(ACTS[name], tmp_path, argument, confined=True)

    assert free == 0
    assert confined != 0


@pytest.mark.parametrize("name", ALLOWED)
def test_what_reading_a_scan_needs_goes_through(tmp_path, name):
    assert outcome(ALLOWED[name], tmp_path, "", confined=True) == 0


def test_decoders_that_abort_end_as_an_abort(tmp_path):
    assert outcome("import os; os.abort()", tmp_path, "", confined=True) == -signal.SIGABRT


def test_the_real_child_stands_behind_the_walls(tmp_path):
    """Seen from outside, in /proc, while it waits for a file that never comes."""
    out, pipe = tmp_path / "out", tmp_path / "pipe"
    out.mkdir()
    os.mkfifo(pipe)
    found: dict[str, str] = {}

    def look() -> None:
        pid, writer = wait_for_reader(pipe, out)
        status = Path(f"/proc/{pid}/status").read_text()
        found.update(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        found["limits"] = Path(f"/proc/{pid}/limits").read_text()
        found["environ"] = Path(f"/proc/{pid}/environ").read_bytes().decode()
        os.kill(pid, signal.SIGKILL)
        os.close(writer)

    looker = threading.Thread(target=look)
    looker.start()
    with pytest.raises(ScanError, match="too_large"):
        run_intake(pipe, out, kind="image")
    looker.join()

    assert (found["Seccomp"].strip(), found["NoNewPrivs"].strip()) == ("2", "1")
    limits = {line[:26].strip(): line[26:].split() for line in found["limits"].splitlines()[1:]}
    assert limits["Max address space"][:2] == [str(4 << 30)] * 2
    assert limits["Max cpu time"][:2] == ["120", "120"]
    assert limits["Max file size"][:2] == [str(4 << 30)] * 2
    assert limits["Max open files"][:2] == ["256", "256"]
    assert limits["Max core file size"][:2] == ["0", "0"]
    assert "PCRL" not in found["environ"]


UNCONFINED = """
import socket, sys
from imaging import forkserver, intake
intake.confine = lambda **_: None
forkserver.serve(socket.socket(fileno=int(sys.argv[1])), intake.main)
"""
PARENT = """
import sys
from pathlib import Path
from imaging import sandbox
if not {is_confined}:
    sandbox._server._command = lambda fd: [sys.executable, "-c", {unconfined!r}, fd]
sandbox.run_intake(Path({pipe!r}), Path({folder!r}), kind='image')
"""


@pytest.mark.parametrize(
    ("is_confined", "killed", "dies"),
    [(True, "parent", True), (True, "server", True), (False, "server", False)],
)
def test_the_child_dies_with_its_parent(tmp_path, is_confined, killed, dies):
    """With the one who waits for it, and with the server that forked it (the control: without)."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    places = {"pipe": str(pipe), "folder": str(tmp_path)}
    command = PARENT.format(is_confined=is_confined, unconfined=UNCONFINED, **places)
    parent = subprocess.Popen(
        [sys.executable, "-c", command],
        env={"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    child, writer = wait_for_reader(pipe, tmp_path)
    if killed == "server":
        os.kill(parent_of(child), signal.SIGKILL)
    else:
        parent.kill()

    try:
        deadline = time.monotonic() + 3
        while is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert is_alive(child) is not dies
    finally:
        parent.kill()
        parent.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.close(writer)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for_reader(pipe: Path, folder: Path) -> tuple[int, int]:
    """Process id of the intake that reads the pipe, and our end: until it is closed, it waits.

    It is the process in its folder for scratch.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # nobody reads yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if (process / "cwd").readlink() == folder:
                        return int(process.name), writer
        time.sleep(0.05)
    raise AssertionError("no child opened the pipe")


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False
