"""onnxruntime sessions over verified bundles; the only onnxruntime import of this package.

providers   which execution provider runs, with which options; what was asked is what runs
network     one opened model: `open_session`, `OnnxSession.run`
binding     a GPU's input and output buffers, reused between windows
coalesce    batches of several threads become one run
memory      allocation failures told from other failures, and memory given back
cache       resident sessions: least recently used leave, live ones never
"""

from models.session.cache import SessionCache
from models.session.memory import HOST, OUT_OF_MEMORY, give_memory_back
from models.session.opening import OnnxSession, Precision, open_session
from models.session.providers import (
    CPU,
    CUDA,
    DISTRIBUTIONS,
    OPENVINO,
    TENSORRT,
    ProviderOptions,
    available_providers,
    refuse_another_provider,
)

__all__ = [
    "CPU",
    "CUDA",
    "DISTRIBUTIONS",
    "HOST",
    "OPENVINO",
    "OUT_OF_MEMORY",
    "TENSORRT",
    "OnnxSession",
    "Precision",
    "ProviderOptions",
    "SessionCache",
    "available_providers",
    "give_memory_back",
    "open_session",
    "refuse_another_provider",
]
