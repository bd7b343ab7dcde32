"""What holds of every method: it resumes bit for bit, learns something of a real CT, and what it
leaves behind starts a fine-tuning.

A new method adds its tiny recipe to `TINY`."""

import copy
import functools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models import recipe as recipes
from models.recipe import FinetuneRecipe, PretrainRecipe
from trainer import checkpoint, export, methods, pretrain
from trainer.build import build
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.scans import discover
from trainer.errors import Preempted
from trainer.transfer import load_parent

CPU = torch.device("cpu")
CHEST = Path(__file__).resolve().parents[2] / "../shared/data/ct_chest_lidc/lidc_0314_3x3x3.nii.gz"

TINY: dict[str, dict[str, Any]] = {
    "rotnet": {"method": {"name": "rotnet"}},
    "models_genesis": {"method": {"name": "models_genesis"}, "learning_rate": 0.3},
    "mae": {"method": {"name": "mae", "block_size": 8}, "learning_rate": 0.05},
    "cpc3d": {
        "method": {
            "name": "cpc3d",
            "patch_size": 8,
            "code_size": 16,
            "context_size": 8,
            "context_rows": 1,
            "future_rows": 1,
        },
        "learning_rate": 0.003,
    },
    "rubiks_cube": {
        "method": {"name": "rubiks_cube", "side": 8, "critic_width": 2, "critic_steps": 1},
        "learning_rate": 0.003,
    },
    "semantic_genesis": {
        "method": {
            "name": "semantic_genesis",
            "num_classes": 3,
            "neighbours": 3,
            "head_width": 8,
            "elastic_alpha": 20.0,
            "elastic_sigma": 2.0,
            "jitter": 2,
            "autoencoder_size": [16, 16, 16],
            "autoencoder_steps": 2,
        },
        "crops": {"crop_sizes": [[24, 24, 16], [20, 20, 16]], "border": [0, 0, 0]},
        "learning_rate": 0.005,
    },
    "c2l": {
        "method": {"name": "c2l", "embedding_size": 8, "queue_size": 72},
        "batch_size": 8,
        "learning_rate": 0.01,
        "num_steps": 30,
    },
    "pcrlv2": {
        "method": {
            "name": "pcrlv2",
            "num_locals": 2,
            "local_sizes": [[16, 16, 16], [8, 8, 8]],
            "local_input_size": [8, 8, 8],
        },
        "num_steps": 8,
    },
    "contra_loss": {
        "method": {"preset": "contra_loss", "embedding_size": 8, "queue_size": 40},
        "batch_size": 8,
        "learning_rate": 0.01,
        "num_steps": 30,
    },
    "crossmix_1": {
        "method": {"preset": "crossmix_1", "embedding_size": 8, "queue_size": 40},
        "learning_rate": 0.02,
    },
}
"""By name of the case: what differs from `FIELDS`. Its own defaults stand for the rest."""
FIELDS: dict[str, Any] = {
    "network": {"base_width": 2},
    "preprocessing": {"spacing_mm": [2, 2, 2]},
    "batch_size": 4,
    "num_steps": 20,
    "learning_rate": 0.05,
    "checkpoint_every": 100,
    "log_every": 1,
}
CROPS = {"input_size": [16, 16, 16], "crop_sizes": [[24, 24, 16]], "max_tissue": None}


def tiny(case: str, **more: Any) -> PretrainRecipe:
    given = {**FIELDS, **TINY[case], **more}
    return PretrainRecipe.model_validate({**given, "crops": {**CROPS, **given.get("crops", {})}})


class Stops:
    """A report that says nothing; asked, it wants a stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def train(recipe: PretrainRecipe, scans: Path, out: Path, steps: int) -> checkpoint.State:
    stops = Stops(steps)
    with pytest.raises(Preempted):
        pretrain.run(
            recipe, discover(scans), out, stops,
            device=CPU, should_stop=stops, cache=scans.parent / "cache",
        )  # fmt: skip
    state = checkpoint.load_newest(out / "checkpoints")
    assert state is not None
    return state


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("case", TINY)
def test_an_interrupted_run_goes_on_bit_for_bit(
    case: str, scan_folder: Path, tmp_path: Path
) -> None:
    recipe = tiny(case)

    whole = train(recipe, scan_folder, tmp_path / "whole", 3)
    train(recipe, scan_folder, tmp_path / "broken", 2)
    broken = train(recipe, scan_folder, tmp_path / "broken", 1)

    kept = ("step", "method", "optimizer")
    assert broken["step"] == 3
    assert equal({k: broken[k] for k in kept}, {k: whole[k] for k in kept})
    assert not equal(whole["method"], train(recipe, scan_folder, tmp_path / "short", 2)["method"])


BY_DAY = next(iter(TINY))


@functools.cache
def chest() -> NDArray[np.float16]:
    """A real chest CT at 3 mm, air 0 and bone 1."""
    if not CHEST.is_file():
        pytest.skip("../shared/data is absent")
    hounsfield = np.asarray(nibabel.load(CHEST).dataobj, dtype=np.float32)
    return ((hounsfield.clip(-1000, 1000) + 1000) / 2000).astype(np.float16)


@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=[pytest.mark.nightly] * (one != BY_DAY)) for one in TINY]
)
def test_a_short_run_lowers_the_loss_on_a_real_ct(case: str) -> None:
    recipe = tiny(case)
    volumes = Resident.of([chest()], fill=[0], at_least=(24, 24, 16), device=CPU)
    sampler = PairSampler(recipe.crops, volumes.shapes)
    torch.manual_seed(0)
    method = methods.make(recipe)
    method.prepare(volumes, sampler, Stops(1), lambda: False)

    def loss() -> float:
        """Of batches that the run does not see, on a copy."""
        judged = copy.deepcopy(method)
        with torch.no_grad():
            batches = [method.make_views(volumes, sampler, 1000 + n) for n in range(2)]
            return float(np.mean([float(judged.losses(batch).total) for batch in batches]))

    for step in range(6):  # a queue must hold this network's embeddings first
        method.update(method.losses(method.make_views(volumes, sampler, 2000 + step)))
    before, descent = loss(), method.descent(CPU)
    for step in range(1, recipe.num_steps + 1):
        descent.step(method.make_views(volumes, sampler, step), step)

    assert loss() < before


@pytest.mark.parametrize("case", TINY)
def test_a_fine_tuning_starts_from_what_the_method_trained(
    case: str, scan_folder: Path, tmp_path: Path, report, without_onnx, finetune_recipe
) -> None:
    recipe = tiny(case, num_steps=1)
    folder = pretrain.run(
        recipe, discover(scan_folder), tmp_path, report, device=CPU, should_stop=lambda: False
    )
    state = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    asked: FinetuneRecipe = finetune_recipe.model_copy(
        update={"transfer": "all" if recipe.method.has_skips else "encoder"}
    )
    network = build(asked, fused=False)

    taken = load_parent(network, folder, asked)

    stem = "encoder.down64.first.conv.weight"
    assert torch.equal(network.state_dict()[stem], state["method"][f"student.{stem}"])
    has_decoder = any(name.startswith("decoder.") for name in taken.loaded)
    # A decoder without skips has no place in the fine-tuning network, which has them.
    assert has_decoder == (recipe.method.trains_decoder and recipe.method.has_skips)
    assert any(name.startswith("decoder.") for name in taken.fresh) != has_decoder
    exported = export.restore(state, recipe).state_dict()
    assert all(torch.equal(v, state["method"][f"student.{k}"]) for k, v in exported.items())


def test_every_method_has_a_recipe_a_module_and_a_page() -> None:
    pages = Path(__file__).resolve().parents[2] / "docs" / "methods"

    # ImageNet's weights are read, not trained (`trainer.imagenet`).
    assert recipes.METHODS.keys() - methods.METHODS.keys() == {"imagenet"}
    assert all((pages / f"{name}.md").is_file() for name in recipes.METHODS)
    assert all(kind.model_fields["name"].default == n for n, kind in recipes.METHODS.items())
