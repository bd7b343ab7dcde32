"""Hard limits on this process, and no life without its parent (Linux)."""

from __future__ import annotations

import ctypes
import resource
import signal
import sys


def confine(*, memory_bytes: int, cpu_s: int, file_bytes: int, open_files: int) -> None:
    """Limit memory (address space), processor time, size of each written file, and open files."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
