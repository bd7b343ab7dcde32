"""Input and output buffers of a network on a device, reused between windows.

A plain `run` allocates both on the GPU for each batch. Here a batch is copied into the buffer that
the last batch of its shape used. Not safe to share between threads; `models.session.coalesce` lets
one thread at a time run the network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
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
        output_names: The outputs that are wanted.
    """

    def __init__(
        self,
        inference: Any,
        *,
        device: str,
        number: int,
        input_name: str,
        output_names: Sequence[str],
    ) -> None:
        self._inference = inference
        self._place = (device, number)
        self._input_name, self._output_names = input_name, tuple(output_names)
        self._buffers: OrderedDict[tuple[int, ...], tuple[Any, Any]] = OrderedDict()

    def run(self, batch: Float32Array, options: Any) -> tuple[Float32Array, ...]:
        """Run the network on (B, C, I, J, K); the outputs are copies on the host."""
        source, targets = self._buffers.pop(batch.shape, (None, None))
        if source is None:
            # Not `ortvalue_from_numpy`: on a CPU its value is the caller's own memory.
            source = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                batch.shape, np.float32, *self._place
            )
        source.update_inplace(batch)
        binding = self._inference.io_binding()
        binding.bind_ortvalue_input(self._input_name, source)
        for number, name in enumerate(self._output_names):
            if targets is None:
                binding.bind_output(name, *self._place)
            else:
                binding.bind_ortvalue_output(name, targets[number])
        self._inference.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        targets = binding.get_outputs()
        self._buffers[batch.shape] = source, targets
        while len(self._buffers) > MAX_SHAPES:
            self._buffers.popitem(last=False)
        return tuple(np.array(target.numpy(), dtype=np.float32) for target in targets)

    def forget(self) -> None:
        """Let the buffers go."""
        self._buffers.clear()
