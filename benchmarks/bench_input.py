"""Crop pairs a second on one core, ours against the straightforward implementation.

Both make the same views from the same scans: recipe `paper`, and the same crops with the
transforms of `official`. Rounds of ours and theirs take turns; a round's time is the processor time
of this process, which has one thread, so that neighbours on a shared machine count as little as
they can. Then, on the device that trains here, the share of a training step that its views take.

    python -m benchmarks.bench_input --json
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are loaded

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import count

import numpy as np
import torch

from benchmarks import common, straightforward
from models.recipe import CropPairs, PretrainRecipe
from trainer.methods.views import make_views

GOALS = {"ratio_paper": 4.0, "ratio_official": 12.0, "share_of_step": 0.10}


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    torch.set_num_threads(1)
    device = common.training_device()
    result: dict[str, object] = {"benchmark": "input", "pairs_per_round": asked.pairs}
    for name, crops in recipes(is_tiny=asked.smoke).items():
        result |= compare(name, crops, asked.pairs, asked.rounds)
    result |= measure_share(device, asked)
    result |= {"goals": GOALS, "environment": common.environment(device)}
    common.show_table("Making views (one core), and their share of a step", result.items())
    if asked.json:
        common.show_json(result)


def recipes(*, is_tiny: bool = False) -> dict[str, CropPairs]:
    """The two that are compared; `official` differs in the transforms alone.

    Its border, tissue rule and unequal sizes say where crops are cut, not what a crop costs.
    """
    official = PretrainRecipe.model_validate({"method": {"preset": "official"}}).crops
    transforms = ("flip_axes", "rotation", "max_scaling", "shuffle_probability")
    paper = common.TINY_CROPS if is_tiny else CropPairs()
    changes = {name: getattr(official, name) for name in transforms}
    return {"paper": paper, "official": paper.model_copy(update=changes)}


def compare(name: str, crops: CropPairs, num_pairs: int, rounds: int) -> dict[str, object]:
    """Median pairs a second of each, and the ratio of the medians."""
    scans = common.smooth_scans()
    whole = [scan.astype(np.float32) for scan in scans]
    volumes, sampler = common.make_resident(scans, crops, torch.device("cpu"))
    recipe = PretrainRecipe(crops=crops, batch_size=num_pairs)
    random = np.random.default_rng(0)
    steps = count(1)

    def ours() -> None:
        make_views(recipe, volumes, sampler, next(steps))

    def theirs() -> None:
        for _ in range(num_pairs):
            straightforward.make_pair(whole, crops, random)

    ours()
    taken = [(_processor_seconds(ours), _processor_seconds(theirs)) for _ in range(rounds)]
    ours_s, theirs_s = (statistics.median(side) for side in zip(*taken, strict=True))
    return {
        f"pairs_per_s_ours_{name}": num_pairs / ours_s,
        f"pairs_per_s_straightforward_{name}": num_pairs / theirs_s,
        f"ratio_{name}": theirs_s / ours_s,
        f"ratio_{name}_by_round": [round(theirs / ours, 2) for ours, theirs in taken],
    }


def measure_share(device: torch.device, asked: argparse.Namespace) -> dict[str, object]:
    """Time of a step's views over the time of the whole step."""
    width, batch, steps = asked.width, asked.batch, asked.steps
    crops = {"crops": common.TINY_CROPS} if asked.smoke else {}
    recipe = PretrainRecipe.model_validate(
        {"network": {"base_width": width}, "batch_size": batch, **crops}
    )
    volumes, sampler = common.make_resident(common.smooth_scans(), recipe.crops, device)
    training = common.Training.of(recipe, device, is_compiled=False)
    numbers = count(1)

    def views_alone() -> None:
        make_views(recipe, volumes, sampler, next(numbers))

    def whole_step() -> None:
        training.step(make_views(recipe, volumes, sampler, next(numbers)))

    step_s = statistics.median(common.seconds(whole_step, device, repeats=steps, warm_up=1))
    views_s = statistics.median(common.seconds(views_alone, device, repeats=steps, warm_up=1))
    return {
        "share_of_step": views_s / step_s,
        "step_device": device.type,
        "step_width": width,
        "step_batch": batch,
    }


def _processor_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _arguments() -> argparse.Namespace:
    is_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--smoke", action="store_true", help="tiny: does it run at all")
    parser.add_argument("--pairs", type=int, default=32, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=32 if is_cuda else 4, help="of the step")
    parser.add_argument("--batch", type=int, default=32 if is_cuda else 4, help="of the step")
    parser.add_argument("--steps", type=int, default=10 if is_cuda else 3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
