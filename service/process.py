"""A child process that does not outlive its supervisor."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def stop_with_parent(parent_pid: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send `number` to this process when its parent ends (Linux; else nothing).

    Call it first thing, from the main thread: the kernel ties the signal to the calling thread.

    Args:
        parent_pid: The expected parent; if it is gone already, this process exits at once.
        number: The signal.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:
        sys.exit(f"the supervisor {parent_pid} is gone")
