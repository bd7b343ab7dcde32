"""Regions that may overlap, scans of several channels, and what is refused before training."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imaging import nifti
from imaging.volume import Volume
from models import bundle
from models.bundle import BundleError
from models.experiment.cases import CaseResults, CaseTable
from models.networks.unet3d import UNet3d
from models.predict import segment
from models.recipe import FinetuneRecipe
from models.session import open_session
from trainer import checkpoint, export, finetune, transfer
from trainer.build import build
from trainer.data.cache import VolumeCache
from trainer.data.scans import discover
from trainer.errors import DataError, NonFiniteLossError
from trainer.losses import region_loss
from trainer.segmentation import Segmentation, region_members
from trainer.task import Setting

CPU = torch.device("cpu")
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
BRATS = Path("/work/shared/data/mr_brats_deepmedic")
MODALITIES = ("flair", "t1", "t1c", "t2")
REGIONS = {"whole_tumour": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}


@pytest.fixture
def brats_recipe(finetune_recipe: FinetuneRecipe) -> FinetuneRecipe:
    fields = finetune_recipe.model_dump()
    return FinetuneRecipe.model_validate(
        {
            **fields,
            "labels": {},
            "regions": REGIONS,
            "channels": MODALITIES,
            "preprocessing": {"spacing_mm": [2, 2, 2], "intensity": {"kind": "zscore"}},
            "flip_probability": 0.5,
        }
    )


def write_brain(folder: Path, name: str, seed: int) -> None:
    """A head whose modalities each show one class of a tumour, skull-stripped to 0."""
    random = np.random.default_rng(seed)
    position = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), axis=-1)
    distance = np.linalg.norm(position - random.uniform(9, 15, 3), axis=-1)
    labels = np.select([distance < 3, distance < 5, distance < 7], [4, 1, 2], 0).astype(np.uint8)
    head = np.linalg.norm(position - 11.5, axis=-1) < 12
    folder.mkdir(parents=True, exist_ok=True)
    for channel, shown in zip(MODALITIES, ([1, 2, 4], [1, 4], [4], [2]), strict=True):
        voxels = 300.0 + 200.0 * np.isin(labels, shown) + random.normal(0, 20, labels.shape)
        image = np.where(head, voxels, 0).astype(np.int16)
        nifti.write(folder / f"{name}_image_{channel}.nii.gz", image, AFFINE)
    nifti.write(folder / f"{name}_label.nii.gz", labels, AFFINE)


@pytest.fixture(scope="module")
def brains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("brains")
    for seed, (split, name) in enumerate(
        [("train", "a"), ("train", "b"), ("val", "c"), ("test", "d")]
    ):
        write_brain(folder / split, name, seed)
    return folder


def train(recipe: FinetuneRecipe, scans: Path, out: Path, report, **more) -> Path:
    found = discover(scans, channels=recipe.channels)
    return finetune.run(recipe, found, out, report, device=CPU, should_stop=lambda: False, **more)


def state_of(recipe: FinetuneRecipe) -> checkpoint.State:
    return {
        "step": 1, "recipe": recipe.model_dump_json(), "recipe_digest": recipe.digest(),
        "data_digest": "d" * 64, "run_id": "", "sample": torch.rand(1, 1, 16, 16, 16).half(),
        "network": build(recipe, fused=False).state_dict(),
    }  # fmt: skip


def test_four_channels_become_three_overlapping_regions(
    tmp_path: Path, brains: Path, brats_recipe: FinetuneRecipe, report
) -> None:
    recipe = brats_recipe.model_copy(update={"num_steps": 40, "validate_every": 20})

    folder = train(recipe, brains, tmp_path / "out", report)

    manifest = bundle.load(folder)
    found = {name: (metric.split, metric.n) for name, metric in manifest.metrics.items()}
    losses = [values["loss"] for _, values in report.metrics if "loss" in values]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert manifest.metrics["test_dice_whole_tumour"].value > 0.6
    results = CaseResults.model_validate_json((tmp_path / "out" / "cases.json").read_bytes())
    assert [case.case_id for case in results.cases] == ["d"]
    assert results.labels == tuple(REGIONS)
    tested = manifest.metrics["test_dice_mean"].value
    assert CaseTable.of(results).value()[0] == pytest.approx(tested)
    assert found["dice_mean"] == ("val", 1) and found["test_dice_mean"] == ("test", 1)
    assert (manifest.activation, manifest.channels) == ("sigmoid", MODALITIES)
    assert manifest.inputs[0].shape[1] == 4 and manifest.outputs[0].shape[1] == 3
    assert all(parity.passed for parity in manifest.parity)
    card = (folder / "card.md").read_text()
    assert "flair, t1, t1c, t2" in card and "after the choice" in card
    session = open_session(folder)
    assert session.run(np.zeros((1, 4, 8, 8, 8), np.float32)).shape == (1, 3, 8, 8, 8)
    with pytest.raises(ValueError, match="not float32"):
        session.run(np.zeros((1, 1, 8, 8, 8), np.float32))
    with pytest.raises(BundleError, match=r"wrong_model_kind.*reads 4 images"):
        segment(session, Volume(np.zeros((8, 8, 8), np.int16), AFFINE))


def test_a_mask_of_overlapping_regions_is_refused_in_serving(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, report, without_onnx
) -> None:
    fields = {**finetune_recipe.model_dump(), "labels": {}, "regions": {"organ": (1, 2)}}
    published = export.publish(
        state_of(FinetuneRecipe.model_validate(fields)), tmp_path / "bundle", report
    )
    session = SimpleNamespace(manifest=bundle.load(published))

    with pytest.raises(BundleError, match=r"wrong_model_kind.*\(organ\) may overlap"):
        segment(session, Volume(np.zeros((8, 8, 8), np.int16), AFFINE))


def test_the_region_loss_is_dice_and_cross_entropy_of_logits() -> None:
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 2, 3, 2, 2, generator=random, dtype=torch.float64)
    target = torch.rand(2, 2, 3, 2, 2, generator=random) < 0.4

    dice, entropy = 0.0, 0.0
    for region in range(2):
        overlap = size = 0.0
        for x, is_in in zip(
            logits[:, region].flatten().tolist(), target[:, region].flatten().tolist(), strict=True
        ):
            p = 1 / (1 + math.exp(-x))
            overlap += p * is_in
            size += p + is_in
            entropy -= math.log(p if is_in else 1 - p)
        dice += 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    expected = dice / 2 + entropy / logits.numel()
    twice = region_loss(logits.sigmoid(), target)  # bug B16: a sigmoid too many

    assert float(region_loss(logits, target)) == pytest.approx(expected, rel=1e-5)
    assert float(twice) != pytest.approx(expected, rel=1e-2)


def test_a_perfect_prediction_has_no_region_loss() -> None:
    target = torch.zeros(1, 2, 4, 4, 4, dtype=torch.bool)
    target[:, 0, :2], target[:, 1, :1] = True, True

    assert float(region_loss(100.0 * target - 50.0, target)) < 1e-4
    assert float(region_loss(50.0 - 100.0 * target, target)) > 10


def test_regions_are_unions_of_values(brats_recipe: FinetuneRecipe) -> None:
    values = torch.tensor([0, 1, 2, 4])
    classes = torch.tensor([0, 1, 2, 3])  # as the cache stores them

    masks = region_members(brats_recipe)[:, classes]

    for region, mask in zip(REGIONS.values(), masks, strict=True):
        assert mask.tolist() == [int(value) in region for value in values]
    assert brats_recipe.targets == tuple(REGIONS)


def test_an_inflated_stem_answers_to_equal_channels_as_to_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = UNet3d(1, 1, 2, "group").double().eval()
    four = UNet3d(4, 1, 2, "group").double().eval()
    weights = one.state_dict()
    stem = "encoder.down64.first.conv.weight"
    image = torch.rand(1, 1, 8, 8, 8, dtype=torch.float64)

    inflated = transfer.inflated(weights[stem], 4)
    transfer.take(four, {**weights, stem: inflated})
    with torch.no_grad():
        same = four(image.expand(1, 4, 8, 8, 8)) - one(image)
        four.state_dict()[stem].copy_(4 * inflated)  # bug B17: repeated, not divided
        other = four(image.expand(1, 4, 8, 8, 8)) - one(image)

    assert inflated.shape == (2, 4, 3, 3, 3)
    assert float(same.abs().max()) < 1e-12 < float(other.abs().max())


def test_a_one_channel_parent_starts_a_four_channel_network(
    tmp_path: Path, brats_recipe: FinetuneRecipe, finetune_recipe, report, without_onnx
) -> None:
    torch.manual_seed(1)
    parent = export.publish(state_of(finetune_recipe), tmp_path / "parent", report)
    recipe = brats_recipe.model_copy(update={"transfer": "encoder_decoder"})
    network = build(recipe, fused=True)

    moved = transfer.load_parent(network, parent, recipe)

    assert moved.inflated == ("encoder.down64.first.conv.weight",)
    assert moved.skipped == moved.fresh == ("out.bias", "out.weight")
    assert set(moved.loaded) | set(moved.fresh) == set(network.state_dict())


def test_a_parent_with_a_hole_is_refused() -> None:
    weights = UNet3d(1, 1, 2, "batch").state_dict()
    del weights["encoder.down128.first.norm.weight"]

    with pytest.raises(DataError, match=r"the parent has no encoder\.down128\.first\.norm\.weight"):
        transfer.take(UNet3d(1, 1, 2, "group"), weights)


def test_channels_on_another_grid_are_refused_by_name(
    tmp_path: Path, brats_recipe: FinetuneRecipe
) -> None:
    folder = tmp_path / "scans"
    write_brain(folder, "x", 0)
    cache = VolumeCache(tmp_path / "cache")
    names = brats_recipe.channels
    t1c = folder / "x_image_t1c.nii.gz"
    voxels = np.random.default_rng(0).normal(300, 20, (24, 24, 24)).astype(np.int16)
    moved = AFFINE.copy()
    moved[0, 3] = 1.0

    for change, affine, reason in (
        (voxels[:, :, :-2], AFFINE, r"channel t1c is \(24, 24, 22\)"),
        (voxels, moved, "channel t1c lies elsewhere"),
        (np.full_like(voxels, 7), AFFINE, "channel t1c is constant"),
    ):
        nifti.write(t1c, change, affine)
        scan = discover(folder, channels=names).scans[0]
        with pytest.raises(DataError, match=f"unusable_scan: scan x.*{reason}"):
            cache.labelled(scan, brats_recipe)
    nifti.write(t1c, voxels, AFFINE)
    case = cache.labelled(discover(folder, channels=names).scans[0], brats_recipe)
    assert len(case.channels) == 4 and case.labels.max() == 3


@pytest.mark.skipif(not BRATS.is_dir(), reason="no shared BraTS patient here")
def test_a_real_patient_has_nested_regions(tmp_path: Path, brats_recipe: FinetuneRecipe) -> None:
    patient = "pat0006_{}.nii.gz"
    images = [str(BRATS / patient.format(f"{name}_subtrMeanDivStd")) for name in ("Flair", "T1c")]
    labels = str(BRATS / patient.format("OTMultiClass"))
    listed = {"digest": "d", "scans": [{"id": "p", "image": images, "labels": labels}]}
    (tmp_path / "scans.json").write_text(json.dumps(listed))
    recipe = FinetuneRecipe.model_validate(
        {
            **brats_recipe.model_dump(),
            "channels": ("flair", "t1c"),
            "regions": {"whole_tumour": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)},
            "preprocessing": {"spacing_mm": [3, 3, 3], "intensity": {"kind": "zscore"}},
        }
    )

    case = VolumeCache(tmp_path / "cache").labelled(
        discover(tmp_path / "scans.json").scans[0], recipe
    )

    whole, core, enhancing = region_members(recipe)[:, torch.from_numpy(case.labels.copy()).long()]
    assert (core <= whole).all() and (enhancing <= core).all()
    volumes = [int(mask.sum()) for mask in (whole, core, enhancing)]
    assert volumes[0] > volumes[1] > volumes[2] > 0
    flair, t1c = (channel.image.astype(np.float32) for channel in case.channels)
    assert flair[whole.numpy()].mean() > flair.mean() + 0.5  # oedema is bright in FLAIR
    assert t1c[enhancing.numpy()].mean() > t1c[whole.numpy()].mean()


def test_a_scan_with_too_few_images_is_refused(
    tmp_path: Path, scan_folder: Path, brats_recipe: FinetuneRecipe
) -> None:
    scan = discover(scan_folder).scans[0]

    with pytest.raises(DataError, match="scan a has 1 images; the recipe reads 4"):
        VolumeCache(tmp_path).labelled(scan, brats_recipe)


class Thresholds(torch.nn.Module):
    """One logit a channel: positive where the channel is bright."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image - 0.5


def test_whole_volumes_are_judged_where_they_lie_though_padded(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    labels = np.zeros((10, 24, 20), np.uint8)
    labels[2:6, 3:20, 4:9], labels[4:6, 5:9, 4:6] = 1, 2
    folder = tmp_path / "train"
    folder.mkdir()
    for channel, shown in (("low", [1, 2]), ("high", [2])):
        voxels = (2000 * np.isin(labels, shown) - 1000).astype(np.int16)
        nifti.write(folder / f"x_image_{channel}.nii", voxels, AFFINE)
    nifti.write(folder / "x_label.nii", labels, AFFINE)
    recipe = FinetuneRecipe.model_validate(
        {
            **finetune_recipe.model_dump(), "labels": {}, "channels": ("low", "high"),
            "regions": {"both": (1, 2), "inner": (2,)},
        }
    )  # fmt: skip
    scans = discover(tmp_path, channels=recipe.channels)
    more = (scans, tmp_path / "cache", report, CPU)

    exact = Segmentation(recipe, Setting(Thresholds(), *more)).judge("train")
    moving = torch.nn.ReplicationPad3d((-1, 1, 0, 0, 0, 0))
    shifted = Segmentation(recipe, Setting(moving, *more))

    assert [exact[name]["value"] for name in ("dice_both", "dice_inner", "dice_mean")] == [1, 1, 1]
    assert 0.3 < shifted.judge("train")["dice_inner"]["value"] < 0.9
    assert any("padded with air: scan x" in message for _, message in report.logs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("short", r"scan x.*\(16, 16, 7\).*less than half of \(16, 16, 16\)"),
        ("flat", "scan x: not_three_dimensional"),
        ("no lesion", "no training example of lesion"),
        ("unlabelled", "no training scan has labels"),
        ("nothing", ""),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_the_first_step(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, report, without_onnx, change: str, reason: str
) -> None:
    shape = {"short": (16, 16, 7), "flat": (16, 16, 1)}.get(change, (16, 16, 16))
    voxels = np.random.default_rng(0).normal(0, 50, shape).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    labels[4:8, 4:8, :4], labels[5, 5, :3] = 1, 1 if change == "no lesion" else 2
    nifti.write(tmp_path / "x_image.nii", voxels, AFFINE)
    if change != "unlabelled":
        nifti.write(tmp_path / "x_label.nii", labels, AFFINE)
    recipe = finetune_recipe.model_copy(update={"num_steps": 1})

    if change == "nothing":
        train(recipe, tmp_path, tmp_path / "out", report)
        assert any(
            "lesion has a single training example: scan x" in text for _, text in report.logs
        )
        return
    with pytest.raises(DataError, match=reason) as caught:
        train(recipe, tmp_path, tmp_path / "out", report)

    assert caught.value.status == 64
    assert report.metrics == [] and not (tmp_path / "out" / "checkpoints").exists()


def test_validation_that_cannot_judge_is_refused_before_the_first_step(
    tmp_path: Path, scan_folder: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    for name in ("a", "c"):
        source = next(scan for scan in discover(scan_folder).scans if scan.id == name)
        split = tmp_path / source.split
        split.mkdir()
        (split / f"{name}_image.nii.gz").write_bytes(source.image.read_bytes())
        assert source.labels is not None
        (split / f"{name}_label.nii.gz").write_bytes(source.labels.read_bytes())
    empty = np.zeros((32, 32, 32), np.uint8)
    nifti.write(tmp_path / "val" / "c_label.nii.gz", empty, AFFINE)

    with pytest.raises(DataError, match="nothing_to_judge: no val scan holds any"):
        train(finetune_recipe, tmp_path, tmp_path / "out", report)

    assert report.metrics == []


def test_a_loss_that_is_not_finite_names_its_step_and_the_last_good_checkpoint(
    tmp_path: Path, scan_folder: Path, finetune_recipe: FinetuneRecipe, report, monkeypatch
) -> None:
    honest = Segmentation.loss
    monkeypatch.setattr(
        Segmentation,
        "loss",
        lambda task, step: honest(task, step) * (float("nan") if step >= bad else 1.0),
    )

    for bad, kept in ((9, "checkpoint is of step 6"), (3, "no checkpoint before it")):
        with pytest.raises(NonFiniteLossError, match=f"step {bad} is not finite; .*{kept}"):
            train(finetune_recipe, scan_folder, tmp_path / f"out{bad}", report)


def test_scans_without_labels_are_left_out_and_told(
    tmp_path: Path, scan_folder: Path, finetune_recipe: FinetuneRecipe, report, without_onnx
) -> None:
    (tmp_path / "train").mkdir()
    for scan in discover(scan_folder).of("train"):
        (tmp_path / "train" / scan.image.name).write_bytes(scan.image.read_bytes())
    labels = discover(scan_folder).scans[0].labels
    assert labels is not None
    (tmp_path / "train" / labels.name).write_bytes(labels.read_bytes())
    recipe = finetune_recipe.model_copy(update={"num_steps": 1})

    folder = train(recipe, tmp_path, tmp_path / "out", report)

    assert ("info", "1 scans without labels are not used") in report.logs
    assert bundle.load(folder).metrics["dice_organ"].split == "train"
