"""The float16 variant: written where it answers alike, left out where it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models import bundle
from models.bundle import BundleError
from models.networks.unet3d import UNet3d
from models.recipe import FinetuneRecipe
from models.session import open_session
from trainer import export, half


def state_of(recipe: FinetuneRecipe) -> dict[str, object]:
    torch.manual_seed(0)
    network = UNet3d(1, 3, recipe.network.base_width, "group")
    return {
        "step": 5, "recipe": recipe.model_dump_json(), "recipe_digest": recipe.digest(),
        "data_digest": "d" * 64, "run_id": "", "sample": torch.rand(1, 1, 16, 16, 16).half(),
        "network": network.state_dict(), "metrics": {},
    }  # fmt: skip


def test_a_float16_network_that_answers_alike_travels_in_the_bundle(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, report, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Logits of random weights are near ties everywhere, so labels prove little here.
    monkeypatch.setitem(export.LIMITS, "float16", (half.TOLERANCE, 0.9))
    folder = export.publish(state_of(finetune_recipe), tmp_path / "bundle", report)

    full = open_session(folder, num_threads=1)
    small = open_session(folder, num_threads=1, precision="float16")
    image = np.random.default_rng(0).random((1, 1, 16, 16, 16), dtype=np.float32)
    expected, found = full.run(image), small.run(image)

    assert (full.precision, small.precision) == ("float32", "float16")
    assert small.size_bytes < 0.75 * full.size_bytes
    assert 0.0 < np.abs(found - expected).max() < half.TOLERANCE * max(1.0, np.abs(expected).max())
    records = bundle.load(folder).parity
    assert [one.precision for one in records] == ["float32"] * 2 + ["float16"] * 2


def test_a_float16_network_that_does_not_is_left_out_and_asked_for_refused(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(export.LIMITS, "float16", (0.0, 1.0))
    folder = export.publish(state_of(finetune_recipe), tmp_path / "bundle", report)

    manifest = bundle.load(folder)
    assert bundle.MODEL_FLOAT16 not in manifest.files
    assert {one.precision for one in manifest.parity} == {"float32"}
    assert open_session(folder, num_threads=1).precision == "float32"
    with pytest.raises(BundleError, match="precision_unavailable"):
        open_session(folder, num_threads=1, precision="float16")
