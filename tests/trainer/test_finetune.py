"""Fine-tuning learns, starts from its parent key by key, and refuses what it cannot use."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imaging import nifti
from models import bundle
from models.networks.unet3d import UNet3d
from models.recipe import ClassifyRecipe, FinetuneRecipe, PretrainRecipe
from trainer import checkpoint, export, finetune, transfer
from trainer.data.cache import VolumeCache
from trainer.data.scan_set import Example, ScanSet
from trainer.data.scans import ScanFile, discover
from trainer.errors import DataError, Preempted
from trainer.methods.pcrl import Pcrl

CPU = torch.device("cpu")


def test_two_scans_lower_the_loss_and_give_a_segmenter(
    tmp_path: Path, scan_folder: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    recipe = finetune_recipe.model_copy(update={"num_steps": 30, "validate_every": 10})

    folder = finetune.run(
        recipe, discover(scan_folder), tmp_path, report, device=CPU, should_stop=lambda: False
    )

    losses = [values["loss"] for _, values in report.metrics if "loss" in values]
    manifest = bundle.load(folder)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert manifest.metrics["dice_organ"].value > 0.5
    assert manifest.metrics["dice_organ"].split == "val" and manifest.metrics["dice_organ"].n == 1
    assert all(parity.passed for parity in manifest.parity)
    # A rerun finds the bundle and trains nothing.
    again = len(report.metrics)
    finetune.run(
        recipe, discover(scan_folder), tmp_path, report, device=CPU, should_stop=lambda: False
    )
    assert len(report.metrics) == again and len(set(report.results)) == 1


@pytest.fixture
def parent(tmp_path: Path, pretrain_recipe: PretrainRecipe, report) -> Path:
    torch.manual_seed(5)
    method = Pcrl(pretrain_recipe)
    for name, parameter in method.named_parameters():
        if ".norm." in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    state = {
        "step": 5, "recipe": pretrain_recipe.model_dump_json(),
        "recipe_digest": pretrain_recipe.digest(), "data_digest": "d" * 64, "run_id": "",
        "sample": torch.rand(1, 1, 16, 16, 16).half(), "method": method.state_dict(),
    }  # fmt: skip
    return export.publish(state, tmp_path / "parent", report)


def test_every_key_of_the_parent_is_taken_or_reported(
    parent: Path, pretrain_recipe: PretrainRecipe, finetune_recipe: FinetuneRecipe
) -> None:
    network = UNet3d(1, 3, 2, "group")
    teacher = UNet3d(1, 1, 2, "batch")

    moved = transfer.load_parent(network, parent, finetune_recipe)

    own = network.state_dict()
    affine = [key for key in own if key.startswith("encoder.") and ".norm." in key]
    assert len(affine) == 16 and set(affine) <= set(moved.loaded)
    assert all(not torch.all((own[key] == 1) | (own[key] == 0)) for key in affine)
    assert set(moved.loaded) == {key for key in own if key.startswith("encoder.")}
    assert set(moved.loaded) | set(moved.skipped) == set(teacher.state_dict())
    assert set(moved.loaded) | set(moved.fresh) == set(own)
    both = finetune_recipe.model_copy(update={"transfer": "encoder_decoder"})
    assert set(transfer.load_parent(network, parent, both).fresh) == {"out.weight", "out.bias"}


def test_a_key_without_a_place_is_refused(finetune_recipe: FinetuneRecipe) -> None:
    network = UNet3d(1, 3, 2, "group")

    with pytest.raises(DataError, match=r"has no encoder\.typo"):
        transfer.take(network, {"encoder.typo": torch.zeros(1)})
    with pytest.raises(DataError, match=r"out.bias is \(1,\)"):
        transfer.take(network, {"out.bias": torch.zeros(1)})


def test_a_parent_of_another_width_is_refused_before_training(
    tmp_path: Path, parent: Path, scan_folder: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    wide = finetune_recipe.model_copy(
        update={"network": finetune_recipe.network.model_copy(update={"base_width": 4})}
    )

    with pytest.raises(
        DataError, match=r"encoder\.\S+ is \(.*\) in the parent, \(.*\) here"
    ) as caught:
        finetune.run(
            wide, discover(scan_folder), tmp_path / "out", report,
            device=CPU, should_stop=lambda: False, parent=parent,
        )  # fmt: skip

    assert caught.value.status == 64 and caught.value.code == "incompatible_parent"


def scan_of(folder: Path, voxels: np.ndarray, labels: np.ndarray) -> ScanFile:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    nifti.write(folder / "x_image.nii", voxels, affine)
    nifti.write(folder / "x_label.nii", labels, affine)
    return discover(folder).scans[0]


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ("label value", "unusable_labels", r"\[7\]"),
        ("label shape", "unusable_labels", "labels are"),
        ("constant", "unusable_scan", "constant"),
        ("nan", "unusable_scan", "non_finite_voxels"),
        ("not a scan", "unusable_scan", "not_a_scan"),
        ("no labels", "unusable_labels", "no labels"),
        ("nothing", "", ""),
    ],
)
def test_unusable_data_is_refused_with_the_scan_and_the_reason(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, change: str, code: str, reason: str
) -> None:
    voxels = np.random.default_rng(0).normal(0, 50, (16, 16, 16)).astype(np.float32)
    labels = np.zeros((16, 16, 16), dtype=np.uint8)
    labels[4:8, 4:8, 4:8] = 1
    if change == "label value":
        labels[0, 0, 0] = 7
    elif change == "label shape":
        labels = labels[:, :, :-1]
    elif change == "constant":
        voxels[:] = 500.0
    elif change == "nan":
        voxels[3, 3, 3] = np.nan
    folder = tmp_path / "scans"
    folder.mkdir()
    scan = scan_of(folder, voxels, labels)
    if change == "not a scan":
        scan.image.write_bytes(b"hello")
    elif change == "no labels":
        (folder / "x_label.nii").unlink()
        scan = discover(folder).scans[0]
    cache = VolumeCache(tmp_path / "cache")

    if change == "nothing":
        case = cache.labelled(scan, finetune_recipe)
        assert case.labels is not None and int((case.labels == 1).sum()) == 64
        return
    with pytest.raises(DataError, match=f"scan x.*{reason}") as caught:
        cache.labelled(scan, finetune_recipe)

    assert caught.value.code == code and caught.value.status == 64


class StopAt:
    """Asks for a stop at the n-th step of this process."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("kind", ["finetune", "classify"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(
    tmp_path: Path, scan_folder: Path, finetune_recipe, report, without_onnx, kind: str
) -> None:
    recipe: FinetuneRecipe | ClassifyRecipe = finetune_recipe
    scans = discover(scan_folder)
    if kind == "classify":
        shared = {"network", "preprocessing", "num_steps", "learning_rate", "log_every"}
        recipe = ClassifyRecipe.model_validate(
            {
                **finetune_recipe.model_dump(include=shared),
                "labels": ["first"], "crop": "whole", "input_size": [16, 16, 16],
                "batch_size": 4, "validate_every": 6, "checkpoint_every": 5,
            }
        )  # fmt: skip
        known = tuple(Example({"first": value}) for value in (0, 1, 0, 1))
        scans = ScanSet("d", tuple(replace(scan, examples=known) for scan in scans.scans))

    def trained(out: Path, stop: StopAt) -> dict[str, torch.Tensor]:
        finetune.run(recipe, scans, out, report, device=CPU, should_stop=stop)
        state = checkpoint.load_newest(out / "checkpoints")
        assert state is not None and state["step"] == recipe.num_steps
        weights: dict[str, torch.Tensor] = state["network"]
        return weights

    whole = trained(tmp_path / "whole", StopAt(0))
    with pytest.raises(Preempted, match="after step 7"):
        trained(tmp_path / "halves", StopAt(7))
    halves = trained(tmp_path / "halves", StopAt(0))
    other = recipe.model_copy(update={"seed": 1})
    finetune.run(other, scans, tmp_path / "o", report, device=CPU, should_stop=StopAt(0))
    control = checkpoint.load_newest(tmp_path / "o" / "checkpoints")

    assert control is not None
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    assert any(not torch.equal(whole[key], control["network"][key]) for key in whole)


def test_a_volume_is_preprocessed_once(
    tmp_path: Path, scan_folder: Path, finetune_recipe: FinetuneRecipe
) -> None:
    scan = discover(scan_folder).scans[0]
    cache = VolumeCache(tmp_path)

    def stamps() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    cache.image(scan, finetune_recipe.preprocessing)
    first = stamps()
    cache.image(scan, finetune_recipe.preprocessing)
    second = stamps()
    cache.image(scan, finetune_recipe.preprocessing.model_copy(update={"spacing_mm": (4, 4, 4)}))

    assert len(first) == 2 and second == first
    assert len(stamps()) == 4


def test_a_weight_of_an_unknown_class_is_refused(finetune_recipe: FinetuneRecipe) -> None:
    fields = finetune_recipe.model_dump()

    with pytest.raises(ValueError, match="class_weights names what labels does not: \\['cyst'\\]"):
        FinetuneRecipe.model_validate({**fields, "class_weights": {"cyst": 2.0}})
    FinetuneRecipe.model_validate({**fields, "class_weights": {"lesion": 2.0}})
