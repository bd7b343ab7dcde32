"""One vector for a scan from the runs that segment it: no window goes through the network twice.

B batch, E embedding, I J K voxels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.bundle import Manifest
from models.predict import FOREGROUND_ABOVE

Float32Array = NDArray[np.float32]


class FeatureNetwork(Protocol):
    """A `models.session.OnnxSession`, or something around one."""

    @property
    def manifest(self) -> Manifest:
        """How it wants its input, and what it gives."""

    def run_with_features(
        self, batch: Float32Array, *, release_memory: bool = False
    ) -> tuple[Float32Array, Float32Array]:
        """Logits (B, C, I, J, K) and features (B, E) of windows (B, 1, I, J, K)."""


class FeatureMeter:
    """The network as it segments, with the mean of the features of what goes through it.

        vector = normalise(sum over windows of body share * features(window))

    As `models.predict.embed` does with an encoder: a window of air has a share of 0. A window that
    two blocks of columns share (`predict.segment`) goes through the network, and counts, twice.

    Args:
        network: What windows go through.
        background: The value of air in them.
    """

    def __init__(self, network: FeatureNetwork, background: float) -> None:
        self._network = network
        self._threshold = np.float32(background + FOREGROUND_ABOVE)
        self._total: NDArray[np.float64] = np.zeros(1)

    @property
    def manifest(self) -> Manifest:
        """The network's."""
        return self._network.manifest

    def run(self, batch: Float32Array, *, release_memory: bool = False) -> Float32Array:
        """Logits (B, C, I, J, K) of windows (B, 1, I, J, K)."""
        logits, features = self._network.run_with_features(batch, release_memory=release_memory)
        shares = (batch > self._threshold).mean(axis=(1, 2, 3, 4), dtype=np.float64)  # (B,)
        self._total = self._total + shares @ features.astype(np.float64)  # (E,)
        return logits

    def vector(self) -> Float32Array | None:
        """Of unit length, (E,); None where no window had a body, or all features are zero."""
        length = float(np.linalg.norm(self._total))
        if length == 0.0:
            return None
        return (self._total / length).astype(np.float32)
