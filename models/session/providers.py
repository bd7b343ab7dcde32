"""Execution providers: which one runs a model, with which options.

onnxruntime answers a request for CUDA on a machine without it with a CPU session and no exception,
so the providers that a session really got are asked for afterwards, and a wrong one is refused.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from models.bundle import BundleError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, OPENVINO = "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
PROVIDER_OF = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT, "openvino": OPENVINO}
ON_GPU = frozenset({CUDA, TENSORRT})
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
"""They share the folder `onnxruntime`: the last one installed hides the others."""


@dataclass(frozen=True, slots=True)
class ProviderOptions:
    """What the providers are told beyond their name; each field names those that read it."""

    gpu_mem_limit_bytes: int | None = None
    """CUDA and TensorRT: most that a session's arena may take; None is the whole GPU."""
    conv_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"] = "HEURISTIC"
    """CUDA: how cuDNN's algorithm for a convolution is found. onnxruntime's own default tries every
    one at the first run of every shape, which a first request would wait for."""
    engine_cache_dir: Path | None = None
    """TensorRT: where built engines are kept, a folder for each bundle digest; None keeps none,
    and every start builds them anew (minutes)."""
    num_threads: int = 0
    """OpenVINO: of its own; 0 leaves it the choice."""


@dataclass(frozen=True, slots=True)
class Device:
    """A provider and the number of its device."""

    provider: str
    number: int = 0

    @property
    def is_gpu(self) -> bool:
        """Whether tensors live on a GPU."""
        return self.provider in ON_GPU


def parse_device(device: str) -> Device:
    """`cpu`, `openvino`, `cuda`, `tensorrt`; the last two also with `:N`.

    Raises:
        ValueError: Anything else.
    """
    match = re.fullmatch(r"(cpu|openvino)|(cuda|tensorrt)(?::(\d{1,3}))?", device)
    if match is None:
        raise ValueError(f"device {device!r} must be cpu, openvino, cuda[:N] or tensorrt[:N]")
    return Device(PROVIDER_OF[match[1] or match[2]], int(match[3] or 0))


def provider_list(device: Device, options: ProviderOptions, digest: str) -> list[Any]:
    """The providers for an InferenceSession: the asked one first, then what it leaves to others.

    Args:
        device: Asked for.
        options: Of the providers.
        digest: The bundle's; TensorRT's engines are kept under it.
    """
    cuda: dict[str, object] = {
        "device_id": device.number,
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": options.conv_search,
    }
    if options.gpu_mem_limit_bytes is not None:
        cuda["gpu_mem_limit"] = options.gpu_mem_limit_bytes
    match device.provider:
        case "CPUExecutionProvider":
            return [CPU]
        case "OpenVINOExecutionProvider":
            # float32 as everywhere on a CPU: OpenVINO would choose bfloat16 where the CPU has it.
            openvino: dict[str, object] = {"device_type": "CPU", "precision": "FP32"}
            if options.num_threads:
                openvino["num_of_threads"] = options.num_threads
            return [(OPENVINO, openvino), CPU]
        case "CUDAExecutionProvider":
            return [(CUDA, cuda), CPU]
        case _:
            return [(TENSORRT, _tensorrt(device, options, digest)), (CUDA, cuda), CPU]


def available_providers() -> list[str]:
    """What this onnxruntime was built with; that a GPU really works, only a session shows.

    Raises:
        BundleError: `runtime_conflict`, several onnxruntime distributions are installed.
    """
    refuse_two_distributions()
    return list(onnxruntime.get_available_providers())


def refuse_another_provider(inference: Any, provider: str) -> None:
    """Hold the providers that an InferenceSession really got against the one asked for.

    Raises:
        BundleError: `provider_unavailable`.
    """
    real = inference.get_providers()
    if not real or real[0] != provider:
        raise BundleError("provider_unavailable", f"asked for {provider}, got {real}")


def refuse_two_distributions() -> None:
    """All share one folder, and the last one installed hides the others (onnxruntime#26996).

    Raises:
        BundleError: `runtime_conflict`.
    """
    installed = []
    for name in DISTRIBUTIONS:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(installed) > 1:
        raise BundleError("runtime_conflict", f"keep one of {' and '.join(installed)}")


def _tensorrt(device: Device, options: ProviderOptions, digest: str) -> dict[str, object]:
    tensorrt: dict[str, object] = {"device_id": device.number}
    if options.engine_cache_dir is not None:
        folder = options.engine_cache_dir / digest
        folder.mkdir(parents=True, exist_ok=True)
        tensorrt |= {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
        }
    return tensorrt
