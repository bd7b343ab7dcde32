"""What was drawn on the host, on its way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for the device.

    Only a copy from pinned memory does not wait; torch keeps that memory until the copy is done.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
