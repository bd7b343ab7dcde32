"""Models Genesis, MAE, 3D-CPC, Rubik's Cube++, Semantic Genesis: targets and losses."""

import copy
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from PIL import Image

from models.recipe import PretrainRecipe, PretrainRecipe2d
from trainer import checkpoint, launch, methods, pretrain
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.data.scans import discover
from trainer.errors import DataError, Preempted
from trainer.methods import lookalikes, patterns
from trainer.methods.clean_norm import NUM_BATCHES, recalibrate
from trainer.methods.pairs import make_crops
from trainer.methods.semantic_genesis import SemanticGenesis

CPU = torch.device("cpu")
CROPS = {"crop_sizes": [[16, 16, 16]], "border": [0, 0, 0], "max_tissue": None}
OF_METHOD: dict[str, dict[str, Any]] = {
    "models_genesis": {},
    "mae": {"block_size": 8},
    "cpc3d": {
        "patch_size": 8, "code_size": 16, "context_size": 8, "context_rows": 1, "future_rows": 1,
    },
    "rubiks_cube": {"side": 8, "critic_width": 2, "critic_steps": 2},
    "semantic_genesis": {
        "num_classes": 3, "neighbours": 2, "head_width": 8, "jitter": 2, "elastic_alpha": 20.0,
        "elastic_sigma": 2.0, "autoencoder_size": [16, 16, 16], "autoencoder_steps": 3,
    },
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", OF_METHOD)


def recipe_of(name: str, method: dict[str, Any] | None = None, **more: Any) -> PretrainRecipe:
    crops = {"input_size": [16, 16, 16], **CROPS, **more.pop("crops", {})}
    if name == "semantic_genesis":
        crops["crop_sizes"] = [[16, 16, 16], [12, 12, 16], [20, 20, 16]]
    return PretrainRecipe.model_validate(
        {
            "network": {"base_width": 2},
            "preprocessing": {"spacing_mm": [2, 2, 2]},
            "crops": crops,
            "method": {"name": name, **OF_METHOD[name], **(method or {})},
            "num_steps": 6,
            "batch_size": 4,
            "checkpoint_every": 2,
            "log_every": 1,
            **more,
        }
    )


def world(recipe: PretrainRecipe) -> tuple[Any, Resident, PairSampler]:
    """The method, two volumes of noise, and where crops are cut in them."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    volumes = [random.random((32, 32, 24)).astype(np.float16) for _ in range(2)]
    resident = Resident.of(volumes, fill=[0, 0], at_least=(24, 24, 16), device=CPU)
    sampler = PairSampler(recipe.crops, resident.shapes)
    return methods.make(recipe), resident, sampler


class Quiet:
    """A report that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def ready(recipe: PretrainRecipe) -> tuple[Any, Resident, PairSampler]:
    method, resident, sampler = world(recipe)
    method.prepare(resident, sampler, Quiet(), lambda: False)
    return method, resident, sampler


def tensors_of(views: Any) -> list[torch.Tensor]:
    found = []
    for name in views.__slots__:
        value = getattr(views, name)
        found += [value] if isinstance(value, torch.Tensor) else list(value)
    return found


@EVERY
def test_views_follow_from_seed_and_step_alone(name: str) -> None:
    method, resident, sampler = ready(recipe_of(name))

    first = tensors_of(method.make_views(resident, sampler, 2))
    method.make_views(resident, sampler, 3)
    again = tensors_of(method.make_views(resident, sampler, 2))
    other = tensors_of(method.make_views(resident, sampler, 3))

    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@EVERY
def test_a_loss_moves_every_trained_weight(name: str) -> None:
    method, resident, sampler = ready(recipe_of(name))

    method.losses(method.make_views(resident, sampler, 1)).total.backward()

    without = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_models_genesis_restores_the_crop_that_was_changed() -> None:
    method, resident, sampler = world(recipe_of("models_genesis"))
    views = method.make_views(resident, sampler, 1)

    loss = method.losses(views).total

    expected = ((torch.sigmoid(method.student(views.spoiled)) - views.clean) ** 2).mean()
    torch.testing.assert_close(loss, expected)
    assert all(not torch.equal(a, b) for a, b in zip(views.spoiled, views.clean, strict=True))


def test_models_genesis_without_any_change_sees_what_it_restores() -> None:
    nothing = {"shuffle_probability": 0.0, "curve_probability": 0.0, "paint_probability": 0.0}
    method, resident, sampler = world(recipe_of("models_genesis", nothing))

    views = method.make_views(resident, sampler, 1)

    torch.testing.assert_close(views.spoiled, views.clean)


def test_z_scores_have_no_sigmoid_and_curves_span_each_crop_s_range() -> None:
    preprocessing = {"spacing_mm": [2, 2, 2], "intensity": {"kind": "zscore"}}
    unpainted = {"paint_probability": 0.0}
    method, resident, sampler = world(
        recipe_of("models_genesis", unpainted, preprocessing=preprocessing)
    )
    wide = Resident(resident.flat * 6 - 3, resident.offsets, resident.shapes, resident.margins, CPU)
    views = method.make_views(wide, sampler, 1)

    loss = method.losses(views).total

    torch.testing.assert_close(loss, F.mse_loss(method.student(views.spoiled), views.clean))
    assert views.spoiled.amin() < -1
    assert torch.all(
        views.spoiled.flatten(1).amin(dim=1) >= views.clean.flatten(1).amin(dim=1) - 1e-4
    )


def images() -> ResidentImages:
    random = np.random.default_rng(0)
    squares = [random.integers(0, 256, (64, 64), dtype=np.uint8) for _ in range(6)]
    return ResidentImages.of(squares, device=CPU)


def recipe_2d(**method: Any) -> PretrainRecipe2d:
    return PretrainRecipe2d.model_validate(
        {
            "network": {"kind": "resnet18_unet2d", "width": 8},
            "preprocessing": {"size": 64},
            "crops": {"input_size": 32},
            "method": {"name": "models_genesis", **method},
            "num_steps": 6,
            "batch_size": 4,
        }
    )


def test_models_genesis_in_2d_restores_normalised_images_and_paints_all_colours_alike() -> None:
    recipe = recipe_2d(paint_probability=1.0, shuffle_windows=50)
    method = methods.make(recipe)

    views = method.make_views(images(), None, 1)
    loss = method.losses(views).total

    assert views.spoiled.shape == views.clean.shape == (4, 3, 32, 32)
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in (recipe.preprocessing.normalisation.mean, recipe.preprocessing.normalisation.std)
    )
    red, green, blue = (views.spoiled * std + mean).unbind(dim=1)
    torch.testing.assert_close(red, green, atol=1e-5, rtol=0)
    torch.testing.assert_close(red, blue, atol=1e-5, rtol=0)
    assert all(not torch.equal(a, b) for a, b in zip(views.spoiled, views.clean, strict=True))
    torch.testing.assert_close(loss, F.mse_loss(method.student(views.spoiled), views.clean))


def test_models_genesis_in_2d_without_any_change_sees_the_image_that_rotnet_sees() -> None:
    recipe = recipe_2d(shuffle_probability=0.0, curve_probability=0.0, paint_probability=0.0)

    views = methods.make(recipe).make_views(images(), None, 1)

    torch.testing.assert_close(views.spoiled, views.clean)
    torch.testing.assert_close(views.clean, make_crops(recipe, images(), None, 1)[0])


@pytest.mark.parametrize("name", ["models_genesis", pytest.param("mae", marks=pytest.mark.nightly)])
def test_clean_input_is_served_with_statistics_of_clean_input(name: str) -> None:
    """What a norm gives before its affine has mean 0 and deviation 1; as trained it has not."""
    recipe = recipe_of(name, batch_size=8, num_steps=30, checkpoint_every=30, log_every=30)
    method, resident, sampler = world(recipe)
    descent = method.descent(CPU)
    for step in range(1, recipe.num_steps + 1):
        descent.step(method.make_views(resident, sampler, step), step)
    weights = {key: value.clone() for key, value in method.named_parameters()}
    as_trained = normalised_inputs(method, resident, sampler)

    recalibrate(method, resident, sampler, CPU)

    anew = normalised_inputs(method, resident, sampler)
    assert np.abs(anew[:, 0]).max() < 0.1 and np.abs(anew[:, 1] - 1).max() < 0.1
    assert np.abs(as_trained - [0, 1]).max() > 0.3  # the control
    for key, value in method.named_parameters():
        assert torch.equal(value, weights[key])
    assert method.training and method.student.encoder.training
    again = copy.deepcopy(method)
    recalibrate(again, resident, sampler, CPU)
    for key, value in again.state_dict().items():
        if "num_batches_tracked" not in key:
            assert torch.equal(value, method.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "more"), [("mae", NUM_BATCHES), ("models_genesis", NUM_BATCHES), ("cpc3d", 0)]
)
def test_a_run_ends_with_clean_statistics_where_its_method_saw_no_clean_crop(
    name: str, more: int, scan_folder: Path, tmp_path: Path, without_onnx: None
) -> None:
    """Norms count their batches: those of the steps, and in the encoder the clean ones."""
    recipe = recipe_of(name, num_steps=2)

    pretrain.run(
        recipe, discover(scan_folder), tmp_path, Quiet(), device=CPU, should_stop=lambda: False
    )

    state = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    counts = {key: int(n) for key, n in state["method"].items() if key.endswith("_tracked")}
    assert {n for key, n in counts.items() if ".encoder." in key} == {recipe.num_steps + more}
    others = {n for key, n in counts.items() if ".encoder." not in key}
    assert others <= {recipe.num_steps}


def normalised_inputs(method: Any, resident: Resident, sampler: PairSampler) -> np.ndarray:
    """Mean and deviation of every norm's input, served with its running statistics, (norms, 2)."""
    encoder = copy.deepcopy(method.student.encoder).eval()
    found = []

    def look(norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        shape = (1, -1, 1, 1, 1)
        centred = inputs[0] - norm.running_mean.view(shape)
        scaled = centred / (norm.running_var + norm.eps).sqrt().view(shape)
        found.append((float(scaled.mean()), float(scaled.square().mean().sqrt())))

    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.register_forward_pre_hook(look)
    crops = [make_crops(method.recipe, resident, sampler, step)[0] for step in range(100, 108)]
    with torch.no_grad():
        encoder(torch.cat(crops))
    return np.array(found)


def test_mae_sees_nothing_of_what_it_is_asked_for() -> None:
    method, resident, sampler = world(recipe_of("mae"))
    views = method.make_views(resident, sampler, 1)
    seen: list[torch.Tensor] = []
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    loss = method.losses(views).total

    assert views.is_hidden.float().mean() == 0.75
    assert seen[0][views.is_hidden].abs().max() == 0
    assert torch.equal(seen[0][~views.is_hidden], views.clean[~views.is_hidden])
    squared = (torch.sigmoid(method.student(seen[0])) - views.clean) ** 2
    torch.testing.assert_close(loss, squared[views.is_hidden].mean())


def test_mae_in_2d_hides_blocks_of_all_colours() -> None:
    method = methods.make(recipe_2d(name="mae", block_size=8))
    views = method.make_views(images(), None, 1)

    loss = method.losses(views).total

    assert views.is_hidden.shape == (4, 1, 32, 32)
    assert views.is_hidden.float().mean() == 0.75
    hidden = views.is_hidden.expand(-1, 3, -1, -1)
    squared = (method.student(views.clean.masked_fill(hidden, 0.0)) - views.clean) ** 2
    torch.testing.assert_close(loss, squared[hidden].mean())


@pytest.mark.parametrize("contrast", ["info_nce", "pairs"])
def test_cpc_predicts_from_the_first_rows_and_not_from_those_to_come(contrast: str) -> None:
    method, resident, sampler = world(recipe_of("cpc3d", {"contrast": contrast}))
    views = method.make_views(resident, sampler, 1)
    assert views.voxels.shape == (4 * 8, 1, 8, 8, 8)
    method.student.eval()  # batch statistics would carry one patch's voxels to another

    predicted, truth = method.heads(method.student.encoder(views.voxels).bottleneck)
    later = views.voxels.reshape(4, 2, 4, 1, 8, 8, 8).clone()
    later[:, 1] = 0
    again, changed = method.heads(method.student.encoder(later.flatten(0, 2)).bottleneck)

    assert predicted.shape == truth.shape == (1, 16, 16)
    torch.testing.assert_close(again, predicted)
    assert not torch.allclose(changed, truth)


@pytest.mark.parametrize("turned", ["subvolumes", "slabs"])
def test_the_cube_has_the_crop_s_voxels_in_other_places(turned: str) -> None:
    method, resident, sampler = world(recipe_of("rubiks_cube", {"turned": turned}))

    views = method.make_views(resident, sampler, 1)

    assert len(views.clean) == len(views.disarranged) == len(views.shares) == 3
    for clean, disarranged in zip(views.clean, views.disarranged, strict=True):
        assert not torch.equal(clean, disarranged)
        assert torch.equal(clean.flatten(1).sort()[0], disarranged.flatten(1).sort()[0])
    assert not torch.equal(views.clean[0], views.clean[1])


def test_the_critic_moves_in_its_turns_and_the_network_in_its_own() -> None:
    method, resident, sampler = world(recipe_of("rubiks_cube"))
    descent = method.descent(CPU)
    views = method.make_views(resident, sampler, 1)
    before = {key: value.clone() for key, value in method.named_parameters()}

    loss = method.critic_loss(views, 0)
    loss.backward()
    assert all(p.grad is None for p in method.student.parameters())
    method.zero_grad()
    losses = descent.step(views, 1)

    moved = {key for key, value in method.named_parameters() if not torch.equal(value, before[key])}
    assert {key.partition(".")[0] for key in moved} == {"student", "critic"}
    parts = losses.named()
    torch.testing.assert_close(parts["loss"], 100 * parts["reconstruction"] + parts["adversarial"])


def test_patterns_are_one_place_in_scans_that_look_alike() -> None:
    recipe = recipe_of("semantic_genesis", {"version_share": 0.0})
    method, resident, sampler = ready(recipe)

    views = method.make_views(resident, sampler, 1)

    volumes = list(resident.on_host())
    for clean, label in zip(views.clean, views.label, strict=True):
        at = [
            round(float(share) * (n - 16))
            for share, n in zip(method.share[label], volumes[0].shape, strict=True)
        ]
        box = tuple(slice(start, start + 16) for start in at)
        shown = [torch.from_numpy(volumes[v][box]).float() for v in method.neighbours[label]]
        assert any(torch.allclose(clean[0], crop, atol=1e-3) for crop in shown)
    loss = method.losses(views)
    parts = loss.named()
    torch.testing.assert_close(parts["loss"], parts["restoration"] + 0.01 * parts["classification"])


def test_versions_of_a_pattern_stay_inside_their_scan_and_near_its_place() -> None:
    recipe = recipe_of("semantic_genesis", {"version_share": 1.0}, batch_size=64)
    shapes = torch.tensor([[32, 32, 24], [40, 32, 20]])
    share = torch.rand(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    neighbours = torch.tensor([[0, 1], [1, 0], [0, 1]])
    sizes = torch.tensor(recipe.crops.crop_sizes)

    chosen = patterns.choose(recipe, 2, 1)
    boxes = patterns.place_crops(chosen, share, neighbours, shapes, sizes)

    extent = sizes[boxes.size[:, 0]]
    assert set(boxes.size[:, 0].tolist()) == {1, 2}
    assert (boxes.start[:, 0] >= 0).all()
    assert (boxes.start[:, 0] + extent <= shapes[boxes.volume]).all()
    middle = share[chosen.label] * (shapes[boxes.volume] - 16) + 8
    away = (boxes.start[:, 0] + extent / 2 - middle).abs()
    assert away.max() <= 2 + 4 + 1  # the jitter, what a face may push, rounding
    assert torch.equal(boxes.volume, neighbours[chosen.label, chosen.neighbour])


def test_the_nearest_scans_are_those_of_the_least_distance() -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    reference = torch.tensor([2, 6])

    found = lookalikes.nearest(features, reference, 4)

    for row, center in zip(found, reference, strict=True):
        distance = [float((features[v] - features[center]).norm()) for v in range(7)]
        assert row.tolist() == sorted(range(7), key=distance.__getitem__)[:4]
        assert row[0] == center


def test_more_classes_than_there_is_room_for_are_refused() -> None:
    recipe = recipe_of("semantic_genesis", {"num_classes": 9, "least_distance": 1000.0})
    method, resident, sampler = world(recipe)

    with pytest.raises(DataError, match="room for 1 classes"):
        method.prepare(resident, sampler, Quiet(), lambda: False)


def test_blocks_that_do_not_fill_an_image_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size 5 divides not every extent"):
        recipe_2d(name="mae", block_size=5)


@pytest.mark.parametrize(
    ("name", "method", "crops", "expected"),
    [
        ("mae", {"block_size": 6}, {}, "block_size 6 divides not every extent"),
        ("rubiks_cube", {"side": 5}, {}, "side 5 divides not every extent"),
        ("cpc3d", {"patch_size": 16}, {}, "need 2 rows of patches along I, a crop has 1"),
        ("semantic_genesis", {"autoencoder_size": [12, 16, 16]}, {}, "multiples of 8"),
    ],
)
def test_what_does_not_fit_the_crops_is_refused(name, method, crops, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        recipe_of(name, method, crops=crops)


def test_classes_are_found_once_and_a_run_that_died_before_its_first_step_has_them(
    tmp_path: Path, scan_folder: Path, monkeypatch: pytest.MonkeyPatch, report
) -> None:
    recipe = recipe_of("semantic_genesis", {"least_distance": 1.0})
    again: list[str] = []

    def pretrain_once() -> None:
        pretrain.run(
            recipe, discover(scan_folder), tmp_path, report,
            device=CPU, should_stop=lambda: True, cache=scan_folder.parent / "cache",
        )  # fmt: skip

    def dies(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(SemanticGenesis, "make_views", dies)
        pretrain_once()
    first = checkpoint.load_newest(tmp_path / "checkpoints")
    monkeypatch.setattr(lookalikes, "describe", lambda *_: again.append("described"))
    with pytest.raises(Preempted):
        pretrain_once()
    second = checkpoint.load_newest(tmp_path / "checkpoints")

    assert first is not None and second is not None
    assert (first["step"], second["step"]) == (0, 1)
    assert again == []
    for name in ("share", "neighbours"):
        assert torch.equal(first["method"][name], second["method"][name])
    assert (second["method"]["neighbours"] >= 0).all()


@pytest.mark.parametrize("name", ["rubiks_cube", "semantic_genesis"])
def test_methods_of_one_process_refuse_two(name: str) -> None:
    with pytest.raises(DataError, match="2 processes cannot share"):
        launch.check(recipe_of(name), 2)
    launch.check(recipe_of(name), 1)
    launch.check(recipe_of("mae"), 2)


FILMS = Path(__file__).resolve().parents[2] / "../shared/data/cxr_nih1000_64/trainval.zip"


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ({"name": "models_genesis", "shuffle_windows": 50}, 0.1),
        ({"name": "mae", "block_size": 8}, 0.003),
    ],
)
def test_a_short_run_in_2d_lowers_the_loss_on_real_films(
    method: dict[str, Any], rate: float
) -> None:
    if not FILMS.is_file():
        pytest.skip("../shared/data is absent")
    with zipfile.ZipFile(FILMS) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))[:32]
        squares = [np.asarray(Image.open(archive.open(name)).convert("L")) for name in names]
    films = ResidentImages.of([square.copy() for square in squares], device=CPU)
    recipe = recipe_2d(**method).model_copy(update={"num_steps": 30, "learning_rate": rate})
    torch.manual_seed(0)
    trained = methods.make(recipe)

    def loss() -> float:
        """Of batches that the run does not see, on a copy."""
        judged = copy.deepcopy(trained)
        with torch.no_grad():
            batches = [trained.make_views(films, None, 1000 + n) for n in range(4)]
            return float(np.mean([float(judged.losses(batch).total) for batch in batches]))

    before, descent = loss(), trained.descent(CPU)
    for step in range(1, recipe.num_steps + 1):
        descent.step(trained.make_views(films, None, step), step)

    assert loss() < before
