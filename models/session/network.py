"""A loaded network with its limits: what is finite, in time and in memory, comes out.

B batch, C channels, I J K voxels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from models.bundle import BundleError, Manifest, feature_map_of, features_of
from models.session.binding import Bound
from models.session.coalesce import MAX_VOXELS, Coalescer, Outputs
from models.session.memory import allocation_failure, resident_memory_bytes
from models.session.providers import Device

Float32Array = NDArray[np.float32]
FAILURES: tuple[type[Exception], ...] = (
    MemoryError,
    *(
        error
        for error in vars(ort_errors).values()
        if isinstance(error, type) and issubclass(error, Exception)
    ),
)
"""What onnxruntime raises when it loads or runs."""


class Network:
    """An InferenceSession that one thread at a time runs, for all.

    Args:
        inference: An onnxruntime.InferenceSession.
        manifest: Its bundle's.
        device: It runs there.
        run_limit_s: A run that takes longer is ended.
        before_bytes: The process' memory before it was opened.
    """

    def __init__(
        self,
        inference: Any,
        manifest: Manifest,
        device: Device,
        *,
        run_limit_s: float,
        before_bytes: int,
    ) -> None:
        self._inference = inference
        self._input_name, self._output_names = manifest.inputs[0].name, [manifest.outputs[0].name]
        if (features := features_of(manifest)) is not None:
            self._output_names.append(features.name)
        self._device = device
        self.is_gpu = device.is_gpu
        self._run_limit_s = run_limit_s
        self._before_bytes = before_bytes
        self._bound: Bound | None = None
        if device.is_gpu:
            self._bound = Bound(
                inference,
                device="cuda",
                number=device.number,
                input_name=self._input_name,
                output_names=self._output_names,
            )
        # A CPU gains nothing from larger batches: they take memory, and the first one waits.
        together = {"max_voxels": MAX_VOXELS if device.is_gpu else 0}
        self.run_together = Coalescer(partial(self._run, self._output_names), **together)
        mapped = feature_map_of(manifest)
        names = [*self._output_names, *([mapped.name] if mapped is not None else [])]
        self.run_with_map_together = Coalescer(partial(self._run, names), **together)
        """The same with the encoder's feature map, which is copied out only where it is wanted."""
        self.grown_bytes = 0
        """By how much the process grew from before the opening until after the first run."""

    def _run(self, names: list[str], batch: Float32Array, release_memory: bool) -> Outputs:
        options = onnxruntime.RunOptions()
        if release_memory:
            arena = f"gpu:{self._device.number}" if self._device.is_gpu else "cpu:0"
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
        with _time_limit(options, self._run_limit_s) as over:
            try:
                outputs = self._outputs(names, np.ascontiguousarray(batch), options)
            except FAILURES as error:
                if self._bound is not None:
                    self._bound.forget()
                raise self._failure(error, is_over=over.is_set()) from error
        if not all(np.isfinite(output).all() for output in outputs):
            raise BundleError("non_finite_output", "the network's output is not finite")
        if self.grown_bytes == 0:
            self.grown_bytes = max(resident_memory_bytes() - self._before_bytes, 1)
        return tuple(np.asarray(output, dtype=np.float32) for output in outputs)

    def _outputs(self, names: list[str], batch: Float32Array, options: Any) -> Any:
        if self._bound is not None and names == self._output_names:
            return self._bound.run(batch, options)
        return self._inference.run(names, {self._input_name: batch}, options)

    def _failure(self, error: BaseException, *, is_over: bool) -> BundleError:
        if is_over:
            limit = f"a batch took longer than {self._run_limit_s} s"
            return BundleError("inference_timeout", limit)
        code = allocation_failure(error, is_gpu=self._device.is_gpu)
        if code is not None:
            return BundleError(code, "the network's working memory could not be allocated")
        return BundleError("inference_failed", first_line(error))


@contextmanager
def _time_limit(options: onnxruntime.RunOptions, limit_s: float) -> Iterator[threading.Event]:
    """Terminate the run after the limit; the event tells that this happened."""
    over = threading.Event()

    def end() -> None:
        over.set()
        options.terminate = True

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()


def first_line(error: BaseException) -> str:
    """What an onnxruntime error says first."""
    return str(error).strip().partition("\n")[0][:300]
