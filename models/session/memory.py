"""Allocation failures told from other failures, and memory given back to the system.

onnxruntime has no error class for them; its arena, the C++ library and CUDA's libraries have their
words. Those of the CPU arena are pinned by tests with a real failure.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path
from typing import Final, Literal

HOST: Final = "host_out_of_memory"
GPU: Final = "gpu_out_of_memory"
OUT_OF_MEMORY = frozenset({HOST, GPU})
"""Codes of a `BundleError` after which a smaller batch, or the next request, may succeed."""

_FAILED = re.compile(
    r"Failed to allocate memory for requested buffer"
    r"|Available memory of \d+ is smaller than requested bytes"
    r"|bad_alloc|bad allocation|out of memory|cudaErrorMemoryAllocation"
    r"|CU(?:DNN|BLAS)_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    re.IGNORECASE,
)


def allocation_failure(
    error: BaseException, *, is_gpu: bool
) -> Literal["host_out_of_memory", "gpu_out_of_memory"] | None:
    """The code of an allocation that failed; None for any other failure.

    Args:
        error: What a run or an opening raised.
        is_gpu: Whether the session's tensors live on a GPU; the arena's message does not say whose
            memory it is, `MemoryError` is always the host's.
    """
    if isinstance(error, MemoryError):
        return HOST
    if _FAILED.search(str(error)) is None:
        return None
    return GPU if is_gpu and "bad_alloc" not in str(error) else HOST


def give_memory_back() -> None:
    """Free what nobody refers to, and hand freed heap pages to the system (glibc keeps them)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


def resident_memory_bytes() -> int:
    """Memory of this process that is in RAM; 0 where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
