"""Tiny scans, recipes and reports for the trainer's tests."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imaging import nifti
from models.networks.resnet_unet2d import ResNet18Encoder, _torchvision_name
from models.recipe import FinetuneRecipe, PretrainRecipe
from trainer import export
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods.pcrl import Pcrl
from trainer.methods.views import Views


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Recorder:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.logs: list[tuple[str, str]] = []
        self.results: list[str] = []

    def progress(self, stage: str, step: int, total: int) -> None:
        pass

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.append((step, dict(values)))

    def log(self, level: str, message: str) -> None:
        self.logs.append((level, message))

    def result(self, bundle: str, digest: str) -> None:
        self.results.append(digest)

    def error(self, code: str, detail: str) -> None:
        pass


@pytest.fixture
def report() -> Recorder:
    return Recorder()


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles whose network is empty: for what is not about the export, which takes seconds."""

    def nothing(network: torch.nn.Module, path: Path, *more: object) -> None:
        path.write_bytes(b"")

    monkeypatch.setattr(export, "to_onnx", nothing)
    monkeypatch.setattr(export, "check_parity", lambda *arguments: ())


def write_scan(folder: Path, name: str, seed: int) -> None:
    """A ball of 60 HU (label 1) with a core of 120 HU (label 2) in air."""
    random = np.random.default_rng(seed)
    centre = random.uniform(11, 21, 3)
    position = np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"), axis=-1)
    distance = np.linalg.norm(position - centre, axis=-1)
    labels = (distance < 9).astype(np.uint8) + (distance < 4)
    voxels = np.select([labels == 2, labels == 1], [120, 60], -900) + random.normal(
        0, 20, (32,) * 3
    )
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    nifti.write(folder / f"{name}_image.nii.gz", voxels.astype(np.int16), affine)
    nifti.write(folder / f"{name}_label.nii.gz", labels.astype(np.uint8), affine)


@pytest.fixture(scope="session")
def scan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    write_scan(folder / "train", "a", 1)
    write_scan(folder / "train", "b", 2)
    write_scan(folder / "val", "c", 3)
    return folder


@pytest.fixture(scope="session")
def tested_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `scan_folder`, with two test scans."""
    folder = tmp_path_factory.mktemp("tested")
    for seed, name in enumerate("abcde", start=1):
        write_scan(folder / {"c": "val", "d": "test", "e": "test"}.get(name, "train"), name, seed)
    return folder


@pytest.fixture(scope="session")
def pretrain_recipe() -> PretrainRecipe:
    return PretrainRecipe.model_validate(pretrain_fields())


@pytest.fixture
def finetune_recipe() -> FinetuneRecipe:
    return FinetuneRecipe.model_validate(
        {
            "labels": {"organ": 1, "lesion": 2},
            "network": {"base_width": 2},
            "preprocessing": {
                "spacing_mm": [2, 2, 2],
                "intensity": {"kind": "window", "low_hu": -200, "high_hu": 200},
            },
            "patch_size": [16, 16, 16],
            "num_steps": 12,
            "batch_size": 2,
            "learning_rate": 0.01,
            "validate_every": 6,
            "checkpoint_every": 6,
            "log_every": 1,
        }
    )


@pytest.fixture(scope="session")
def resnet18() -> dict[str, Tensor]:
    """Random values under torchvision's names, with its classifier: what a user's file holds."""
    torch.manual_seed(0)
    own = {
        _torchvision_name(name): torch.rand_like(value, dtype=torch.float32).to(value.dtype)
        for name, value in ResNet18Encoder(3, 64).state_dict().items()
    }
    return {**own, "fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}


World = tuple[Pcrl, Callable[[int], Views]]
"""PCRL, and what makes the views of a step."""


@pytest.fixture
def build() -> Callable[..., World]:
    """Tiny PCRL on two volumes of noise, with fields of the method as keywords."""

    def make(crops: Mapping[str, Any] | None = None, **method: Any) -> World:
        fields = pretrain_fields()
        fields["method"] |= method
        fields["crops"] |= {"max_tissue": None, **(crops or {})}
        fields["fused"] = fields["method"].pop("fused", True)
        recipe = PretrainRecipe.model_validate(fields)
        torch.manual_seed(0)
        random = np.random.default_rng(0)
        volumes = [random.random((32, 32, 24)).astype(np.float16) for _ in range(2)]
        resident = Resident.of(
            volumes, fill=[0, 0], at_least=(24, 24, 16), device=torch.device("cpu")
        )
        pcrl = Pcrl(recipe).train()
        sampler = PairSampler(recipe.crops, resident.shapes)
        return pcrl, lambda step: pcrl.make_views(resident, sampler, step)

    return make


def pretrain_fields() -> dict[str, Any]:
    return {
        "network": {"base_width": 2},
        "preprocessing": {"spacing_mm": [2, 2, 2]},
        "crops": {"input_size": [16, 16, 16], "crop_sizes": [[16, 16, 16], [24, 24, 16]]},
        "method": {"embedding_size": 8, "queue_size": 40},
        "num_steps": 20,
        "batch_size": 4,
        "checkpoint_every": 3,
        "log_every": 1,
    }
