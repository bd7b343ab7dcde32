"""The studies of docs/experiments.md on real scans, each one command that anyone can repeat.

    python -m benchmarks.studies hippocampus --out DIR      # again: goes on where it was

It lays the scans out in OUT/scans (links; nothing is copied but films that come in an archive),
writes OUT/plan.json, trains every cell in `--processes` processes of one thread that share the
work, and leaves `report.md`, `report.json`, `curve.svg` and `cases.csv` in OUT/study. With
`--probes` it then asks every encoder for rotation and position (OUT/probes, and a table). Sized for
2 CPU cores: small networks, few steps, three ratios and three seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import show_table
from models.experiment.plan import Plan
from trainer.experiment import CELLS

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FILMS = "cxr_nih1000_64/trainval.zip"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Study:
    """What is laid out, and the plan over it; source and target are the same folder.

    The patients of validation and test are then left out of the pretraining.
    """

    lay_out: Callable[[Path, Path], None]
    pretrain: Json
    contrast: Json
    """What ContraLoss changes of it; Models Genesis changes the method alone."""
    genesis: Json
    finetune: Json
    ratios: tuple[float, ...]

    def plan(self) -> Json:
        """PCRL against random weights, Models Genesis and ContraLoss."""

        def method(name: str, changes: Mapping[str, Any]) -> Json:
            return {"name": name, "pretrain": {**self.pretrain, **changes}}

        return {
            "methods": [
                method("pcrl", {}),
                {"name": "scratch"},
                method("models_genesis", self.genesis),
                method("contra_loss", self.contrast),
            ],
            "finetune": self.finetune,
            "ratios": list(self.ratios),
            "seeds": [0, 1, 2],
        }


def _lay_out_hippocampus(data: Path, folder: Path) -> None:
    for image in sorted((data / "mr_hippocampus_msd" / "images").glob("*.nii.gz")):
        name = image.name.removesuffix(".nii.gz")
        _link(folder / f"{name}_image.nii.gz", image)
        _link(folder / f"{name}_label.nii.gz", image.parents[1] / "labels" / image.name)


def _lay_out_liver(data: Path, folder: Path) -> None:
    for file in sorted((data / "ct_liver_btcv").glob("*.nii.gz")):
        _link(folder / file.name, file)


def _lay_out_films(data: Path, folder: Path) -> None:
    """As PNG, with `labels.csv`; a film's name begins with its patient."""
    with zipfile.ZipFile(data / FILMS) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        for name in names:
            (folder / Path(name).name).write_bytes(archive.read(name))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "subject", "abnormal"])
        for name in names:
            stem = Path(name).stem
            rows.writerow([stem, stem.split("_")[0], int(name.startswith("1_"))])


def _link(place: Path, file: Path) -> None:
    if not place.is_symlink():
        place.symlink_to(file.resolve())


_WIDTH = {"base_width": 8}
_MR: Json = {"spacing_mm": [1, 1, 1], "intensity": {"kind": "zscore"}}
_CT: Json = {
    "spacing_mm": [5, 5, 5],
    "intensity": {"kind": "window", "low_hu": -125, "high_hu": 275},
}
_SMALL: Json = {
    "input_size": [32, 32, 32],
    "crop_sizes": [[24, 24, 24], [32, 32, 32]],
    "border": [0, 0, 0],
    "max_tissue": None,
}
_OWN: Json = {"method": {"name": "models_genesis"}, "learning_rate": 0.1}
_FILMS: Json = {"kind": "resnet18_unet2d", "width": 16}

STUDIES: Mapping[str, Study] = {
    "hippocampus": Study(
        _lay_out_hippocampus,
        pretrain={
            "kind": "pretrain",
            "network": _WIDTH,
            "preprocessing": _MR,
            "method": {"name": "pcrl", "preset": "recommended", "queue_size": 512},
            "crops": _SMALL,
            "num_steps": 300,
            "batch_size": 4,
            "learning_rate": 0.01,
            "checkpoint_every": 75,
        },
        contrast={"method": {"name": "pcrl", "preset": "contra_loss", "queue_size": 512}},
        genesis=_OWN,
        finetune={
            "kind": "finetune",
            "labels": {"anterior": 1, "posterior": 2},
            "class_weights": {"anterior": 10, "posterior": 10},
            "network": _WIDTH,
            "preprocessing": _MR,
            "patch_size": [32, 48, 32],
            "num_steps": 150,
            "batch_size": 2,
            "learning_rate": 0.001,
            "schedule": "cosine",
            "validate_every": 75,
            "checkpoint_every": 150,
        },
        ratios=(0.05, 0.15, 0.5),
    ),
    "liver": Study(
        _lay_out_liver,
        pretrain={
            "kind": "pretrain",
            "network": {"base_width": 4},
            "preprocessing": _CT,
            "method": {"name": "pcrl", "preset": "recommended", "queue_size": 512},
            "crops": {**_SMALL, "crop_sizes": [[32, 32, 32], [48, 48, 32]]},
            "num_steps": 600,
            "batch_size": 4,
            "learning_rate": 0.002,
            "optimizer": {"kind": "adam"},
            "checkpoint_every": 200,
        },
        contrast={"method": {"name": "pcrl", "preset": "contra_loss", "queue_size": 512}},
        genesis={"method": {"name": "models_genesis"}},
        finetune={
            "kind": "finetune",
            "labels": {"liver": 6},
            "unlisted_labels": "background",
            "network": {"base_width": 4},
            "preprocessing": _CT,
            "split": {"train": 0.6, "val": 0.15, "test": 0.25},
            "patch_size": [32, 32, 32],
            "num_steps": 150,
            "batch_size": 4,
            "learning_rate": 0.001,
            "schedule": "cosine",
            "validate_every": 75,
            "checkpoint_every": 150,
        },
        ratios=(0.1, 0.3, 1.0),
    ),
    "films": Study(
        _lay_out_films,
        pretrain={
            "kind": "pretrain",
            "network": _FILMS,
            "preprocessing": {"size": 64},
            "method": {"name": "pcrl", "preset": "recommended", "queue_size": 2048},
            "crops": {"input_size": 64, "cutout_size": 9, "blur_sigma": [0.1, 0.6]},
            "num_steps": 300,
            "batch_size": 32,
            "learning_rate": 0.03,
            "checkpoint_every": 150,
        },
        contrast={"method": {"name": "pcrl", "preset": "contra_loss", "queue_size": 2048}},
        genesis={"method": {"name": "models_genesis"}, "learning_rate": 0.03},
        finetune={
            "kind": "classify",
            "labels": ["abnormal"],
            "network": _FILMS,
            "preprocessing": {"size": 64},
            "crops": {"input_size": 64, "crop_area": [0.5, 1.0]},
            "num_steps": 100,
            "batch_size": 32,
            "learning_rate": 0.0005,
            "validate_every": 25,
            "checkpoint_every": 100,
        },
        ratios=(0.1, 0.3, 1.0),
    ),
}


def main() -> int:
    """Lay out, plan, train; the exit status of the first process that failed."""
    asked = _arguments()
    study = STUDIES[asked.study]
    scans: Path = asked.out / "scans"
    scans.mkdir(parents=True, exist_ok=True)
    study.lay_out(asked.data, scans)
    plan = study.plan()
    if asked.seeds is not None:
        plan["seeds"] = asked.seeds
    if asked.ratios is not None:
        plan["ratios"] = asked.ratios
    Plan.model_validate(plan)
    (asked.out / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    command = [sys.executable, "-m", "trainer", "experiment", str(asked.out / "plan.json")]
    command += ["--source", str(scans), "--target", str(scans), "--out", str(asked.out / "study")]
    command += ["--device", asked.device, "--threads", "1", "--events", "jsonl"]
    running = []
    for number in range(asked.processes):
        with (asked.out / f"events-{number}.jsonl").open("ab") as log:
            running.append(subprocess.Popen(command, stdout=log))
    status = max(process.wait() for process in running)
    if asked.probes and status == 0:
        show_table("Probes", probe(asked.out, scans, asked.device).items())
    return status


def probe(out: Path, scans: Path, device: str) -> dict[str, str]:
    """Accuracy in percent, with its interval, of every encoder and of a random one like it."""
    folder = out / "probes"
    folder.mkdir(exist_ok=True)
    found = {}
    for bundle in sorted((out / "study" / CELLS / "pretrain").glob("*/*/bundle")):
        method, seed = bundle.parts[-3:-1]
        for asks in ("rotation", "position"):
            place = folder / f"{asks}-{method}-{seed}.json"
            if not place.exists():
                command = [sys.executable, "-m", "trainer", "probe", asks, str(bundle)]
                command += ["--scans", str(scans), "--cache", str(out / "study" / "cache")]
                command += ["--seed", seed, "--device", device, "--threads", "1"]
                answer = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
                place.write_bytes(answer)
            said = json.loads(place.read_bytes())
            found[f"{asks} {method} {seed}"] = _percent(said)
            found[f"{asks} random {seed}"] = _percent(said["controls"]["random_encoder"])
    return dict(sorted(found.items()))


def _percent(found: Mapping[str, Any]) -> str:
    low, high = found["interval_95"]
    return f"{100 * found['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of shared data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2")
    parser.add_argument(
        "--ratios", type=float, nargs="+", help="of labelled patients; again with more adds"
    )
    parser.add_argument("--probes", action="store_true", help="of every encoder, afterwards")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
