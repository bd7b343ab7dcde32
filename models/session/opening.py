"""One opened model: its bundle verified, its provider the one asked for.

B batch, C channels, L labels, E embedding, I J K voxels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models import bundle, ood, reference
from models.bundle import BundleError, Manifest, feature_map_of, features_of
from models.session.coalesce import Coalescer, Outputs
from models.session.memory import allocation_failure, resident_memory_bytes
from models.session.network import FAILURES, Network, first_line
from models.session.providers import (
    CPU,
    Device,
    ProviderOptions,
    available_providers,
    parse_device,
    provider_list,
    refuse_another_provider,
)
from models.verify import check_consistent, verified_model

Float32Array = NDArray[np.float32]
KEPT_VOXELS = 1 << 18
"""Of the largest batch whose working memory may stay."""
Precision = Literal["auto", "float32", "float16"]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class OnnxSession:
    """A model ready to run; safe to share between threads, whose batches a GPU runs together."""

    manifest: Manifest
    digest: str
    """The bundle's."""
    provider: str
    """The execution provider that it really has."""
    size_bytes: int
    """Of the weights."""
    run_limit_s: float
    precision: str
    """`float32`, or `float16`: the variant of the network that was opened."""
    fell_back_from: str | None
    """The provider that was asked for and is not there; None where `provider` was asked for."""
    max_batch: int | None
    """Windows that the network gets at once; a larger batch is run in parts."""
    _network: Network = field(repr=False)
    reference: ood.Reference | None = field(default=None, repr=False)
    """The training set's embeddings; None where the bundle has none, or too few."""

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
            BundleError: `inference_timeout`, `inference_failed`, `non_finite_output`, or
                `host_out_of_memory` or `gpu_out_of_memory` (`models.session.OUT_OF_MEMORY`).
            ValueError: The batch is not float32 in the shape of the manifest's input.
        """
        return self._outputs(batch, release_memory=release_memory)[0]

    @property
    def has_features(self) -> bool:
        """Whether `run_with_features` may be called."""
        return features_of(self.manifest) is not None

    def run_with_features(
        self, batch: Float32Array, *, release_memory: bool = False
    ) -> tuple[Float32Array, Float32Array]:
        """Run a segmenter once, for its logits and for what its encoder made of each window.

        Args:
            batch: As of `run`.
            release_memory: As of `run`.

        Returns:
            Logits (B, L, I, J, K) and features (B, E).

        Raises:
            BundleError: As `run`; `wrong_model_kind` where the network has no such output.
            ValueError: As `run`.
        """
        if not self.has_features:
            raise BundleError("wrong_model_kind", "the network gives no features")
        logits, features = self._outputs(batch, release_memory=release_memory)
        return logits, features

    def run_with_map(
        self, batch: Float32Array, *, release_memory: bool = False
    ) -> tuple[Float32Array, Float32Array]:
        """Run an encoder once, for its embeddings and for the feature map that they are means of.

        Args:
            batch: As of `run`.
            release_memory: As of `run`.

        Returns:
            Embeddings (B, E) and feature maps (B, E, i, j, k).

        Raises:
            BundleError: As `run`; `no_feature_map` where the network has no such output.
            ValueError: As `run`.
        """
        if feature_map_of(self.manifest) is None:
            raise BundleError("no_feature_map", "the encoder gives no feature map")
        network = self._network.run_with_map_together
        embeddings, maps = self._outputs(batch, release_memory=release_memory, network=network)
        return embeddings, maps

    def _outputs(
        self, batch: Float32Array, *, release_memory: bool, network: Coalescer | None = None
    ) -> Outputs:
        expected = self.manifest.inputs[0].shape
        fits = batch.ndim == len(expected) and batch.shape[1] == expected[1]
        if not fits or batch.dtype != np.float32:
            raise ValueError(f"batch is {batch.dtype} {batch.shape}, not float32 {expected}")
        run = network or self._network.run_together
        at_once = self.max_batch or max(len(batch), 1)
        answers = []
        for first in range(0, len(batch), at_once):
            part = batch[first : first + at_once]
            is_last = first + at_once >= len(batch)
            answers.append(run(part, release_memory and is_last))
        if len(answers) == 1:
            return answers[0]
        return tuple(np.concatenate(parts) for parts in zip(*answers, strict=True))

    def warm_up(self) -> float:
        """Run one empty window, so that no request pays for the first run; seconds that it took."""
        began = time.monotonic()
        channels = len(self.manifest.channels)
        window = np.zeros((1, channels, *self.manifest.patch_size), dtype=np.float32)
        self.run(window)
        return time.monotonic() - began

    def may_keep_memory(self, num_voxels: int) -> bool:
        """Whether batches of so many voxels may leave their working memory for the next request.

        On a CPU, of small ones: to fetch it anew each time made patches of 64x64x32 an eighth
        slower.
        """
        return not self._network.is_gpu and num_voxels <= KEPT_VOXELS

    @property
    def resident_bytes(self) -> int:
        """What it costs to keep: weights, their copies, and the working memory of a first run."""
        return max(self.size_bytes, self._network.grown_bytes)

    @property
    def num_runs(self) -> int:
        """Of the network; fewer than calls of `run` where batches ran together."""
        return self._network.run_together.num_runs


def open_session(
    bundle_dir: Path,
    *,
    device: str = "cpu",
    num_threads: int = 0,
    digest: str | None = None,
    run_limit_s: float = 600.0,
    options: ProviderOptions | None = None,
    cpu_fallback: bool = False,
    precision: Precision = "auto",
    max_batch: int | None = None,
    part: Literal["model", "coarse"] = "model",
) -> OnnxSession:
    """Verify a bundle and load its model on a device.

    Args:
        bundle_dir: The bundle's folder.
        device: `cpu`, `openvino`, `cuda[:N]` or `tensorrt[:N]`.
        num_threads: Threads inside one operator; 0 is one for every core.
        digest: The bundle's digest as the registry knows it, to be held against the folder's.
        run_limit_s: A batch that takes longer is ended.
        options: Of the providers.
        cpu_fallback: Take the CPU where the device is not there, and say so in `fell_back_from`;
            otherwise a device is never exchanged for another.
        precision: `float16` asks for that variant of the network; `auto` takes it on a GPU if the
            bundle has it with a passing parity record, float32 otherwise.
        max_batch: See `OnnxSession`.
        part: `coarse` is the network that finds the organ of a cascade of two, in float32; its
            session has the manifest of that network (`models.bundle.coarse_manifest`).

    Raises:
        BundleError: `bundle_invalid`, `bundle_corrupt`, `bundle_inconsistent` (the ONNX file
            contradicts the manifest), `external_data`, `provider_unavailable`,
            `precision_unavailable`, `runtime_conflict` (several onnxruntime distributions are
            installed), `host_out_of_memory` or `gpu_out_of_memory`.
        ValueError: No such kind of device.
    """
    asked = parse_device(device)
    options = options or ProviderOptions()
    before_bytes = resident_memory_bytes()
    manifest = bundle.load(bundle_dir)
    found_digest = bundle.digest_of(bundle_dir)
    if digest is not None and found_digest != digest:
        raise BundleError("bundle_corrupt", f"the bundle is {found_digest}, not {digest}")
    if part == "coarse":
        manifest = bundle.coarse_manifest(manifest)

    def load(on: Device) -> tuple[Any, int, str]:
        if on.provider not in available_providers():
            raise BundleError("provider_unavailable", f"this onnxruntime has no {on.provider}")
        chosen = _precision(manifest, precision, on) if part == "model" else "float32"
        whole = bundle.MODEL if part == "model" else bundle.COARSE
        name = bundle.MODEL_FLOAT16 if chosen == "float16" else whole
        model = verified_model(bundle_dir, manifest, name)
        providers = provider_list(on, options, found_digest)
        return _inference(model, providers, on, num_threads), len(model), chosen

    used = asked
    try:
        inference, size_bytes, chosen = load(asked)
    except BundleError as error:
        if error.code != "provider_unavailable" or not cpu_fallback or asked.provider == CPU:
            raise
        used = Device(CPU)
        inference, size_bytes, chosen = load(used)
    check_consistent(inference, manifest)
    return OnnxSession(
        manifest,
        found_digest,
        used.provider,
        size_bytes,
        run_limit_s,
        chosen,
        asked.provider if used != asked else None,
        max_batch,
        Network(inference, manifest, used, run_limit_s=run_limit_s, before_bytes=before_bytes),
        reference.load(bundle_dir, manifest) if part == "model" else None,
    )


def _precision(manifest: Manifest, asked: Precision, device: Device) -> str:
    records = [one for one in manifest.parity if one.precision == "float16"]
    is_proven = bool(records) and all(one.passed for one in records)
    is_there = bundle.MODEL_FLOAT16 in manifest.files and is_proven
    if asked == "float16" and not is_there:
        raise BundleError(
            "precision_unavailable", "the bundle has no float16 network that passed parity"
        )
    if asked == "float16" or (asked == "auto" and is_there and device.is_gpu):
        return "float16"
    return "float32"


def _inference(model: bytes, providers: list[Any], device: Device, num_threads: int) -> Any:
    if device.is_gpu:
        onnxruntime.preload_dlls()  # CUDA and cuDNN from their wheels
    try:
        inference = onnxruntime.InferenceSession(
            model, sess_options=_session_options(num_threads), providers=providers
        )
    except FAILURES as error:
        code = allocation_failure(error, is_gpu=device.is_gpu)
        if code is not None:
            raise BundleError(code, "there is not enough memory to load the model") from error
        raise BundleError(
            "bundle_invalid", f"onnxruntime refuses it: {first_line(error)}"
        ) from error
    inference.disable_fallback()
    refuse_another_provider(inference, device.provider)
    return inference


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
