"""Batches that several threads bring at once become one run of the network.

Nobody waits for company: a batch that finds the network idle runs at once, alone. What arrives
while it runs is taken together when it ends, in the order in which it came. So batches grow with
the load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.bundle import BundleError

Float32Array = NDArray[np.float32]
Outputs = tuple[Float32Array, ...]
"""Of a run, each with the batch as its first axis."""
MAX_VOXELS = 1 << 20
"""Input voxels of batches taken together; as many as the engine puts into one of its own."""


@dataclass(slots=True, eq=False)
class _Job:
    batch: Float32Array
    release_memory: bool
    answer: Outputs | None = None
    error: BaseException | None = None
    is_done: bool = False


class Coalescer:
    """One thread at a time runs the network, on what all have brought.

    Args:
        run: The network: a batch, and whether to give working memory back afterwards.
        max_voxels: Of batches taken together; 0 runs each alone, one after another.
    """

    def __init__(
        self, run: Callable[[Float32Array, bool], Outputs], *, max_voxels: int = MAX_VOXELS
    ) -> None:
        self._run = run
        self._max_voxels = max_voxels
        self._waiting: list[_Job] = []
        self._is_busy = False
        self._changed = threading.Condition()
        self.num_runs = 0
        """Of the network, since the start."""

    def __call__(self, batch: Float32Array, release_memory: bool) -> Outputs:
        """The network's outputs for a batch; raises what the network raised on it."""
        job = _Job(batch, release_memory)
        with self._changed:
            self._waiting.append(job)
            while not job.is_done and (self._is_busy or self._waiting[0] is not job):
                self._changed.wait()  # its turn: who runs again at once would starve the others
            if not job.is_done:
                self._is_busy = True
                together = self._take(job)
        if not job.is_done:
            try:
                self._do(together)
            finally:
                with self._changed:
                    self._is_busy = False
                    for one in together:
                        one.is_done = True
                    self._changed.notify_all()
        if job.error is not None:
            raise job.error
        assert job.answer is not None  # done, and without an error
        return job.answer

    def _take(self, job: _Job) -> list[_Job]:
        """The job and others of its shape that wait, the oldest first, while they are small."""
        self._waiting.remove(job)
        together, num_voxels = [job], job.batch.size
        for other in list(self._waiting):
            fits = num_voxels + other.batch.size <= self._max_voxels
            if fits and other.batch.shape[1:] == job.batch.shape[1:]:
                self._waiting.remove(other)
                together.append(other)
                num_voxels += other.batch.size
        return together

    def _do(self, jobs: list[_Job]) -> None:
        if len(jobs) > 1:
            try:
                batch = np.concatenate([job.batch for job in jobs])
                answers = self._once(batch, any(job.release_memory for job in jobs))
            except (BundleError, MemoryError):  # one may spoil it: each gets its own answer
                pass
            else:
                first = 0
                for job in jobs:
                    stop = first + len(job.batch)
                    job.answer = tuple(answer[first:stop] for answer in answers)
                    first = stop
                return
        for job in jobs:
            try:
                job.answer = self._once(job.batch, job.release_memory)
            except BaseException as error:  # noqa: BLE001 - raised again in the job's own thread
                job.error = error

    def _once(self, batch: Float32Array, release_memory: bool) -> Outputs:
        self.num_runs += 1
        return self._run(batch, release_memory)
