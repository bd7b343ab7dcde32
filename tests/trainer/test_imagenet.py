"""ImageNet's weights from a file: taken key by key, and what was not taken is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import bundle
from models.bundle import sha256_of
from models.recipe import PretrainRecipe, PretrainRecipe2d
from trainer import imagenet, methods
from trainer.data.scans import discover
from trainer.errors import DataError

CPU = torch.device("cpu")
RECIPE = PretrainRecipe2d.model_validate(
    {"preprocessing": {"size": 32}, "crops": {"input_size": 32}, "method": {"name": "imagenet"}}
)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    (tmp_path / "films" / "train").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "films" / "train" / "a.png")
    return tmp_path / "films"


def run(path: Path, films: Path, report: Any, **method: Any) -> Path:
    recipe = PretrainRecipe2d.model_validate(
        {**RECIPE.model_dump(), "method": {"name": "imagenet", **method}}
    )
    scans = discover(films, dims=2)
    return imagenet.run(recipe, path, scans, path.parent / "out", report, device=CPU)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_bundle_holds_the_files_weights_and_tells_every_key(
    suffix: str, films: Path, tmp_path: Path, resnet18: dict[str, Tensor], report, without_onnx
) -> None:
    path = tmp_path / f"resnet18.{suffix}"
    (torch.save if suffix == "pth" else save_file)(resnet18, path)

    folder = run(path, films, report, sha256=sha256_of(path))

    lineage = bundle.load(folder).lineage
    assert lineage.parent_digest == sha256_of(path) and lineage.num_steps == 0
    assert lineage.skipped_keys == ("fc.bias", "fc.weight")
    assert {*lineage.loaded_keys, *lineage.skipped_keys} == resnet18.keys()
    assert any("fc.bias, fc.weight" in message for _, message in report.logs)
    kept = load_file(folder / bundle.WEIGHTS)
    assert torch.equal(kept["encoder.stem.conv.weight"], resnet18["conv1.weight"])
    assert all(name.startswith("encoder.") for name in kept)


def test_a_file_that_is_no_resnet18_or_another_one_is_refused(
    films: Path, tmp_path: Path, resnet18: dict[str, Tensor], report
) -> None:
    path = tmp_path / "some.pth"
    lacks = {name: value for name, value in resnet18.items() if name != "conv1.weight"}
    torch.save(lacks, path)
    with pytest.raises(DataError, match="it has no conv1"):
        run(path, films, report)
    with pytest.raises(DataError, match="the recipe says"):
        run(path, films, report, sha256="0" * 64)
    with pytest.raises(DataError, match="no file of weights"):
        run(tmp_path / "absent.pth", films, report)
    assert not (tmp_path / "out" / "bundle").exists()


class Malicious:
    """What a pickle may hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-run"),))


def test_a_pickle_that_would_run_code_is_refused_unrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Malicious()}, "evil.pth")
    torch.save({"epoch": 3}, "training.pth")
    Path("text.safetensors").write_text("no tensors")

    for name in ("evil.pth", "training.pth", "text.safetensors"):
        with pytest.raises(DataError, match="bad_weights"):
            imagenet.read_weights(Path(name))

    assert not Path("was-run").exists()


def test_there_is_nothing_to_train_and_nothing_in_3d() -> None:
    with pytest.raises(DataError, match="--weights FILE"):
        methods.make(RECIPE)
    with pytest.raises(ValidationError, match="in 2D; this is 3D"):
        PretrainRecipe.model_validate({"method": {"name": "imagenet"}})
