"""The device that a worker computes on: its kind, its memory, and how much of that is in use.

One training a GPU: start a worker for each, with `PCRL_DEVICE=cuda:0`, `cuda:1` and so on. `only`
makes that GPU the one that the process and its children see, before anything opens CUDA.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from service.queue import Able
from service.settings import Settings

MIB = 1024**2
DRIVER = Path("/dev/nvidiactl")
QUERY = (
    "nvidia-smi",
    "--query-gpu=index,memory.used,memory.total",
    "--format=csv,noheader,nounits",
)


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the worker's row in the database has it; `used_bytes` of a GPU alone."""

    kind: str
    memory_bytes: int
    used_bytes: int | None

    @property
    def able(self) -> Able:
        """What a worker with this device can do."""
        return Able(self.kind, self.memory_bytes)


def only(device: str, environment: MutableMapping[str, str]) -> None:
    """Turn `cuda:N` into `cuda` with only the N-th visible GPU to see; leave others alone.

    Raises:
        ValueError: Fewer GPUs are visible than N + 1.
    """
    kind, _, index = device.partition(":")
    if not index:
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = visible.split(",")
        if int(index) >= len(names):
            raise ValueError(f"PCRL_DEVICE is {device}, but {len(names)} GPUs are visible")
        index = names[int(index)]
    environment["CUDA_VISIBLE_DEVICES"] = index
    environment["PCRL_DEVICE"] = kind


def look(settings: Settings) -> Device:
    """The worker's device; of several GPUs the smallest memory, for a run needs it on each.

    A GPU whose driver does not tell counts as one with no memory to promise.
    """
    kind = settings.device.partition(":")[0]
    if kind == "cpu" or (kind == "auto" and not DRIVER.exists()):
        return Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)
    gpus = _visible(_nvidia_smi())
    if not gpus:
        return Device("cuda", 0, None)
    return Device("cuda", min(total for _, total in gpus), sum(used for used, _ in gpus))


def _visible(gpus: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return list(gpus.values())
    return [gpus[name] for name in names.split(",") if name in gpus]


def _nvidia_smi() -> dict[str, tuple[int, int]]:
    """Used and total bytes of each GPU by its index; empty where nobody tells."""
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            QUERY, capture_output=True, text=True, check=True, timeout=10
        )
        rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
        return {index: (int(used) * MIB, int(total) * MIB) for index, used, total in rows}
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
