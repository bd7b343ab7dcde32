"""Taking away from this process what reading a scan does not need.

Five walls, each of the kernel, so that they hold for native decoders as well (reliability.md, S4):

    limits      address space, processor time, size of a written file, open files, no core dump
    privileges  no new ones; death together with the parent
    calls       a seccomp filter: no socket, no other program or process, no signal to another one
    network     a network namespace without interfaces, where one may be made
    files       Landlock: reads the interpreter, its libraries and the scan, writes `writable`

On Linux the seccomp filter is not optional: `confine` raises where the kernel has none. The
network namespace and Landlock are a second lock, used where the kernel grants them: containers
often forbid the first, and Linux before 5.13 lacks the other. On other systems only limits are set.

Calls: prctl(2), seccomp(2), unshare(2), landlock(7). Numbers are of x86_64 and aarch64.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_CLONE_THREAD, _CLONE_NEWUSER, _CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000
_EPERM, _ENOSYS = 1, 38
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CALLS: dict[str, tuple[int, int]] = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "io_uring_setup": (425, 425),
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "chmod": (90, -1), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1),
    "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1),
    "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "symlink": (88, -1),
    "symlinkat": (266, 36), "link": (86, -1), "linkat": (265, 37), "mknod": (133, -1),
    "mknodat": (259, 33),
}  # fmt: skip
_OF_ONE_PROCESS = {"prlimit64": (302, 261), "sched_setaffinity": (203, 122)}
_FCNTL, _OWNER_COMMANDS = (72, 25), (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
_CLONE, _CLONE3, _TGKILL = (56, 220), (435, 435), (234, 131)

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14  # truncate
_READ = _EXECUTE | _READ_FILE | _READ_DIR  # shared libraries are mapped as executable
_SYSTEM = (
    *(
        "/usr",
        "/lib",
        "/lib64",
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/proc/self",
        "/proc/meminfo",
    ),
    *("/dev/null", "/dev/urandom", "/sys/devices/system/cpu"),
)
_NUM_ACCESS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by version; 16 from 5 on


class ConfinementError(OSError):
    """The kernel does not let this process give up what it must give up."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What of the optional walls stands."""

    has_own_network: bool
    """No interface is in reach, not even loopback."""
    has_own_files: bool
    """Landlock guards the files."""


def confine(
    *,
    memory_bytes: int | None = None,
    cpu_s: int | None = None,
    file_bytes: int | None = None,
    open_files: int | None = None,
    parent_pid: int | None = None,
    readable: Sequence[Path] = (),
    writable: Path | None = None,
) -> Confinement:
    """Put up all walls around this process, for good; call it before the first hostile byte.

    Args:
        memory_bytes: Address space.
        cpu_s: Processor time, after which the kernel ends the process.
        file_bytes: Size of each file that is written.
        open_files: Number of open files.
        parent_pid: Whose child this is: the kernel ends the process with it.
        readable: Files and folders that are the task's input.
        writable: The folder for its output.

    Raises:
        ConfinementError: There is no seccomp, or the parent is gone already.
    """
    _limit(memory_bytes, cpu_s, file_bytes, open_files)
    if sys.platform != "linux":
        return Confinement(has_own_network=False, has_own_files=False)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        raise ConfinementError("the parent is gone")
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    has_own_network = any(
        libc.unshare(flags) == 0 for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET)
    )
    has_own_files = _guard_files(libc, readable, writable)
    _filter_calls(libc)
    return Confinement(has_own_network=has_own_network, has_own_files=has_own_files)


def _limit(
    memory_bytes: int | None, cpu_s: int | None, file_bytes: int | None, open_files: int | None
) -> None:
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        if value is not None:
            resource.setrlimit(limit, (value, value))


def _prctl(libc: ctypes.CDLL, option: int, *arguments: object) -> None:
    padded = [*arguments, 0, 0, 0, 0][:4]
    if libc.prctl(option, *padded) != 0:
        number = ctypes.get_errno()
        raise ConfinementError(number, f"prctl {option}: {os.strerror(number)}")


# --- system calls


def _filter_calls(libc: ctypes.CDLL) -> None:
    """Install the filter; classic BPF over `struct seccomp_data` (nr, arch, ip, args[6])."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise ConfinementError(f"no filter of system calls for {machine}")
    program = _program(_ARCHITECTURES[machine], int(machine == "aarch64"), os.getpid())
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    held = ctypes.create_string_buffer(code)

    class Fprog(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    listing = Fprog(len(program), ctypes.cast(held, ctypes.c_void_p))
    _prctl(libc, _PR_SET_SECCOMP, 2, ctypes.byref(listing))


def _program(architecture: int, column: int, own_pid: int) -> list[tuple[int, int, int, int]]:
    """Lines (code, steps if true, steps if false, k)."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, _KILL), (load, 0, 0, 0)]
    if column == 0:  # the x32 interface of x86_64 has the same architecture and other numbers
        lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, _KILL)]
    for numbers in _CALLS.values():
        if numbers[column] >= 0:
            lines += [(equal, 0, 1, numbers[column]), (give, 0, 0, _ERROR | _EPERM)]
    lines += [(equal, 0, 1, _CLONE3[column]), (give, 0, 0, _ERROR | _ENOSYS)]  # libc then clones
    for numbers in _OF_ONE_PROCESS.values():  # of this one alone
        lines += [
            (equal, 0, 5, numbers[column]),
            (load, 0, 0, 16),
            (equal, 2, 0, 0),
            (equal, 1, 0, own_pid),
            (give, 0, 0, _ERROR | _EPERM),
            (give, 0, 0, _ALLOW),
        ]
    own, signal_with, own_ex = _OWNER_COMMANDS
    lines += [  # O_ASYNC would have the kernel signal whoever is named as a file's owner
        (equal, 0, 6, _FCNTL[column]),
        (load, 0, 0, 24),
        (equal, 3, 0, own),
        (equal, 2, 0, signal_with),
        (equal, 1, 0, own_ex),
        (give, 0, 0, _ALLOW),
        (give, 0, 0, _ERROR | _EPERM),
    ]
    lines += [  # threads may begin, processes not; abort() signals its own process
        (equal, 0, 4, _CLONE[column]),
        (load, 0, 0, 16),
        (any_bit, 1, 0, _CLONE_THREAD),
        (give, 0, 0, _ERROR | _EPERM),
        (give, 0, 0, _ALLOW),
        (equal, 0, 3, _TGKILL[column]),
        (load, 0, 0, 16),
        (equal, 1, 0, own_pid),
        (give, 0, 0, _ERROR | _EPERM),
        (give, 0, 0, _ALLOW),
    ]
    return lines


# --- files


def _guard_files(libc: ctypes.CDLL, readable: Sequence[Path], writable: Path | None) -> bool:
    """Leave the interpreter, the libraries, the input and the output; False without Landlock."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1 or writable is None:
        return False
    handled = (1 << _NUM_ACCESS_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("=Q", handled)
    rules = libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        return False
    try:
        own = (Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parent)
        places: tuple[str | Path, ...] = (*_SYSTEM, *own, *readable)
        for place in places:
            _allow(libc, rules, Path(place), handled & _READ)
        _allow(libc, rules, writable, handled)
        if libc.syscall(_LANDLOCK_RESTRICT, rules, 0) != 0:
            raise ConfinementError(ctypes.get_errno(), "Landlock refused its own rules")
    finally:
        os.close(rules)
    return True


def _allow(libc: ctypes.CDLL, rules: int, place: Path, access: int) -> None:
    """Let this process reach what lies beneath a place; what is not there needs no rule."""
    try:
        descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        granted = access if place.is_dir() else access & _OF_FILES
        rule = struct.pack("=Qi", granted, descriptor)
        if libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0) != 0:
            raise ConfinementError(ctypes.get_errno(), f"no Landlock rule for {place}")
    finally:
        os.close(descriptor)


def main() -> None:
    """Say which walls stand around a reader here; `pcrl doctor` asks."""
    walls = confine(parent_pid=os.getppid(), writable=Path(tempfile.gettempdir()))
    standing = {
        "limits": True,
        "system calls": sys.platform == "linux",
        "no network": walls.has_own_network,
        "files": walls.has_own_files,
    }
    sys.stdout.write(", ".join(name for name, stands in standing.items() if stands) + "\n")


if __name__ == "__main__":
    main()
