"""One pretraining step, `paper`: plain or fused network, eager or compiled.

Each of the four runs in a process of its own, so that its peak memory is its own and a failure is
its own too. All are counted in the operations of the plain network, whatever they compute, so that
a share of the peak says how soon the same step is done; the peak is that of a square matrix product
on the same device in the same precision.

    python -m benchmarks.bench_step --json [--smoke]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from models.recipe import PretrainRecipe
from trainer.methods.views import make_views

VARIANTS = {
    "plain_eager": (False, False),
    "plain_compiled": (False, True),
    "fused_eager": (True, False),
    "fused_compiled": (True, True),
}
"""Name of each: whether it is fused, whether it is compiled."""


def main() -> None:
    """Measure all, or with `--only` one in this process."""
    asked = _arguments()
    device = common.training_device()
    common.use_one_thread(device)
    recipe = _recipe(asked)
    if asked.only is not None:
        common.show_json(measure(asked.only, recipe, device, asked.steps))
        return
    peak = matmul_peak(device, 512 if asked.smoke else None)
    operations = step_operations(recipe, device)
    result: dict[str, object] = {
        "benchmark": "step",
        "width": asked.width,
        "batch": asked.batch,
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "plain_tflop": operations / 1e12,
        "matmul_peak_tflop_per_s": peak / 1e12,
    }
    for name in VARIANTS:
        measured = _in_a_process(name, asked)
        if (step_s := measured.get("step_s")) is not None:
            assert isinstance(step_s, float)
            measured |= {
                "pairs_per_s": asked.batch / step_s,
                "share_of_peak": operations / step_s / peak,
            }
        result[name] = measured
    result |= {"ratio_fused": _ratio(result, "plain_eager", "fused_eager")}
    result |= {"ratio_compiled": _ratio(result, "fused_eager", "fused_compiled")}
    result["environment"] = common.environment(device)
    common.show_table("One pretraining step", _rows(result))
    if asked.json:
        common.show_json(result)


def measure(
    name: str, recipe: PretrainRecipe, device: torch.device, steps: int
) -> dict[str, object]:
    """Median seconds and peak bytes of a step after its views."""
    is_fused, is_compiled = VARIANTS[name]
    recipe = recipe.model_copy(update={"fused": is_fused})
    volumes, sampler = common.make_resident(common.smooth_scans(), recipe.crops, device)
    views = make_views(recipe, volumes, sampler, 1)
    training = common.Training.of(recipe, device, is_compiled=is_compiled)
    loss = training.step(views)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = common.seconds(lambda: training.step(views), device, repeats=steps, warm_up=1)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step_s": statistics.median(taken), "peak_bytes": peak, "first_loss": loss}


def step_operations(recipe: PretrainRecipe, device: torch.device) -> int:
    """Floating point operations of a plain step, forward and backward, counted on one sample pair.

    They grow with the batch: the queue's share is nothing (algorithms.md 6.2), and the bilinear
    map's is proportional too.
    """
    few = recipe.model_copy(update={"batch_size": 2, "fused": False})
    volumes, sampler = common.make_resident(common.smooth_scans(1), few.crops, device)
    views = make_views(few, volumes, sampler, 1)
    training = common.Training.of(few, device, is_compiled=False)
    with FlopCounterMode(display=False) as counter:
        training.step(views)
    counted = int(counter.get_total_flops())
    return counted * recipe.batch_size // few.batch_size


def matmul_peak(device: torch.device, size: int | None) -> float:
    """Operations a second of the best square matrix product."""
    is_cuda = device.type == "cuda"
    n = size or (8192 if is_cuda else 1536)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    taken = common.seconds(lambda: a @ b, device, repeats=10, warm_up=3)
    return 2 * n**3 / min(taken)


def _recipe(asked: argparse.Namespace) -> PretrainRecipe:
    crops = {"crops": common.TINY_CROPS} if asked.smoke else {}
    return PretrainRecipe.model_validate(
        {"network": {"base_width": asked.width}, "batch_size": asked.batch, **crops}
    )


def _in_a_process(name: str, asked: argparse.Namespace) -> dict[str, object]:
    """The JSON of one variant; all null, with the reason, where it fails."""
    command = [sys.executable, "-m", "benchmarks.bench_step", "--only", name]
    for option in ("width", "batch", "steps"):
        command += [f"--{option}", str(getattr(asked, option))]
    command += ["--smoke"] * asked.smoke
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=asked.limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return _failed(f"took more than {asked.limit_s} s")
    if ran.returncode != 0:
        errors = [line for line in ran.stderr.splitlines() if "Error" in line]
        return _failed(errors[-1] if errors else f"exit status {ran.returncode}")
    found: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _failed(reason: str) -> dict[str, object]:
    return {"step_s": None, "peak_bytes": None, "reason": reason[:300]}


def _ratio(result: dict[str, Any], slow: str, fast: str) -> float | None:
    times = [result[name]["step_s"] for name in (slow, fast)]
    return None if None in times else times[0] / times[1]


def _rows(result: dict[str, object]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in result.items():
        if name not in VARIANTS:
            rows.append((name, value))
            continue
        assert isinstance(value, dict)
        rows.extend((f"{name} {part}", measured) for part, measured in value.items())
    return rows


def _arguments() -> argparse.Namespace:
    is_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--smoke", action="store_true", help="tiny: does it run at all")
    parser.add_argument("--only", choices=VARIANTS, help="one variant, in this process")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--limit-s", type=int, default=150, help="for each variant")
    asked = parser.parse_args()
    tiny, usual = (2, 2, 1), (32, 32, 10) if is_cuda else (4, 4, 3)
    for name, value in zip(
        ("width", "batch", "steps"), tiny if asked.smoke else usual, strict=True
    ):
        if getattr(asked, name) is None:
            setattr(asked, name, value)
    return asked


if __name__ == "__main__":
    main()
