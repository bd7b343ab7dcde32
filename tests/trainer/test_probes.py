"""The probes ask what they say they ask, and answer by chance where there is nothing to know."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imaging import nifti
from models.recipe import PretrainRecipe, SplitShares
from trainer import checkpoint, folder, methods
from trainer.__main__ import main
from trainer.data.resident import Resident
from trainer.data.scans import discover
from trainer.probes import examples
from trainer.probes.crops import lively_crops
from trainer.probes.encoders import features_of, load_encoder, random_encoder
from trainer.probes.linear import accuracy, fit, is_right
from trainer.probes.run import answered, owners, run

CPU = torch.device("cpu")


class Corner(nn.Module):
    """An encoder that sees how bright each corner is: it knows which way is up."""

    def forward(self, image: torch.Tensor):
        half = image.shape[2] // 2
        parts = [image[:, :, :half, :half], image[:, :, half:, :half],
                 image[:, :, :half, half:], image[:, :, half:, half:]]  # fmt: skip
        means = torch.cat([part.flatten(2).mean(dim=2) for part in parts], dim=1)
        return type("F", (), {"bottleneck": means[:, :, None, None, None]})


def test_every_image_is_turned_four_times_about_the_third_axis() -> None:
    images = torch.arange(2 * 3 * 3 * 2.0).reshape(2, 1, 3, 3, 2)

    turned, classes = examples.turned(images)

    for at in range(2):
        for turns in range(4):
            slow = np.rot90(images[at, 0].numpy(), turns, (0, 1))
            assert np.array_equal(turned[at + 2 * turns, 0].numpy(), slow)
            assert classes[at + 2 * turns] == turns


def test_a_neighbour_lies_where_its_class_says() -> None:
    """Where pixels are their own coordinates, the mean of a patch tells its place."""
    side, _, depth = examples.area_3d()
    rows = torch.arange(side).float()[:, None, None].expand(side, side, depth)
    images = torch.stack([rows, rows.transpose(0, 1)])[None]

    first, second, classes = examples.neighbours(images, torch.Generator().manual_seed(1))

    apart = (second - first).mean(dim=(2, 3, 4))
    step = torch.tensor(examples.NEIGHBOURS)[classes] * examples.PATCH_3D
    assert first.shape == (8, 2, 16, 16, 16)
    assert (apart - step).abs().max() <= 2 * examples.JITTER
    assert (apart - step).abs().max() > 0  # there is jitter


def test_patches_of_an_image_are_cells_of_a_grid_brought_to_a_size_that_the_network_sees() -> None:
    ramp = torch.arange(224.0)[:, None].expand(224, 224)
    images = torch.stack([ramp, ramp.T, ramp])[None].repeat(2, 1, 1, 1)

    first, second, classes = examples.neighbours(images, torch.Generator().manual_seed(1))

    apart = (second - first).mean(dim=(2, 3))[:, :2]
    step = torch.tensor(examples.NEIGHBOURS)[classes] * 16
    assert first.shape == (16, 3, 96, 96)
    assert (apart - step).abs().max() <= 2 * examples.JITTER + 1e-3
    assert second.min() >= 0 and second.max() < 223.5


def test_the_linear_layer_is_the_minimum_that_gradient_descent_finds() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=random) * torch.tensor([1.0, 5.0, 0.2]) + 4
    y = torch.randint(0, 3, (60,), generator=random)

    weight, bias = fit(x, y, 3)

    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    slow_w = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    slow_b = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        loss = nn.functional.cross_entropy(scaled @ slow_w + slow_b, y)
        loss = loss + 1e-3 * slow_w.square().sum()
        for parameter, slope in zip(
            (slow_w, slow_b), torch.autograd.grad(loss, (slow_w, slow_b)), strict=True
        ):
            parameter.data -= slope
    assert torch.allclose(
        (x.double() @ weight + bias).softmax(1), (scaled @ slow_w + slow_b).softmax(1), atol=1e-4
    )


def test_features_that_do_not_vary_are_ignored() -> None:
    x = torch.cat([torch.randn(40, 2), torch.full((40, 1), 3.0)], dim=1)
    y = (x[:, 0] > 0).long()

    layer = fit(x, y, 2)

    assert torch.isfinite(layer[0]).all() and (layer[0][2] == 0).all()
    assert is_right(x, y, layer).float().mean() > 0.9


def test_the_interval_is_over_patients_and_not_over_examples() -> None:
    """Ten patients, each all right or all wrong: as wide as ten answers, however many examples."""
    right = torch.tensor([True] * 500 + [False] * 500)

    ours = accuracy(right, [str(at // 100) for at in range(1000)])
    single = accuracy(right, [str(at) for at in range(1000)])

    assert ours.value == single.value == 0.5
    assert ours.high - ours.low == pytest.approx(0.6, abs=0.11)  # 2 x 1.96 x sqrt(.25 / 10)
    assert single.high - single.low == pytest.approx(0.062, abs=0.011)


@pytest.mark.parametrize("probe", ["rotation", "position"])
def test_an_encoder_that_sees_corners_knows_more_than_shuffled_answers(probe) -> None:
    random = torch.Generator().manual_seed(3)
    side, _, depth = examples.area_3d()
    rows = torch.linspace(0, 1, side)[:, None, None].expand(side, side, depth)
    noise = 0.1 * torch.randn((24, 2, side, side, depth), generator=random)
    images = torch.stack([rows, rows.transpose(0, 1)])[None] + noise

    features, answers = answered(probe, Corner(), images, torch.device("cpu"), seed=0)
    half = len(answers) // 2
    order = torch.randperm(len(answers), generator=random)
    seen, asked = order[:half], order[half:]
    classes = int(answers.max()) + 1
    known = is_right(features[asked], answers[asked], fit(features[seen], answers[seen], classes))
    mixed = answers[seen][torch.randperm(half, generator=random)]
    chance = is_right(features[asked], answers[asked], fit(features[seen], mixed, classes))

    assert known.float().mean() > 0.85
    assert chance.float().mean() < 2.2 / classes


def test_examples_are_counted_to_their_patients() -> None:
    assert owners("rotation", ["a", "b"]) == ["a", "b"] * 4
    assert owners("position", ["a", "b"]) == ["a"] * 8 + ["b"] * 8


def test_lively_crops_are_of_what_varies() -> None:
    volume = np.zeros((40, 40, 20), np.float16)
    volume[20:] = np.random.default_rng(0).random((20, 40, 20))
    resident = Resident.of([volume], fill=[0], at_least=(8, 8, 8), device=torch.device("cpu"))

    crops = lively_crops(
        resident, torch.zeros(40, dtype=torch.long), (8, 8, 8), torch.Generator().manual_seed(0)
    )

    assert crops.shape == (40, 1, 8, 8, 8)
    assert (crops.flatten(1).std(dim=1) > 0.05).float().mean() > 0.8  # of four in half a volume


@pytest.fixture
def world(tmp_path: Path, pretrain_recipe: PretrainRecipe) -> tuple[Path, Path]:
    """Scans of eight patients, bright on one side, and a checkpoint of a tiny encoder."""
    random = np.random.default_rng(1)
    scans = tmp_path / "scans"
    scans.mkdir()
    slope = np.linspace(-900, 600, 40)[:, None, None] + np.linspace(-300, 300, 40)[None, :, None]
    for number in range(8):
        voxels = slope + random.normal(0, 60, (40, 40, 24))
        nifti.write(scans / f"p{number}.nii", voxels.astype(np.int16), np.diag([2.0, 2, 2, 1]))
    method = methods.make(pretrain_recipe)
    state = {
        "recipe": pretrain_recipe.model_dump_json(), "recipe_digest": pretrain_recipe.digest(),
        "method": method.state_dict(),
    }  # fmt: skip
    return scans, checkpoint.save(tmp_path / folder.CHECKPOINTS, 7, state)


def test_a_probe_prints_accuracy_interval_and_controls(world, tmp_path, capsys) -> None:
    scans, saved = world

    arguments = ["probe", "rotation", str(saved), "--scans", str(scans)]
    assert main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["num_classes"] == 4 and found["chance"] == 0.25
    assert found["num_patients"] == {"fit": 6, "test": 2}
    assert found["num_examples"] == {"fit": 6 * 8 * 4, "test": 2 * 8 * 4}
    low, high = found["interval_95"]
    assert 0 <= low <= found["accuracy"] <= high <= 1
    assert set(found["controls"]) == {"random_encoder", "shuffled_labels"}
    assert found["controls"]["shuffled_labels"]["accuracy"] < 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("probe", ["rotation", "position"])
def test_the_same_seed_gives_the_same_result_and_another_does_not(
    probe, world, tmp_path, report
) -> None:
    """Whatever torch's own generator has drawn before, and from a cache that is new."""
    folder_of_scans, saved = world
    for number in range(4, 8):
        (folder_of_scans / f"p{number}.nii").unlink()
    scans = discover(folder_of_scans, shares=SplitShares(train=0.5, val=0, test=0.5))

    def probed(seed: int, cache: str) -> str:
        torch.rand(seed + len(cache))
        found = run(probe, saved, scans, tmp_path / cache, report, device=CPU, seed=seed)
        del found["seed"]
        return json.dumps(found)

    first = probed(1, "a")

    assert probed(1, "new") == first
    assert probed(2, "a") != first


def test_an_encoder_comes_out_of_a_checkpoint_as_it_was(world) -> None:
    encoder, recipe, name = load_encoder(world[1])
    images = torch.randn(2, 1, 16, 16, 16)

    state = checkpoint.load(world[1])["method"]
    method = methods.make(recipe)
    method.load_state_dict(state)
    expected = features_of(method.student.encoder, images, torch.device("cpu"))

    assert torch.equal(features_of(encoder, images, torch.device("cpu")), expected)
    assert "step 7" in name
    other = features_of(random_encoder(recipe, seed=1), images, torch.device("cpu"))
    assert not torch.allclose(other, expected)
    assert method.training and method.student.encoder.training


def test_what_is_no_encoder_and_too_few_patients_are_refused(world, tmp_path, capsys) -> None:
    scans, saved = world

    assert main(["probe", "position", str(tmp_path / "absent"), "--scans", str(scans)]) == 64
    assert "bad_encoder" in capsys.readouterr().err
    for number in range(1, 8):
        (scans / f"p{number}.nii").unlink()
    assert main(["probe", "position", str(saved), "--scans", str(scans)]) == 64
    assert "others to test on" in capsys.readouterr().err
