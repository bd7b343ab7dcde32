"""Batch norm's running statistics, made anew from crops as they are.

A method that hides or paints what its network sees gathers statistics of such crops, and a scan is
served with them. Only the encoder's statistics change: no weight, no random number of training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods.method import Method
from trainer.methods.pairs import make_crops

NUM_BATCHES = 16


@torch.no_grad()
def recalibrate(
    method: Method[Any, Any],
    volumes: Resident | ResidentImages,
    sampler: PairSampler | None,
    device: torch.device,
) -> None:
    """Set the encoder's running statistics to their plain mean over clean batches.

        for batch n of those that steps num_steps + 1, ... would cut, as they are:
            running = running + (statistics of the batch - running) / (n + 1)

    As PreciseBN (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3), which takes
    more batches. All ranks call it together, as their norms are joined.

    Args:
        method: In training, after its last step.
        volumes: What views are cut from.
        sampler: Of crops of volumes; None for images.
        device: Where the method is.
    """
    encoder = method.student.encoder
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for batch in range(NUM_BATCHES):
        for norm in norms:
            norm.momentum = 1.0 / (batch + 1)
        step = method.recipe.num_steps + 1 + batch
        crops, _ = make_crops(method.recipe, volumes, sampler, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            encoder(crops)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
