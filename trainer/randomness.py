"""Randomness that follows from (seed, step, purpose) and from nothing else.

A run needs no sampler state in its checkpoint beyond the step, and one purpose drawing more
numbers does not move another.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")


def generator(
    seed: int, step: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator on `device` for one purpose of one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    made = torch.Generator(device=device)
    made.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return made


def take(drawn: D, rows: Tensor) -> D:
    """What was drawn, for some samples of a batch: `rows` of every field, tensors (B, ...)."""
    fields = dataclasses.fields(drawn)
    return dataclasses.replace(drawn, **{f.name: getattr(drawn, f.name)[rows] for f in fields})
