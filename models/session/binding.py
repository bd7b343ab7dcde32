"""Input and output buffers of a network on a device, reused between windows.

A plain `run` allocates both on the GPU for each batch. Here a batch is copied into the buffer that
the last batch of its shape used. Not safe to share between threads; `models.session.coalesce` lets
one thread at a time run the network.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
MAX_SHAPES = 2
"""Whose buffers are kept: a full batch's and the last, smaller one's."""


class Bound:
    """Runs a network through buffers of its own.

    Args:
        inference: An onnxruntime.InferenceSession.
        device: `cuda`, or `cpu` (to test, and to compare).
        number: Of the device.
        input_name: The network's input.
        output_name: The output that is wanted.
    """

    def __init__(
        self, inference: Any, *, device: str, number: int, input_name: str, output_name: str
    ) -> None:
        self._inference = inference
        self._place = (device, number)
        self._names = input_name, output_name
        self._buffers: OrderedDict[tuple[int, ...], tuple[Any, Any]] = OrderedDict()

    def run(self, batch: Float32Array, options: Any) -> Float32Array:
        """Run the network on (B, C, I, J, K); the answer is a copy on the host."""
        input_name, output_name = self._names
        source, target = self._buffers.pop(batch.shape, (None, None))
        if source is None:
            # Not `ortvalue_from_numpy`: on a CPU its value is the caller's own memory.
            source = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                batch.shape, np.float32, *self._place
            )
        source.update_inplace(batch)
        binding = self._inference.io_binding()
        binding.bind_ortvalue_input(input_name, source)
        if target is None:
            binding.bind_output(output_name, *self._place)
        else:
            binding.bind_ortvalue_output(output_name, target)
        self._inference.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        (target,) = binding.get_outputs()
        self._buffers[batch.shape] = source, target
        while len(self._buffers) > MAX_SHAPES:
            self._buffers.popitem(last=False)
        return np.array(target.numpy(), dtype=np.float32)

    def forget(self) -> None:
        """Let the buffers go."""
        self._buffers.clear()
