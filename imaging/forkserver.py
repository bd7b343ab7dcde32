"""A process that has readers or writers of scans loaded and forks one child for each task.

A fresh interpreter spends a second of processor time on imports before it reads the first byte; a
fork of one that has them costs milliseconds. The server itself never meets hostile bytes: it starts
with a bare environment, has one thread, and does nothing but fork, wait and tell. Its child takes
the walls of `imaging.confine` upon itself before it opens the scan, as a fresh process would.

What a fresh process had and a fork lacks is a memory layout of its own; so the server is replaced
after a child that died of a signal, and after every `TASKS_OF_ONE` tasks (docs/adr/0016).

Over the control socket goes, for each task, a length (4 bytes), JSON `{"arguments", "folder"}`, and
three descriptors: the child's standard input, its standard output, and a socket on which the server
answers with the child's exit status (4 bytes, negative for a signal). When the client closes its
end of that socket, or ends, the child is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

Work = Callable[[Sequence[str]], int]
"""What a child does: its arguments to its exit status."""

ENVIRONMENT = {
    # -I would ignore it, and a source tree may not be installed
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    "PYTHONDONTWRITEBYTECODE": "1",
    "LC_ALL": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",  # every BLAS thread reserves address space; a fork has but one
    "OMP_NUM_THREADS": "1",
}
"""All that a server and its children have as environment; a child has TMPDIR besides."""
TASKS_OF_ONE = 256
"""So many tasks a server does: an address that leaked serves no longer than that."""
_NUM_DESCRIPTORS = 3
_END_S = 10.0
"""How long a killed child, or a server without tasks, may take to end."""


class ForkServer:
    """The client's half; safe in threads.

    Args:
        module: Its `main` is what a child does.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._control: socket.socket | None = None
        self._forget()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Begin anew: a process that was forked has neither its parent's server nor its threads."""
        self._lock = threading.Lock()
        self._disconnect()
        self._num_tasks = 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> int:
        """Have it ready before the first task; returns the server's process id."""
        with self._lock:
            self._connected()
            return self._processes[-1].pid

    def run(
        self, arguments: Sequence[str], *, folder: Path, stdin: bytes, stdout: int, wall_s: float
    ) -> int:
        """Have a child do one task; blocks until it has ended.

        Args:
            arguments: What the child's work is called with.
            folder: Its working directory, and its place for scratch.
            stdin: What it finds on its standard input; less than a pipe holds (64 KiB).
            stdout: Descriptor of a file that takes its output.
            wall_s: Seconds that it may take, with the server's start if it has to start.

        Returns:
            Its exit status; the negative number of the signal that ended it.

        Raises:
            TimeoutError: It took longer, and was killed.
            OSError: The server could not be started, could not fork, or ended under it.
        """
        told, tell = socket.socketpair()
        with told:
            task = {"arguments": list(arguments), "folder": str(folder)}
            with tell:
                control = self._send(task, stdin, stdout, tell)
            told.settimeout(wall_s)
            try:
                answer = told.recv(4)
            except BaseException:
                told.shutdown(socket.SHUT_WR)  # the server kills it, and answers once more
                told.settimeout(_END_S)
                with contextlib.suppress(OSError):
                    told.recv(4)
                raise
        if len(answer) < 4:
            raise OSError("the fork server ended, or could not fork")
        status: int = struct.unpack("=i", answer)[0]
        if status < 0:
            self._replace(control)
        return status

    def close(self) -> None:
        """End the server, and wait for its end; the next task starts another."""
        with self._lock:
            self._disconnect()
            processes, self._processes = self._processes, []
        until = time.monotonic() + _END_S
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _replace(self, control: socket.socket) -> None:
        """Take no further tasks to a server, which ends with its last child; start the next one."""
        with self._lock:
            if self._control is control:
                self._disconnect()
                self._connected()

    def _send(
        self, task: dict[str, Any], stdin: bytes, stdout: int, tell: socket.socket
    ) -> socket.socket:
        """Hand a task over, to a new server if the one at hand is gone; returns its socket."""
        text = json.dumps(task).encode()
        message = struct.pack("=I", len(text)) + text
        source, sink = os.pipe()
        try:
            with self._lock:
                if self._num_tasks == TASKS_OF_ONE:
                    self._disconnect()
                descriptors = [source, stdout, tell.fileno()]
                try:
                    socket.send_fds(control := self._connected(), [message], descriptors)
                except (BrokenPipeError, ConnectionResetError):
                    self._disconnect()
                    socket.send_fds(control := self._connected(), [message], descriptors)
                self._num_tasks += 1
            os.close(source)
            source = -1
            with contextlib.suppress(BrokenPipeError):
                os.write(sink, stdin)
        finally:
            os.close(sink)
            if source >= 0:
                os.close(source)
        return control

    def _connected(self) -> socket.socket:
        if self._control is not None:
            return self._control
        self._processes = [old for old in self._processes if old.poll() is None]
        here, there = socket.socketpair()
        try:
            with there:
                process = subprocess.Popen(  # noqa: S603  # our own module
                    self._command(str(there.fileno())),
                    cwd="/",
                    env=ENVIRONMENT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[there.fileno()],
                    start_new_session=True,
                )
        except BaseException:
            here.close()
            raise
        self._processes.append(process)
        self._control, self._num_tasks = here, 0
        return here

    def _command(self, descriptor: str) -> list[str]:
        program = ["-s", "-P", "-m", "imaging.forkserver", self._module, descriptor]
        return [sys.executable, *program]

    def _disconnect(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None


# --- the server's half


def serve(control: socket.socket, work: Work) -> None:
    """Fork a child for each task that comes, until the client is gone and the last child ended.

    Args:
        control: The client's socket.
        work: What a child does. It is the first to see what the arguments name.
    """
    wakes, waker = socket.socketpair()
    wakes.setblocking(False)
    waker.setblocking(False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})  # a parent's mask is inherited
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wakes, selectors.EVENT_READ)
        is_open = True
        while is_open or children:
            for key, _ in selector.select():
                if key.fileobj is control:
                    is_open = _begin(control, work, children, selector)
                elif key.fileobj is wakes:
                    wakes.recv(4096)
                    _tell_of_the_ended(children, selector)
                elif key.data in children:  # its client has let go
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
    wakes.close()
    waker.close()


def _begin(
    control: socket.socket,
    work: Work,
    children: dict[int, socket.socket],
    selector: selectors.BaseSelector,
) -> bool:
    """Take a task and fork its child; False when the client is gone."""
    try:
        head, descriptors, _, _ = socket.recv_fds(control, 4, _NUM_DESCRIPTORS)
        text = _exactly(control, struct.unpack("=I", head)[0]) if head else b""
    except ConnectionResetError:
        text = b""
    if not text:
        selector.unregister(control)
        return False
    task, server = json.loads(text), os.getpid()
    try:
        stdin, stdout, told = descriptors
        pid = os.fork()
    except (OSError, ValueError):  # of processes or descriptors there are no more
        traceback.print_exc()
        for descriptor in descriptors:
            os.close(descriptor)  # so its client reads an end, and no other task is hurt
        return True
    if pid == 0:
        _be_the_child(task, stdin, stdout, work, server)
    os.close(stdin)
    os.close(stdout)
    children[pid] = socket.socket(fileno=told)
    selector.register(children[pid], selectors.EVENT_READ, pid)
    return True


def _exactly(control: socket.socket, size: int) -> bytes:
    """The next `size` bytes; empty if the client ends before."""
    text = b""
    while len(text) < size:
        part = control.recv(size - len(text))
        if not part:
            return b""
        text += part
    return text


def _be_the_child(
    task: dict[str, Any], stdin: int, stdout: int, work: Work, server: int
) -> NoReturn:
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no word of what was sent in reaches a log
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the other children's among them
        os.chdir(task["folder"])
        os.environ["TMPDIR"] = tempfile.tempdir = task["folder"]
        done = work([f"--confine={server}", *task["arguments"]])
        sys.stdout.flush()
        status = done
    finally:
        os._exit(status)


def _tell_of_the_ended(
    children: dict[int, socket.socket], selector: selectors.BaseSelector
) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        told = children.pop(pid)
        with contextlib.suppress(KeyError):
            selector.unregister(told)
        with told, contextlib.suppress(OSError):
            told.send(struct.pack("=i", os.waitstatus_to_exitcode(status)))


def main() -> None:
    """Serve a module's `main`; the second argument is the control socket's descriptor."""
    work: Work = importlib.import_module(sys.argv[1]).main
    gc.collect()
    gc.freeze()  # what is loaded is left alone by the children's collections, and so stays shared
    serve(socket.socket(fileno=int(sys.argv[2])), work)


if __name__ == "__main__":
    main()
