"""Which scans look alike: Semantic Genesis' autoencoder on whole scans, and distances of its codes.

Haghighi et al., MICCAI 2020, section 2.1 ("self-discovery").

V scans, D features of a scan, B batch, I J K voxels of a resized scan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models import recipe as recipes
from models.networks.unet3d import UNet3d
from models.recipe import PretrainRecipe
from trainer.data import filters
from trainer.data.resident import Resident, Size
from trainer.data.to_device import to_device
from trainer.errors import Preempted
from trainer.methods import intensities
from trainer.randomness import generator
from trainer.report import Report

ASKED_EVERY = 10
"""Steps after which the autoencoder reports, and asks whether to stop."""

CELLS = 4
"""Along each axis over which a code is averaged, so that it knows where, but not to the voxel."""


def describe(
    recipe: PretrainRecipe, volumes: Resident, report: Report, should_stop: Callable[[], bool]
) -> Tensor:
    """Train the autoencoder and encode every scan, float32 (V, D) on the device.

    The decoder has no skips: past them a scan would be copied and the code say nothing.

    Raises:
        Preempted: Stopped on request; the training starts anew with the run.
    """
    method, device = recipe.method, volumes.device
    assert isinstance(method, recipes.SemanticGenesis)
    scans = resized(volumes, method.autoencoder_size)
    network = UNet3d(1, 1, recipe.network.base_width, fused=recipe.fused, skip=False).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=method.autoencoder_learning_rate)
    for step in range(1, method.autoencoder_steps + 1):
        random = generator(recipe.seed, step, "autoencoder")
        index = torch.randint(len(scans), (method.autoencoder_batch_size,), generator=random)
        truth = scans[to_device(index, device)].float()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            restored = intensities.restore(network(truth), recipe)
        loss = F.mse_loss(restored, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        if step % ASKED_EVERY == 0:
            report.progress("autoencoder", step, method.autoencoder_steps)
            if should_stop():
                raise Preempted(0)
    network.eval()
    with torch.no_grad():
        return torch.cat([_code(network, scan[None]) for scan in scans])


def resized(volumes: Resident, size: Size) -> Tensor:
    """Every scan, with its padding, at one size: float16 (V, 1, I, J, K) on the device."""
    every = []
    for volume in volumes.on_host():
        scan = torch.from_numpy(volume).to(volumes.device).float()[None]
        matrices = [
            to_device(filters.resize_matrix(before, after), volumes.device)[None]
            for before, after in zip(volume.shape, size, strict=True)
        ]
        every.append(filters.along_axes(scan, matrices).half())
    return torch.stack(every)


def nearest(features: Tensor, reference: Tensor, count: int) -> Tensor:
    """For each reference the `count` scans whose features are nearest, itself first, (C, count).

        sorted(scans, key=lambda v: norm(features[v] - features[reference]))[:count]

    Args:
        features: (V, D).
        reference: Scan of each class, int64 (C,).
        count: At most V.
    """
    distance = torch.cdist(
        features[reference], features, compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distance.argsort(dim=1, stable=True)[:, :count]


def _code(network: UNet3d, scan: Tensor) -> Tensor:
    bottleneck = network.encoder(scan.float()).bottleneck
    i, j, k = (min(CELLS, n) for n in bottleneck.shape[2:])
    return F.adaptive_avg_pool3d(bottleneck, (i, j, k)).flatten(1)
