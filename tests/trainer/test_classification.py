"""Classifiers learn from places and from whole scans, and are judged on the natural examples."""

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
from models.networks.classifier import Classifier
from models.networks.unet3d import UNet3d, UNet3dEncoder
from models.predict import segment
from models.recipe import ClassifyRecipe, SplitShares
from models.session import open_session
from trainer import finetune, transfer
from trainer.build import build
from trainer.classification import Classification
from trainer.data.cache import VolumeCache
from trainer.data.examples import ExampleCase, Examples, ExampleSampler
from trainer.data.patches import flipped, turned
from trainer.data.scan_set import Example
from trainer.data.scans import discover
from trainer.errors import DataError
from trainer.losses import multi_label_loss
from trainer.metrics import auc, average_precision
from trainer.randomness import generator
from trainer.task import Setting

CPU = torch.device("cpu")
AFFINE = np.array([[2.0, 0, 0, -10], [0, 2.0, 0, 5], [0, 0, 2.0, 40], [0, 0, 0, 1]])


@pytest.fixture
def classify_recipe() -> ClassifyRecipe:
    return ClassifyRecipe.model_validate(
        {
            "labels": ["nodule"],
            "network": {"base_width": 2},
            "preprocessing": {"spacing_mm": [2, 2, 2]},
            "input_size": [16, 16, 8],
            "num_steps": 40,
            "batch_size": 8,
            "learning_rate": 0.01,
            "validate_every": 20,
            "checkpoint_every": 20,
            "log_every": 1,
        }
    )


def write_lung(folder: Path, name: str, seed: int) -> list[str]:
    """Noise in air with two balls of 200 HU; four lines of the table, the balls and two others."""
    random = np.random.default_rng(seed)
    position = np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"), axis=-1)
    places = np.array([[2, 16, 16], [16, 8, 8], [16, 25, 25], [28, 4, 16]])  # one at the border
    voxels = random.normal(-800, 60, (32, 32, 32))
    for centre in places[:2]:
        voxels[np.linalg.norm(position - centre, axis=-1) < 3] = 200
    nifti.write(folder / f"{name}.nii.gz", voxels.astype(np.int16), AFFINE)
    at_mm = (places @ AFFINE[:3, :3].T + AFFINE[:3, 3]).tolist()
    return [f"{name},p{name},{x},{y},{z},{int(row < 2)}" for row, (x, y, z) in enumerate(at_mm)]


@pytest.fixture(scope="module")
def lungs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lungs")
    rows = [row for seed in range(6) for row in write_lung(folder, f"s{seed}", seed)]
    (folder / "labels.csv").write_text("\n".join(["id,subject,x_mm,y_mm,z_mm,nodule", *rows]))
    return folder


def train(recipe: ClassifyRecipe, scans: Path, out: Path, report, **more) -> Path:
    found = discover(scans, shares=SplitShares(train=0.5, val=0.25, test=0.25))
    return finetune.run(recipe, found, out, report, device=CPU, should_stop=lambda: False, **more)


def test_nodules_are_told_from_air(
    tmp_path: Path, lungs: Path, classify_recipe: ClassifyRecipe, report
) -> None:
    folder = train(classify_recipe, lungs, tmp_path, report)

    manifest = bundle.load(folder)
    found = {name: (metric.split, metric.n) for name, metric in manifest.metrics.items()}
    assert manifest.metrics["test_auc_nodule"].value > 0.9
    results = CaseResults.model_validate_json((tmp_path / "cases.json").read_bytes())
    by_case = CaseTable.of(results).value()[0]
    assert by_case == pytest.approx(manifest.metrics["test_auc_mean"].value, abs=1e-6)
    assert {case.case_id for case in results.cases} == {
        f"{case.subject[1:]}#{number}" for case in results.cases for number in (1, 2, 3, 4)
    }
    assert found["auc_mean"][0] == "val" and found["test_ap_nodule"][0] == "test"
    assert found["test_auc_nodule"][1] % 4 == 0  # every example once, though training balances
    assert (manifest.kind, manifest.labels) == ("classifier", ("nodule",))
    assert manifest.activation == "sigmoid" and manifest.outputs[0].shape == ("batch", 1)
    assert all(parity.passed for parity in manifest.parity)
    assert "Classifier of nodule" in (folder / "card.md").read_text()
    session = open_session(folder)
    assert session.run(np.zeros((2, 1, 16, 16, 8), np.float32)).shape == (2, 1)
    with pytest.raises(BundleError, match="wrong_model_kind: the model is of kind classifier"):
        segment(session, Volume(np.zeros((8, 8, 8), np.int16), AFFINE))


def test_every_place_is_the_middle_of_its_cube(
    tmp_path: Path, lungs: Path, classify_recipe: ClassifyRecipe
) -> None:
    scan = discover(lungs).scans[0]
    channels = VolumeCache(tmp_path).channels(scan, classify_recipe.preprocessing, ("image",))
    case = ExampleCase(scan.id, channels, scan.examples)

    cubes = Examples.of([case], classify_recipe, CPU).inputs(torch.arange(4))

    # 200 HU is 0.6 in the window, air 0.1.
    inside = cubes[:, 0] > 0.4
    assert cubes.shape == (4, 1, 16, 16, 8)
    assert inside.flatten(1).any(dim=1).tolist() == [True, True, False, False]
    for cube in inside[:2]:
        centre = cube.nonzero().double().mean(dim=0)
        np.testing.assert_allclose(centre, [8, 8, 4], atol=0.01)
    assert (cubes[0, 0, :6] == 0).all()  # beyond the scan's border: air


def test_a_whole_scan_is_resized(tmp_path: Path, lungs: Path, classify_recipe) -> None:
    scan = discover(lungs).scans[0]
    recipe = classify_recipe.model_copy(update={"crop": "whole"})
    channels = VolumeCache(tmp_path).channels(scan, recipe.preprocessing, ("image",))
    case = ExampleCase(scan.id, channels, (Example({"nodule": 1}),))

    whole = Examples.of([case], recipe, CPU).inputs(torch.tensor([0, 0]))

    assert whole.shape == (2, 1, 16, 16, 8)
    assert float(whole.mean()) == pytest.approx(float(channels[0].image.mean()), abs=2e-3)
    assert float(whole[0, 0, 8, 4, 2]) > float(whole[0, 0, 8, 12, 6]) + 0.1


def test_unknown_labels_do_not_count() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=random, dtype=torch.float64)
    truth = (torch.rand(5, 3, generator=random) < 0.5).double()
    truth[1, 0] = truth[2, 2] = truth[3, 2] = math.nan

    each = [
        -math.log(1 / (1 + math.exp(-x if y else x)))
        for x, y in zip(logits.flatten().tolist(), truth.flatten().tolist(), strict=True)
        if not math.isnan(y)
    ]
    changed = logits.clone()
    changed[1, 0] = 100.0

    assert len(each) == 12
    assert float(multi_label_loss(logits, truth)) == pytest.approx(sum(each) / 12, rel=1e-6)
    assert multi_label_loss(changed, truth) == multi_label_loss(logits, truth)
    changed[1, 1] = 100.0
    assert multi_label_loss(changed, truth) != multi_label_loss(logits, truth)
    assert float(multi_label_loss(logits, torch.full_like(truth, math.nan))) == 0.0


def test_auc_counts_pairs_and_ties_by_half() -> None:
    random = torch.Generator().manual_seed(3)
    scores = torch.randint(6, (40,), generator=random).float()  # many ties
    truth = (torch.rand(40, generator=random) < 0.3).float()

    positives, negatives = scores[truth == 1].tolist(), scores[truth == 0].tolist()
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]

    assert auc(scores, truth) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(-scores, truth) == pytest.approx(1 - sum(pairs) / len(pairs))
    assert sum(pairs) / len(pairs) != 0.5


def test_average_precision_is_the_precision_where_positives_are_found() -> None:
    scores, truth = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1.0, 0, 1, 0])

    assert average_precision(scores, truth) == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_rare_labels_are_drawn_as_often_as_their_absence(classify_recipe) -> None:
    truth = torch.zeros(1000, 2)
    truth[:5, 0], truth[5:8, 1] = 1, 1
    truth[500:, 1] = math.nan
    recipe = classify_recipe.model_copy(update={"labels": ("rare", "other")})
    natural = recipe.model_copy(update={"balanced": False})

    def share(recipe: ClassifyRecipe) -> float:
        draws = [
            ExampleSampler(truth, recipe).draw(100, step, generator(0, step, "t")).index
            for step in range(40)
        ]
        return float((truth[torch.cat(draws)] == 1).any(dim=1).double().mean())

    assert share(recipe) == pytest.approx(0.5, abs=0.03)
    assert share(natural) == pytest.approx(0.008, abs=0.008)


def test_moves_know_nothing_of_the_classes(classify_recipe: ClassifyRecipe) -> None:
    """Bug B19: where positives alone are moved, the move gives them away."""
    truth = torch.tensor([[1.0], [0.0]])
    draws = [
        ExampleSampler(truth, classify_recipe).draw(64, step, generator(0, step, "t"))
        for step in range(40)
    ]
    label = torch.cat([truth[draw.index, 0] for draw in draws])
    flips = torch.cat([draw.flips for draw in draws]).double()
    turns = torch.cat([draw.turns for draw in draws])

    for value in (0.0, 1.0):
        of_class = label == value
        assert flips[of_class].mean(dim=0).tolist() == pytest.approx([0.5] * 3, abs=0.05)
        counts = torch.bincount(turns[of_class], minlength=4) / of_class.sum()
        assert counts.tolist() == pytest.approx([0.25] * 4, abs=0.04)


def test_moves_are_those_of_numpy() -> None:
    image = torch.rand(4, 2, 6, 6, 3)
    flips = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]]).bool()
    turns = torch.tensor([0, 1, 2, 3])

    moved = turned(flipped(image, flips), turns)

    for sample in range(4):
        axes = [1 + axis for axis in range(3) if flips[sample, axis]]
        expected = np.rot90(np.flip(image[sample].numpy(), axes), int(turns[sample]), axes=(1, 2))
        np.testing.assert_array_equal(moved[sample].numpy(), expected)
    assert not torch.equal(moved[1], image[1])


def test_the_head_reads_the_pooled_bottleneck() -> None:
    encoder = UNet3dEncoder(1, 2, "batch").eval()
    network = Classifier(encoder, 32, 3).eval()
    image = torch.rand(2, 1, 16, 16, 8)

    with torch.no_grad():
        expected = network.head(encoder(image).bottleneck.mean(dim=(2, 3, 4)))
        torch.testing.assert_close(network(image), expected)
    assert expected.shape == (2, 3) and float(expected.std()) > 0


def test_a_pretrained_encoder_starts_a_classifier_with_its_statistics(
    classify_recipe: ClassifyRecipe,
) -> None:
    parent = UNet3d(1, 1, 2, "batch").state_dict()
    parent["encoder.down64.first.norm.running_mean"] += 0.25
    chosen = {name: value for name, value in parent.items() if name.startswith("encoder.")}
    network = build(classify_recipe, fused=False)
    grouped = build(classify_recipe.model_copy(update={"norm": "group"}), fused=False)

    loaded = transfer.take(network, chosen)
    without = transfer.take(grouped, chosen)

    own = network.state_dict()
    assert set(own) - set(loaded) == {"head.weight", "head.bias"}
    assert all(torch.equal(own[name], value) for name, value in chosen.items())
    assert {name.rpartition(".")[2] for name in set(loaded) - set(without)} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip


def scan_table(folder: Path, rows: list[str], heads: str, num_scans: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(num_scans):
        voxels = np.random.default_rng(number).normal(-500, 100, (16, 16, 12)).astype(np.int16)
        nifti.write(folder / f"s{number}.nii", voxels, AFFINE)
    (folder / "labels.csv").write_text("\n".join([heads, *rows]))
    return folder


@pytest.mark.parametrize(
    ("change", "heads", "rows", "reason"),
    [
        ({}, "id,other", ["s0,1", "s1,0"], "no training example of nodule"),
        ({}, "id,nodule", ["s0,1", "s1,1", "s2,1"], "no training example of not nodule"),
        ({}, "id,nodule", ["s0,1", "s1,0", "s2,0"], r"nodule has 1 training example \(scan s0\)"),
        ({}, "id,subject", ["s0,p"], "no training scan has labels"),
        (
            {"labels": ("a", "b"), "exclusive": True}, "id,a,b", ["s0,1,0", "s1,1,1"],
            "scan s1: of exclusive labels one",
        ),
        (
            {"labels": ("a", "b"), "exclusive": True}, "id,a,b", ["s0,1,0", "s1,1,"],
            "scan s1: of exclusive labels one",
        ),
        ({"crop": "centre"}, "id,nodule", ["s3,1"], "scan s3: an example has no x_mm"),
        (
            {"crop": "centre"}, "id,x_mm,y_mm,z_mm,nodule", ["s3,10,-5,40,1"],
            r"scan s3: the place \(10, -5, 40\) mm is voxel \(10, -5, 0\)",
        ),
        (
            {"crop": "centre", "input_size": (40, 40, 8)}, "id,x_mm,y_mm,z_mm,nodule",
            ["s3,0,10,44,1"], r"scan s\d.* less than half of \(40, 40, 8\)",
        ),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_trained_on_are_refused_before_the_first_step(
    tmp_path: Path, classify_recipe: ClassifyRecipe, report, change, heads, rows, reason
) -> None:
    fields = {**classify_recipe.model_dump(), "crop": "whole", **change}
    recipe = ClassifyRecipe.model_validate(fields)
    scans = discover(scan_table(tmp_path / "scans", rows, heads))

    with pytest.raises(DataError, match=f"unusable_(labels|scan): .*{reason}") as caught:
        finetune.run(recipe, scans, tmp_path / "out", report, device=CPU, should_stop=lambda: False)

    assert caught.value.status == 64 and report.metrics == []


def test_a_label_that_validation_lacks_is_left_out_and_told(
    tmp_path: Path, classify_recipe: ClassifyRecipe, report, without_onnx
) -> None:
    for split, rows in (
        ("train", ["s0,1,0", "s1,1,0", "s2,0,1", "s3,0,1"]),
        ("val", ["v0,1,0", "v1,0,0"]),
    ):
        scan_table(tmp_path / split, rows, "id,common,rare", num_scans=4)
        for scan in sorted((tmp_path / split).glob("s*.nii")):
            if split == "val":
                scan.rename(scan.with_name(f"v{scan.name[1:]}"))
    fields = {
        **classify_recipe.model_dump(), "crop": "whole", "num_steps": 1,
        "labels": ("common", "rare"),
    }  # fmt: skip

    folder = finetune.run(
        ClassifyRecipe.model_validate(fields), discover(tmp_path), tmp_path / "out", report,
        device=CPU, should_stop=lambda: False,
    )  # fmt: skip

    metrics = bundle.load(folder).metrics
    assert set(metrics) == {"auc_common", "ap_common", "auc_mean", "ap_mean"}
    assert metrics["auc_mean"].value == metrics["auc_common"].value
    assert ("warning", "rare cannot be judged on val: one class only") in report.logs
    assert ("warning", "common has a single example in val: scan v0") in report.logs


class Brightness(torch.nn.Module):
    """Logits from the mean intensity, (B, L)."""

    def __init__(self, signs: list[float]) -> None:
        super().__init__()
        self.signs = signs

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean(dim=(1, 2, 3, 4))[:, None] * torch.tensor(self.signs)


def test_exclusive_labels_are_judged_one_against_the_rest(
    tmp_path: Path, classify_recipe: ClassifyRecipe, report
) -> None:
    rows = [f"s{n},{int(n < 3)},{int(n >= 3)}" for n in range(6)]
    folder = scan_table(tmp_path / "scans", rows, "id,dark,bright")
    for number in range(6):
        level = -600 if number < 3 else -300
        voxels = np.random.default_rng(number).normal(level, 50, (16, 16, 12)).astype(np.int16)
        nifti.write(folder / f"s{number}.nii", voxels, AFFINE)
    fields = {
        **classify_recipe.model_dump(), "crop": "whole", "labels": ("dark", "bright"),
        "exclusive": True,
    }  # fmt: skip
    recipe = ClassifyRecipe.model_validate(fields)
    more = (discover(folder), tmp_path / "cache", report, CPU)

    right = Classification(recipe, Setting(Brightness([-20.0, 20.0]), *more))
    wrong = Classification(recipe, Setting(Brightness([20.0, -20.0]), *more))

    assert right.judge("train")["auc_dark"]["value"] == 1.0
    assert wrong.judge("train")["auc_mean"]["value"] == 0.0
    assert float(right.loss(1)) < float(wrong.loss(1))


def test_segmentation_refuses_a_classifier_by_its_kind() -> None:
    session = SimpleNamespace(manifest=SimpleNamespace(kind="classifier", labels=("nodule",)))

    with pytest.raises(BundleError, match="of kind classifier, not segmenter"):
        segment(session, Volume(np.zeros((8, 8, 8), np.int16), AFFINE))
