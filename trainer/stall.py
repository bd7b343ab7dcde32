"""Whether a training still goes on, by its steps: a heartbeat shows only that the supervisor lives.

limit = max(10 minutes, 20 x the median pause between steps)    in a stage with a known pace
        stall_s                                                 before that (imports, export)
"""

from __future__ import annotations

import statistics
from collections import deque

MIN_STALL_S = 600.0
PATIENCE = 20.0
"""Times the usual pause between two steps that are told of."""
NUM_PAUSES = 3
"""So many pauses make a pace; the newest hundred are kept."""


class StallWatch:
    """Hears of steps and says when they have failed to come for too long.

    Args:
        stall_s: Longest silence of a stage whose pace is not known yet.
        now: The present, monotonic, s.
    """

    def __init__(self, stall_s: float, now: float) -> None:
        self._stall_s = stall_s
        self._heard_at = now
        self._stage: object = None
        self._step: object = None
        self._pauses: deque[float] = deque(maxlen=100)

    def heard(self, stage: object, step: object, now: float) -> None:
        """A step of a stage is done; the same step told again is no news."""
        if stage != self._stage:
            self._pauses.clear()
        elif step == self._step:
            return
        else:
            self._pauses.append(now - self._heard_at)
        self._stage, self._step, self._heard_at = stage, step, now

    def limit_s(self) -> float:
        """How long the next step may take."""
        if len(self._pauses) < NUM_PAUSES:
            return self._stall_s
        return max(min(MIN_STALL_S, self._stall_s), PATIENCE * statistics.median(self._pauses))

    def is_stalled(self, now: float) -> bool:
        """Whether the next step is overdue."""
        return now - self._heard_at > self.limit_s()
