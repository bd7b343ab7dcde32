"""Every preset trains from scans, stops, and goes on bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models import bundle
from models.recipe import PretrainRecipe
from trainer import checkpoint, pretrain
from trainer.data.scans import discover
from trainer.errors import DataError, Preempted

CPU = torch.device("cpu")
FIELDS: dict[str, Any] = {
    "network": {"base_width": 2},
    "preprocessing": {"spacing_mm": [2, 2, 2]},
    "batch_size": 4,
    "checkpoint_every": 100,
}
CROPS: dict[str, Any] = {
    "input_size": [16, 16, 16],
    "crop_sizes": [[16, 16, 16], [24, 24, 16]],
    "max_tissue": 0.9,
}
METHOD: dict[str, Any] = {"embedding_size": 8, "queue_size": 40}


def recipe(preset: str, num_steps: int = 100, **method: Any) -> PretrainRecipe:
    fields = {"method": {**METHOD, "preset": preset, **method}, "crops": CROPS}
    return PretrainRecipe.model_validate({**FIELDS, **fields, "num_steps": num_steps})


def method_state(
    asked: PretrainRecipe, scans: Path, out: Path, report, stop_after: list[int]
) -> dict[str, Any]:
    for steps in stop_after:
        questions = iter(range(1, steps + 1))
        with pytest.raises(Preempted):
            pretrain.run(
                asked, discover(scans), out, report,
                device=CPU, should_stop=lambda q=questions, n=steps: next(q) == n,
                cache=scans.parent / "cache",
            )  # fmt: skip
    state = checkpoint.load_newest(out / "checkpoints")
    assert state is not None and state["step"] == sum(stop_after)
    whole: dict[str, Any] = state["method"]
    return whole


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param("paper", marks=pytest.mark.nightly),
        pytest.param("official", marks=pytest.mark.nightly),
        "recommended",
    ],
)
def test_an_interrupted_run_ends_as_one_that_was_not(
    scan_folder: Path, tmp_path: Path, report, preset: str
) -> None:
    asked = recipe(preset)

    whole = method_state(asked, scan_folder, tmp_path / "whole", report, [5])
    halves = method_state(asked, scan_folder, tmp_path / "halves", report, [2, 3])
    shorter = method_state(asked, scan_folder, tmp_path / "shorter", report, [4])

    assert whole.keys() == halves.keys()
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    differ = {name for name, value in whole.items() if not torch.equal(value, shorter[name])}
    assert {"queue.vectors", "queue.pointer", "queue.scans"} <= differ
    assert ("normaliser" in differ) == (preset == "official")


def test_one_scan_whose_own_embeddings_are_no_negatives_is_refused(
    scan_folder: Path, tmp_path: Path, report
) -> None:
    """The queue would hold nothing to contrast with, and the loss be 0."""
    train_folder = tmp_path / "scans" / "train"
    train_folder.mkdir(parents=True)
    shutil.copy(scan_folder / "train" / "a_image.nii.gz", train_folder)

    def train(asked: PretrainRecipe) -> None:
        pretrain.run(
            asked, discover(tmp_path / "scans"), tmp_path / asked.method.preset, report,
            device=CPU, should_stop=lambda: True,
        )  # fmt: skip

    with pytest.raises(DataError, match="one_scan"):
        train(recipe("recommended"))
    with pytest.raises(Preempted):  # after its first step
        train(recipe("paper"))


def test_a_run_without_skips_publishes_its_encoder(
    scan_folder: Path, tmp_path: Path, report
) -> None:
    asked = recipe("recommended", num_steps=2, skip=False)

    made = pretrain.run(
        asked, discover(scan_folder), tmp_path, report, device=CPU, should_stop=lambda: False,
        cache=scan_folder.parent / "cache",
    )  # fmt: skip

    manifest = bundle.load(made)
    assert manifest.recipe == asked
    assert manifest.recipe.method.mask_same_scan and not manifest.recipe.method.skip
