"""An onnxruntime session over a verified bundle; the only onnxruntime import.

onnxruntime answers a request for CUDA on a machine without it with a CPU session and no exception,
so the providers that a session really got are asked for afterwards, and a wrong one is refused.

B batch, C channels, L labels, E embedding, I J K voxels.
"""

from __future__ import annotations

import importlib.metadata
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from models import bundle
from models.bundle import BundleError, Manifest
from models.verify import check_consistent, verified_model

Float32Array = NDArray[np.float32]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
_ORT_ERRORS = tuple(
    error
    for error in vars(ort_errors).values()
    if isinstance(error, type) and issubclass(error, Exception)
)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class OnnxSession:
    """A model ready to run; safe to share between threads."""

    manifest: Manifest
    digest: str
    """The bundle's."""
    provider: str
    """The execution provider that it really has."""
    size_bytes: int
    """Of the weights; working memory is given back (see `run`)."""
    run_limit_s: float
    _inference: Any = field(repr=False)

    def run(self, batch: Float32Array, *, release_memory: bool = False) -> Float32Array:
        """Run the network.

        Args:
            batch: Network input, (B, C, I, J, K).
            release_memory: Give working memory back to the system afterwards; for the last batch
                of a scan.

        Returns:
            The manifest's first output: a segmenter's logits (B, L, I, J, K), a classifier's
            logits (B, L), or embeddings (B, E).

        Raises:
            BundleError: `inference_timeout`, `inference_failed` or `non_finite_output`.
            ValueError: The batch is not float32 in the shape of the manifest's input.
        """
        expected = self.manifest.inputs[0].shape
        fits = batch.ndim == len(expected) and batch.shape[1] == expected[1]
        if not fits or batch.dtype != np.float32:
            raise ValueError(f"batch is {batch.dtype} {batch.shape}, not float32 {expected}")
        options = onnxruntime.RunOptions()
        if release_memory:
            arena = "cpu:0" if self.provider == CPU else "gpu:0"
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
        feed = {self.manifest.inputs[0].name: np.ascontiguousarray(batch)}
        with _time_limit(options, self.run_limit_s) as over:
            try:
                (output,) = self._inference.run([self.manifest.outputs[0].name], feed, options)
            except _ORT_ERRORS as error:
                if over.is_set():
                    raise BundleError(
                        "inference_timeout", f"a batch took longer than {self.run_limit_s} s"
                    ) from None
                raise BundleError("inference_failed", _first_line(error)) from error
        if not np.isfinite(output).all():
            raise BundleError("non_finite_output", "the network's output is not finite")
        return np.asarray(output, dtype=np.float32)


def open_session(
    bundle_dir: Path,
    *,
    device: str = "cpu",
    num_threads: int = 0,
    digest: str | None = None,
    run_limit_s: float = 600.0,
    gpu_mem_limit_bytes: int | None = None,
    part: Literal["model", "coarse"] = "model",
) -> OnnxSession:
    """Verify a bundle and load its model on a device.

    Args:
        bundle_dir: The bundle's folder.
        device: `cpu`, `cuda` or `cuda:N`; never exchanged for another.
        num_threads: Threads inside one operator; 0 is one for every core.
        digest: The bundle's digest as the registry knows it, to be held against the folder's.
        run_limit_s: A batch that takes longer is ended.
        gpu_mem_limit_bytes: Most that this session's arena may take on the GPU.
        part: `coarse` is the network that finds the organ of a cascade of two; its session has
            the manifest of that network (`models.bundle.coarse_manifest`).

    Raises:
        BundleError: `bundle_invalid`, `bundle_corrupt`, `bundle_inconsistent` (the ONNX file
            contradicts the manifest), `external_data`, `provider_unavailable`, or
            `runtime_conflict` (both onnxruntime distributions are installed).
        ValueError: No such kind of device.
    """
    provider, device_id = _parse_device(device)
    if provider not in available_providers():
        raise BundleError("provider_unavailable", f"this onnxruntime has no {provider}")

    manifest = bundle.load(bundle_dir)
    found_digest = bundle.digest_of(bundle_dir)
    if digest is not None and found_digest != digest:
        raise BundleError("bundle_corrupt", f"the bundle is {found_digest}, not {digest}")
    file = bundle.MODEL if part == "model" else bundle.COARSE
    if part == "coarse":
        manifest = bundle.coarse_manifest(manifest)
    model = verified_model(bundle_dir, manifest, file)

    cuda_options: dict[str, object] = {
        "device_id": device_id,
        "arena_extend_strategy": "kSameAsRequested",
    }
    if gpu_mem_limit_bytes is not None:
        cuda_options["gpu_mem_limit"] = gpu_mem_limit_bytes
    providers = [CPU] if provider == CPU else [(CUDA, cuda_options), CPU]
    if provider == CUDA:
        onnxruntime.preload_dlls()  # CUDA and cuDNN from their wheels
    try:
        inference = onnxruntime.InferenceSession(
            model, sess_options=_session_options(num_threads), providers=providers
        )
    except _ORT_ERRORS as error:
        raise BundleError(
            "bundle_invalid", f"onnxruntime refuses it: {_first_line(error)}"
        ) from error
    inference.disable_fallback()

    refuse_another_provider(inference, provider)
    check_consistent(inference, manifest)
    return OnnxSession(manifest, found_digest, provider, len(model), run_limit_s, inference)


class SessionCache:
    """Resident sessions by bundle digest; safe to share between threads.

    Least recently used ones leave first. One that left but is still at work somewhere is handed
    out again rather than loaded twice.

    Args:
        max_bytes: Most that the resident models weigh together (`OnnxSession.size_bytes`). A model
            that is larger alone is opened and handed out, but does not stay.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_loads = 0
        """Models opened since the start."""
        self._resident: OrderedDict[str, OnnxSession] = OrderedDict()  # oldest use first
        self._live: WeakValueDictionary[str, OnnxSession] = WeakValueDictionary()
        self._opening: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, digest: str, opener: Callable[[], OnnxSession]) -> OnnxSession:
        """The session of this bundle, opened if it is not live; by one thread only.

        What the opener raises goes through, and the next call tries again.
        """
        with self._lock:
            session = self._use(digest)
            if session is not None:
                return session
            opening = self._opening.setdefault(digest, threading.Lock())
        with opening:
            with self._lock:
                session = self._use(digest)
            if session is not None:
                return session
            session = opener()
            with self._lock:
                self.num_loads += 1
                self._live[digest] = session
                self._keep(digest, session)
                self._opening.pop(digest, None)
            return session

    @property
    def resident_bytes(self) -> int:
        """Weight of the models that stay."""
        with self._lock:
            return self._weight()

    def digests(self) -> list[str]:
        """The resident bundles, least recently used first."""
        with self._lock:
            return list(self._resident)

    def clear(self) -> None:
        """Let every model go; those at work end their work first."""
        with self._lock:
            self._resident.clear()

    def _use(self, digest: str) -> OnnxSession | None:
        session = self._live.get(digest)
        if session is not None:
            self._keep(digest, session)
        return session

    def _keep(self, digest: str, session: OnnxSession) -> None:
        if session.size_bytes > self.max_bytes:
            return
        self._resident[digest] = session
        self._resident.move_to_end(digest)
        while self._weight() > self.max_bytes:
            self._resident.popitem(last=False)

    def _weight(self) -> int:
        return sum(session.size_bytes for session in self._resident.values())


def available_providers() -> list[str]:
    """What this onnxruntime was built with; that CUDA really works, only a session shows.

    Raises:
        BundleError: `runtime_conflict`, both onnxruntime distributions are installed.
    """
    _refuse_two_distributions()
    return list(onnxruntime.get_available_providers())


def refuse_another_provider(inference: Any, provider: str) -> None:
    """Hold the providers that an InferenceSession really got against the one asked for.

    Raises:
        BundleError: `provider_unavailable`.
    """
    real = inference.get_providers()
    if not real or real[0] != provider:
        raise BundleError("provider_unavailable", f"asked for {provider}, got {real}")


def _parse_device(device: str) -> tuple[str, int]:
    match = re.fullmatch(r"(cpu)|cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise ValueError(f"device {device!r} must be cpu, cuda or cuda:N")
    return (CPU, 0) if match[1] else (CUDA, int(match[2] or 0))


def _refuse_two_distributions() -> None:
    """Both share one folder, and the last one installed hides the other (onnxruntime#26996)."""
    installed = []
    for name in _DISTRIBUTIONS:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(installed) > 1:
        raise BundleError("runtime_conflict", f"uninstall one of {' and '.join(installed)}")


def _session_options(num_threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # A plan of the memory is kept for each shape of input beside what the arena holds: nearly twice
    # the memory, and no faster (docs/performance.md).
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # errors; a missing CUDA is ours to report
    # Spinning threads burn the cores that training and other workers want.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
