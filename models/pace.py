"""What a network takes for a voxel of a window, in memory and in time, tried on a small window.

A probe with other work beside it tells too much or too little: then its answer is kept until the
next time it is asked for, and no longer. Time is learned anew from every real run.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from imaging.volume import Shape
from models.bundle import volume_input
from models.memory import resident_bytes, waited_s
from models.session import OnnxSession, give_memory_back

PROBE_SIDE = 48
"""Voxels along an axis of the window on which the network is tried."""
ROUNDS = 3
STEADY = 1.5
"""Rounds that differ by more than this factor were not alone in the process."""
STEADY_BYTES = 8 << 20
"""What the allocators' own pages make of equal rounds."""
MAX_WAITED_SHARE = 0.1
"""Of a probe, in which its thread had no processor: more, and something ran beside it."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What a network takes for a voxel of a window."""

    working_bytes: float
    seconds: float
    is_memory_spoilt: bool = False
    is_time_spoilt: bool = False
    """Measured while something else ran."""


def pace_of(session: OnnxSession) -> Pace:
    """Working memory and time of a network: measured when first asked for, again while spoilt."""
    with _lock:
        known = _paces.get(session)
        if known is None or known.is_memory_spoilt or known.is_time_spoilt:
            known = _paces[session] = _better(known, _measured(session))
        return known


def learn(session: OnnxSession, num_voxels: int, seconds: float) -> None:
    """Take in how long windows of so many voxels really took."""
    with _lock:
        known = _paces.get(session)
        if known is not None and num_voxels > 0:
            _paces[session] = replace(known, seconds=seconds / num_voxels, is_time_spoilt=False)


_paces: WeakKeyDictionary[OnnxSession, Pace] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Round:
    """One run of the probe, from a network that held no working memory."""

    grown_bytes: int
    seconds: float
    waited_s: float


def _better(known: Pace | None, again: Pace) -> Pace:
    """The new probe's, but for what was measured well before; of two bad times the shorter."""
    if known is None:
        return again
    if not known.is_memory_spoilt:
        again = replace(again, working_bytes=known.working_bytes, is_memory_spoilt=False)
    if not known.is_time_spoilt:
        return replace(again, seconds=known.seconds, is_time_spoilt=False)
    if again.is_time_spoilt:
        return replace(again, seconds=min(known.seconds, again.seconds))
    return again


def _measured(session: OnnxSession) -> Pace:
    """Run the network on a small window: to warm up, for its memory, and for its time."""
    _, patch = volume_input(session.manifest)
    size = _probe_size(patch, session.manifest.inputs[0].shape[2:])
    batch = np.zeros((1, 1, *size), dtype=np.float32)
    session.run(batch, release_memory=True)
    return _judged([_round(session, batch) for _ in range(ROUNDS)], math.prod(size))


def _round(
    session: OnnxSession, batch: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> _Round:
    give_memory_back()  # what the heap keeps of earlier work would be filled without growing
    before = resident_bytes()
    session.run(batch)
    grown = max(resident_bytes() - before, 0)
    waited, began = waited_s(), time.perf_counter()
    session.run(batch, release_memory=True)
    return _Round(grown, time.perf_counter() - began, waited_s() - waited)


def _judged(rounds: list[_Round], num_voxels: int) -> Pace:
    """The middle of the memory, the least of the time, and whether the rounds tell the same."""
    grown = [one.grown_bytes for one in rounds]
    best = min(rounds, key=lambda one: one.seconds)
    is_even = max(grown) <= STEADY * min(grown) + STEADY_BYTES
    return Pace(
        working_bytes=statistics.median(grown) / num_voxels,
        seconds=best.seconds / num_voxels,
        is_memory_spoilt=not is_even,
        is_time_spoilt=best.waited_s > MAX_WAITED_SHARE * best.seconds,
    )


def _probe_size(patch: Shape, declared: tuple[int | str, ...]) -> Shape:
    """The patch, halved where it is long and the network takes it so."""
    sides = []
    for side, extent in zip(patch, declared, strict=True):
        small = side
        while isinstance(extent, str) and small > PROBE_SIDE and small % 16 == 0:
            small //= 2
        sides.append(small)
    return sides[0], sides[1], sides[2]
