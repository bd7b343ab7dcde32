"""Named points at which a test makes a process fail; without `PCRL_FAULT_AT` each does nothing.

    PCRL_FAULT_AT=<point>:<kind>:<marker file>

`kind` is `kill` (SIGKILL), `error` (an exception nobody foresaw) or `full` (ENOSPC). The fault
strikes once: whoever creates the marker file. This is no setting, and nothing a client sends
reaches it; the list of points is read from the code (tests/chaos/test_faults.py, T-C7).
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

VARIABLE = "PCRL_FAULT_AT"
KINDS = ("kill", "error", "full")


class Fault(Exception):  # noqa: N818  # reads as what it is
    """The exception that nobody foresaw."""


def arm(where: str | None) -> None:
    """Set the fault of this process (a test's child); None for none."""
    global _armed  # noqa: PLW0603  # one fault a process, read at every point
    _armed = tuple(where.split(":", 2)) if where else None


def point(name: str) -> None:
    """A place where a process may end; `name` is unique in the code.

    Raises:
        Fault: Armed with `error`.
        OSError: Armed with `full`.
    """
    if _armed is not None and _armed[0] == name:
        _strike(name, _armed[1], Path(_armed[2]))


def _strike(name: str, kind: str, marker: Path) -> None:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise Fault(name)


_armed: tuple[str, ...] | None = None
arm(os.environ.get(VARIABLE))
