"""The queue of past embeddings that serve as negatives: a ring with a pointer on the device.

B batch, E embedding, N places of the queue, M vectors pushed at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

NO_SCAN = -1
"""Scan of the random vectors that fill a new queue."""


class Queue(nn.Module):
    """A ring of unit-length embeddings and the scan of each; all of it is in its `state_dict`.

    Attributes:
        vectors: (N, E).
        scans: Index of the scan that each vector is of, int64 (N,).
        pointer: Place of the oldest vector, the next to be overwritten.
    """

    vectors: Tensor
    scans: Tensor
    pointer: Tensor

    def __init__(self, size: int, embedding_size: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(size, embedding_size), dim=1))
        self.register_buffer("scans", torch.full((size,), NO_SCAN))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, vectors: Tensor, scans: Tensor) -> None:
        """Overwrite the oldest by (M, E) vectors of (M,) scans; nothing waits for the device."""
        at = self._places(len(vectors))
        self.vectors[at] = vectors
        self.scans[at] = scans
        self.pointer.copy_((self.pointer + len(vectors)) % len(self.vectors))

    def with_pushed(self, vectors: Tensor) -> Tensor:
        """What `vectors` would be after a push, (N, E); the queue stays as it is."""
        return self.vectors.index_copy(0, self._places(len(vectors)), vectors)

    def is_of(self, scans: Tensor) -> Tensor:
        """Which vectors are of the same scan, bool (B, N) for the samples' scans (B,)."""
        return scans[:, None] == self.scans

    def _places(self, count: int) -> Tensor:
        first = torch.arange(count, device=self.pointer.device)
        return (self.pointer + first) % len(self.vectors)
