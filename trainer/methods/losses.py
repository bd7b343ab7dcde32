"""The losses of a method that leaves nothing behind but its weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """What a step minimises.

    Attributes:
        total: Scalar.
        parts: Scalars that it consists of, and shares such as an accuracy, by name.
    """

    total: Tensor
    parts: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Detached scalars for the metrics."""
        return {name: v.detach() for name, v in {"loss": self.total, **self.parts}.items()}
