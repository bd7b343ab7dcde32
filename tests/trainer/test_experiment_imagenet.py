"""ImageNet as an arm of an experiment: one encoder for all seeds, or a refusal at the start."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import bundle
from models.bundle import sha256_of
from models.experiment.plan import Plan, cells
from trainer import experiment, imagenet
from trainer.data.scans import discover
from trainer.errors import DataError, Preempted

CPU = torch.device("cpu")
NETWORK = {"kind": "resnet18_unet2d"}
SIZES = {"preprocessing": {"size": 32}, "crops": {"input_size": 32}}
SPLITS = {"train": "abcd", "val": "ef", "test": "gh"}


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Noise, every second image brighter."""
    folder = tmp_path / "films"
    lines = ["id,bright"]
    for split, names in SPLITS.items():
        (folder / split).mkdir(parents=True)
        for at, name in enumerate(names):
            pixels = np.random.default_rng(ord(name)).integers(0, 120, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels + 100 * (at % 2)).save(folder / split / f"{name}.png")
            lines.append(f"{name},{at % 2}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def file(tmp_path: Path, resnet18: dict[str, Tensor]) -> Path:
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18, path)
    return path


def plan(*seeds: int, network: dict[str, Any] = NETWORK, **method: Any) -> Plan:
    taken = {**method, "name": "imagenet"}
    pretrain = {"kind": "pretrain", "network": network, **SIZES, "method": taken}
    finetune = {"kind": "classify", "network": network, **SIZES, "labels": ["bright"]}
    short = {"num_steps": 1, "batch_size": 2, "validate_every": 1}
    return Plan.model_validate(
        {
            "methods": [{"name": "others", "pretrain": pretrain}],
            "finetune": {**finetune, **short},
            "ratios": [1.0],
            "seeds": seeds,
        }
    )


def do(plan: Plan, films: Path, out: Path, report: Any, *weights: Path, stop: bool = False) -> Any:
    return experiment.run(
        plan, films, films, out, report, device=CPU, should_stop=lambda: stop, weights=weights
    )


@pytest.mark.nightly
def test_all_seeds_start_from_the_one_encoder_of_the_file(
    films: Path, file: Path, tmp_path: Path, report, without_onnx
) -> None:
    out, pinned = tmp_path / "study", {"sha256": sha256_of(file)}

    found = do(plan(0, **pinned), films, out, report, file)
    with pytest.raises(Preempted):  # more seeds, whose encoder is there: the file may be gone
        do(plan(0, 1, **pinned), films, out, report, stop=True)

    assert {key: one.state for key, one in found.items()} == {
        "pretrain/others": "succeeded",
        "finetune/others/100%/0": "succeeded",
    }
    parents = {cell.seed: cell.parent for cell in cells(plan(0, 1)) if cell.kind == "finetune"}
    assert parents == {0: "pretrain/others", 1: "pretrain/others"}
    encoder = out / "cells/pretrain/others/bundle"
    assert bundle.load(encoder).lineage.parent_digest == sha256_of(file)
    tuned = bundle.load(out / "cells/finetune/others/100%/0/bundle").lineage
    assert tuned.parent_digest == bundle.digest_of(encoder)
    assert "encoder.stem.conv.weight" in tuned.loaded_keys
    text = (out / "report.md").read_text()
    assert "Weights from a file, the same for all seeds: others." in text


@pytest.mark.parametrize(
    ("fields", "files", "reason"),
    [
        ({}, [], "it takes its weights from a file: --weights FILE"),
        ({}, ["absent.pth"], "there is no file of weights"),
        ({}, ["resnet18.pth", "other.pth"], "`sha256` tells which is meant"),
        ({"sha256": "0" * 64}, ["resnet18.pth"], "the recipe says 0000"),
        ({}, ["other.pth"], "it has no conv1"),
        ({"network": {**NETWORK, "width": 8}}, ["resnet18.pth"], r"conv1.weight is \(64"),
    ],
)
def test_a_file_that_is_missing_or_wrong_is_refused_before_anything_starts(
    films: Path, file: Path, tmp_path: Path, report, fields, files, reason
) -> None:
    out = tmp_path / "study"
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    of_method = "" if "absent.pth" in files else "method others: "

    with pytest.raises(DataError, match=f"bad_weights: {of_method}.*{reason}"):
        do(plan(0, **fields), films, out, report, *(tmp_path / name for name in files))

    assert not out.exists()
    with pytest.raises(Preempted):  # the control: it got as far as the first training
        do(plan(0), films, out, report, file, stop=True)


def test_an_encoder_of_another_file_is_no_encoder_of_this_one(
    films: Path, file: Path, tmp_path: Path, resnet18: dict[str, Tensor], report, without_onnx
) -> None:
    other, made = tmp_path / "newer.pth", tmp_path / "study" / "cells/pretrain/others"
    torch.save({**resnet18, "fc.bias": torch.ones(10)}, other)
    recipe = plan(0).methods[0].pretrain
    imagenet.run(recipe, file, discover(films, dims=2), made, report, device=CPU)

    with pytest.raises(DataError, match="resume_mismatch: method others: its encoder was made of"):
        do(plan(0), films, tmp_path / "study", report, other, stop=True)
    with pytest.raises(Preempted):  # the control
        do(plan(0), films, tmp_path / "study", report, file, stop=True)
    pinned = plan(0, sha256=sha256_of(file))
    with pytest.raises(Preempted):  # this file is of another method: that of this one may be gone
        do(pinned, films, tmp_path / "study", report, other, stop=True)
