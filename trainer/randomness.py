"""Randomness that follows from (seed, step, purpose) and from nothing else.

A run needs no sampler state in its checkpoint beyond the step, and one purpose drawing more
numbers does not move another.
"""

from __future__ import annotations

import hashlib

import torch


def generator(
    seed: int, step: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator on `device` for one purpose of one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    made = torch.Generator(device=device)
    made.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return made
