"""What the live health of a short pretraining says, on phantoms: the figures of docs/probes.md.

    python -m benchmarks.bench_health --json

Four scans, `--steps` steps of PCRL and of RotNet at each `--widths`, looked at every ten steps.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import common
from imaging import nifti, phantom
from models.recipe import PretrainRecipe
from trainer import pretrain
from trainer.data.scans import discover
from trainer.report import JsonLines

METHODS = ("pcrl", "rotnet")
EVERY = 10
Looks = list[tuple[int, Mapping[str, float]]]


class _Kept(JsonLines):
    """Keeps what each look has measured, and says nothing."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.looks: Looks = []

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """See `Report`."""
        if "effective_rank" in values:
            self.looks.append((step, values))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 8])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"benchmark": "health"}
    result["environment"] = common.environment(torch.device("cpu"))
    for method in METHODS:
        for width in asked.widths:
            looks = measured(method, width, asked.steps)
            rows = [
                (f"step {step}", f"{values['feature_std']:.3f}, {values['effective_rank']:.1f}")
                for step, values in looks
            ]
            common.show_table(f"{method}, width {width}: feature_std, effective_rank", rows)
            result[f"{method} {width}"] = dict(looks)
    if asked.json:
        common.show_json(result)


def measured(method: str, width: int, steps: int) -> Looks:
    """What each look at a pretraining of four scans has found."""
    recipe = PretrainRecipe.model_validate(
        {
            "network": {"base_width": width},
            "preprocessing": {"spacing_mm": [6, 6, 6]},
            "crops": {"input_size": [16, 16, 16], "crop_sizes": [[16, 16, 16], [24, 24, 16]]},
            "method": {"name": method},
            "num_steps": steps,
            "batch_size": 4,
            "health": {"every": EVERY, "num_crops": 16, "previews": False},
        }
    )
    report = _Kept()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "scans").mkdir()
        for seed in range(4):
            scan = phantom.make(seed, shape=(32, 32, 32), spacing_mm=(6.0, 6.0, 6.0)).volume
            nifti.write(Path(place) / "scans" / f"p{seed}.nii", scan.voxels, scan.affine)
        pretrain.run(
            recipe,
            discover(Path(place) / "scans"),
            Path(place) / "run",
            report,
            device=torch.device("cpu"),
            should_stop=lambda: False,
        )
    return report.looks


if __name__ == "__main__":
    main()
