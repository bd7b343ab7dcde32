"""Memory that this process has and may still take, and time it waited, as Linux tells it.

Where the system tells nothing (another one than Linux) nothing is limited.
"""

from __future__ import annotations

import os
from pathlib import Path


def available_bytes(limit: int = 0) -> int | None:
    """Memory that this process may still take: the least of what the system's counters tell.

    The machine's available memory, and what the control groups (v2 or v1) leave.

    Args:
        limit: Never more than this; 0 is no limit of ours.
    """
    told = [limit] if limit else []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            told.append(int(line.split()[1]) * 1024)
    told += _left_in_groups(Path("/sys/fs/cgroup"), _lines(Path("/proc/self/cgroup")))
    return min(told, default=None)


def resident_bytes() -> int:
    """Resident set of this process; 0 where the system does not tell."""
    fields = " ".join(_lines(Path("/proc/self/statm"))).split()
    page_bytes = int(os.sysconf("SC_PAGE_SIZE"))
    return int(fields[1]) * page_bytes if fields else 0


def waited_s() -> float:
    """Seconds that this thread was ready to run and had no processor; 0 where nobody tells."""
    fields = " ".join(_lines(Path("/proc/thread-self/schedstat"))).split()
    return int(fields[1]) / 1e9 if len(fields) > 1 else 0.0


def _left_in_groups(root: Path, groups: list[str]) -> list[int]:
    """What the limits of this process's control groups and of those above them leave."""
    left = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # v2
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder == base or base in folder.parents:
                left += _left_in(folder, *names)
    return left


def _left_in(folder: Path, limit: str, used: str) -> list[int]:
    most, now = _lines(folder / limit), _lines(folder / used)
    if not most or not now or not most[0].isdigit():  # "max"
        return []
    file_cache = [
        int(line.split()[1])
        for line in _lines(folder / "memory.stat")
        if line.startswith(("inactive_file ", "total_inactive_file "))
    ]
    return [max(int(most[0]) - int(now[0]) + max(file_cache, default=0), 0)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
