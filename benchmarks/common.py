"""What the benchmarks share: the device, scans to cut, one training step, the table.

Needs torch, NumPy and pydantic alone, so that it runs on a GPU machine without the service.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.recipe import CropPairs, PretrainRecipe
from trainer.build import lay_out
from trainer.data.resident import Resident, Size
from trainer.data.sampling import PairSampler
from trainer.methods.pcrl import Losses, Pcrl
from trainer.methods.views import Views

SCAN_SHAPE = (160, 160, 128)
TINY_CROPS = CropPairs(input_size=(16, 16, 16), crop_sizes=((16, 16, 16), (24, 24, 16)))
"""To see whether a benchmark runs at all (`--smoke`)."""


def training_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device) -> dict[str, object]:
    """The device and the software that a number belongs to."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_cuda else None,
    }


def smooth_scans(count: int = 2, shape: Size = SCAN_SHAPE) -> list[NDArray[np.float16]]:
    """Volumes with structure on the scale of organs, in [0, 1]."""
    random = np.random.default_rng(0)
    scans = []
    for _ in range(count):
        volume = np.zeros(shape)
        for axis, n in enumerate(shape):
            waves = np.cumsum(random.normal(size=n)) / np.sqrt(n)
            volume += np.expand_dims(waves, tuple({0, 1, 2} - {axis}))
        low, high = volume.min(), volume.max()
        scans.append(((volume - low) / (high - low)).astype(np.float16))
    return scans


def make_resident(
    scans: Sequence[NDArray[np.float16]], crops: CropPairs, device: torch.device
) -> tuple[Resident, PairSampler]:
    """The scans on the device, and what draws pairs from them."""
    i, j, k = (max(size[axis] for size in crops.crop_sizes) for axis in range(3))
    fill = [0.0] * len(scans)
    volumes = Resident.of(scans, fill=fill, at_least=(i, j, k), device=device)
    return volumes, PairSampler(crops, volumes.shapes)


@dataclass(frozen=True, slots=True)
class Training:
    """A pretraining about to take steps, as `trainer.pretrain.run` sets it up.

    Attributes:
        method: On the device, training.
        optimizer: Of its parameters.
        losses: `method.losses`, or that compiled.
    """

    method: Pcrl
    optimizer: torch.optim.Optimizer
    losses: Callable[[Views], Losses]

    @classmethod
    def of(cls, recipe: PretrainRecipe, device: torch.device, *, is_compiled: bool) -> Training:
        """A fresh one."""
        torch.manual_seed(recipe.seed)
        method = Pcrl(recipe).train()
        method.to(device)
        lay_out(method)
        optimizer = torch.optim.SGD(
            method.trained(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        losses = torch.compile(method.losses) if is_compiled else method.losses
        return cls(method, optimizer, losses)

    def step(self, views: Views) -> float:
        """Everything of a step after its views; waits for the device and returns the loss."""
        device = views.clean_o.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = self.losses(views)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]  # of torch
        self.optimizer.step()
        self.method.update(losses)
        return float(losses.total.detach())


def seconds(
    work: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int
) -> list[float]:
    """Seconds of each repeat.

    On a GPU by the clock, the device having finished. On a CPU processor time of this process,
    which `use_one_thread` has given one thread: neighbours on a shared machine count little then.
    """
    is_cuda = device.type == "cuda"
    clock = time.perf_counter if is_cuda else time.process_time
    taken = []
    for _ in range(warm_up + repeats):
        _wait(device)
        start = clock()
        work()
        _wait(device)
        taken.append(clock() - start)
    return taken[warm_up:]


def use_one_thread(device: torch.device) -> None:
    """On a CPU; work for a GPU keeps its threads."""
    if device.type == "cpu":
        torch.set_num_threads(1)


def show_table(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Names and values on standard error, for a human."""
    print(f"\n{title}", file=sys.stderr)
    for name, value in rows:
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"  {name:<32} {shown}", file=sys.stderr)


def show_json(result: dict[str, object]) -> None:
    """The result as the last line of standard output."""
    print(json.dumps(result), flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    found = Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
