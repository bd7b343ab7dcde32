"""A pretraining says how its features are and calls out a collapse, and is not touched by that."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.recipe import PretrainRecipe, PretrainRecipe2d
from trainer import checkpoint, folder, health, methods, pretrain
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.scans import discover
from trainer.errors import CollapsedError
from trainer.health import Watch, effective_rank, feature_std
from trainer.previews import draw
from trainer.probes.crops import lively_crops

CPU = torch.device("cpu")


def recipe_with(recipe: PretrainRecipe, **health: object) -> PretrainRecipe:
    fields = recipe.model_dump(mode="json")
    return PretrainRecipe.model_validate(fields | {"health": {"num_crops": 8, **health}})


def test_opposite_unit_vectors_along_every_axis_are_spread_evenly() -> None:
    axes = torch.cat([torch.eye(6), -torch.eye(6)])

    assert feature_std(3 * axes) == pytest.approx(1.0)
    assert effective_rank(3 * axes) == pytest.approx(6.0)


def test_random_directions_have_the_deviation_and_rank_that_theory_gives() -> None:
    random = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))

    assert feature_std(random) == pytest.approx(1.0, abs=0.02)
    assert effective_rank(random) == pytest.approx(8.0, abs=0.05)


def test_effective_rank_is_the_entropy_of_the_singular_values() -> None:
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)).double()
    x = (x - x.mean(dim=0)) * torch.tensor([1.0, 2.0, 3.0, 0.1, 0.01])

    values = np.linalg.svd((x - x.mean(dim=0)).numpy(), compute_uv=False)
    entropy = 0.0
    for value in values / values.sum():
        entropy -= value * np.log(value)

    assert effective_rank(x) == pytest.approx(np.exp(entropy))


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_a_constant_has_neither_deviation_nor_rank_and_a_line_has_rank_one(shift: float) -> None:
    constant = torch.full((16, 4), 0.3) + shift
    line = torch.linspace(0, 1, 16)[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0]) + shift

    assert feature_std(constant) == pytest.approx(0.0, abs=1e-6)
    assert effective_rank(constant) == 0.0
    assert effective_rank(line) == pytest.approx(1.0, abs=0.02)


@pytest.fixture
def volumes() -> Resident:
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 32)[:, None, None]
    made = [
        (random.random() * ramp + 0.3 * random.random((32, 32, 24))).astype(np.float16)
        for _ in range(4)
    ]
    return Resident.of(made, fill=[0] * 4, at_least=(24, 24, 16), device=CPU)


def test_a_healthy_encoder_raises_no_alarm_and_a_constant_one_does(
    volumes, pretrain_recipe, report, tmp_path
) -> None:
    recipe = recipe_with(pretrain_recipe)
    torch.manual_seed(0)
    method = methods.make(recipe)
    watch = Watch(volumes, recipe, tmp_path, report, CPU)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # until the running statistics of batch norm are those of the data
        for _ in range(60):
            which = torch.randint(0, 4, (8,), generator=random)
            method.student.encoder(lively_crops(volumes, which, (16, 16, 16), random))

    healthy = watch.look(method, 500)
    before = {name: value.clone() for name, value in method.student.state_dict().items()}
    with torch.no_grad():  # its last norm says the same of everything
        norm = [m for m in method.student.encoder.modules() if isinstance(m, torch.nn.BatchNorm3d)]
        norm[-1].weight.zero_()
        norm[-1].bias.fill_(0.7)
    collapsed = [watch.look(method, step) for step in (1000, 1500)]
    method.student.load_state_dict(before)
    again = watch.look(method, 2000)

    assert (healthy, collapsed, again) == (False, [True, True], False)
    warnings = [text for level, text in report.logs if level == "warning"]
    assert len(warnings) == 1 and "collapsed by step 1000" in warnings[0]
    steps = dict(report.metrics)
    assert [steps[at]["is_collapsed"] for at in (500, 1000, 1500, 2000)] == [0, 1, 1, 0]
    assert steps[1000]["effective_rank"] == 0.0 and steps[1000]["feature_std"] < 1e-6
    assert steps[500]["effective_rank"] > 1.05 and steps[500]["feature_std"] > 0.03
    assert 0.0 <= steps[500]["probe_rotation"] <= 1.0
    assert steps[1000]["probe_rotation"] == 0.25  # one answer for all four


def test_looking_changes_nothing_of_the_method(volumes, pretrain_recipe, report, tmp_path) -> None:
    recipe = recipe_with(pretrain_recipe)
    method = methods.make(recipe)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    random = torch.get_rng_state()

    Watch(volumes, recipe, tmp_path, report, CPU).look(method, 1)

    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert method.training and method.student.training and method.student.encoder.training


def test_a_watched_run_is_bit_for_bit_the_unwatched_one_and_leaves_pictures(
    scan_folder, pretrain_recipe, report, tmp_path, without_onnx
) -> None:
    fields = pretrain_recipe.model_dump(mode="json") | {"num_steps": 4, "log_every": 4}
    plain = PretrainRecipe.model_validate(fields)
    scans, states = discover(scan_folder), []
    for name, recipe in (
        ("watched", recipe_with(plain, every=2)), ("plain", recipe_with(plain, every=0)),
    ):  # fmt: skip
        pretrain.run(recipe, scans, tmp_path / name, report, device=CPU, should_stop=lambda: False)
        states.append(checkpoint.load_newest(tmp_path / name / folder.CHECKPOINTS))

    watched, unwatched = states
    assert watched is not None and unwatched is not None
    for name, value in watched["method"].items():
        assert torch.equal(value, unwatched["method"][name]), name
    measured = [step for step, values in report.metrics if "effective_rank" in values]
    assert measured == [2, 4]
    pictures = sorted(path.name for path in (tmp_path / "watched" / "previews").iterdir())
    assert pictures == ["step-000000002.png", "step-000000004.png"]
    assert not (tmp_path / "plain" / "previews").exists()


def test_a_collapse_ends_the_run_only_where_the_recipe_says_so(
    scan_folder, pretrain_recipe, report, tmp_path, without_onnx, monkeypatch
) -> None:
    """With limits that no features reach, every run has collapsed."""
    monkeypatch.setattr(health, "WARM_STEPS", 1)
    fields = pretrain_recipe.model_dump(mode="json") | {"num_steps": 2}
    plain, scans = PretrainRecipe.model_validate(fields), discover(scan_folder)
    limits = {"every": 1, "min_rank": 1e6, "previews": False}

    def run(out: Path, **more: object) -> None:
        recipe = recipe_with(plain, **limits, **more)
        pretrain.run(recipe, scans, out, report, device=CPU, should_stop=lambda: False)

    with pytest.raises(CollapsedError, match="collapsed by step 1"):
        run(tmp_path / "stops", stop_on_collapse=True)
    run(tmp_path / "goes-on")

    assert (tmp_path / "goes-on" / folder.BUNDLE).is_dir()
    assert len([1 for level, _ in report.logs if level == "warning"]) >= 2


def test_a_recipe_without_health_keeps_the_name_it_had(pretrain_recipe) -> None:
    assert recipe_with(pretrain_recipe, every=7).digest() != pretrain_recipe.digest()
    whole = PretrainRecipe.model_validate(pretrain_recipe.model_dump(mode="json"))
    assert whole.digest() == pretrain_recipe.digest()
    assert "health" in whole.ADDED


def test_images_are_watched_too(report, tmp_path) -> None:
    recipe = PretrainRecipe2d.model_validate(
        {
            "network": {"kind": "resnet18_unet2d", "width": 8},
            "preprocessing": {"size": 32},
            "method": {"embedding_size": 8, "queue_size": 40},
            "batch_size": 4,
            "health": {"num_crops": 8},
        }
    )
    squares = [
        np.random.default_rng(n).integers(0, 255, (32, 32), dtype=np.uint8) for n in range(5)
    ]
    images = ResidentImages.of(squares, device=CPU)

    Watch(images, recipe, tmp_path, report, CPU).look(methods.make(recipe), 3)

    assert set(report.metrics[0][1]) == {
        "feature_std", "effective_rank", "probe_rotation", "is_collapsed",
    }  # fmt: skip
    assert (tmp_path / "previews" / "step-000000003.png").is_file()


def test_a_preview_shows_input_above_output_with_the_patient_facing_us(tmp_path: Path) -> None:
    """A bright voxel at high I (the patient's right) and high J (anterior): top left."""
    volume = torch.zeros(1, 1, 100, 100, 3)
    volume[0, 0, 90, 95, 1] = 1.0

    draw(volume, torch.zeros_like(volume), tmp_path / "a" / "p.png")

    picture = np.asarray(Image.open(tmp_path / "a" / "p.png"))
    assert picture.shape == (208, 104)
    assert [tuple(place) for place in np.argwhere(picture == 255)] == [(2 + 4, 2 + 9)]
