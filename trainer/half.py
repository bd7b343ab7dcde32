"""The float16 variant of an exported network, for GPUs; kept only where it answers alike."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

TOLERANCE = 1e-2
"""Largest difference, as a part of the largest value of torch's answer where that is above 1."""
MIN_AGREEMENT = 0.999
"""Of the argmax of logits, and the cosine of embeddings, with torch's in float32."""


def write_float16(model: Path, target: Path) -> None:
    """Convert an ONNX file's weights and arithmetic to float16; inputs and outputs stay float32.

    onnxruntime's own converter; `Resize` and the like keep float32 by its list.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every weight that float16 rounds to zero
        half = convert_float_to_float16(onnx.load(model), keep_io_types=True)
    onnx.save(half, target)
