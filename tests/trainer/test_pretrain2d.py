"""PCRL in 2D: its step, a run that was interrupted, its bundle, and a classifier from it."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import load_file

from imaging import nifti
from imaging.volume import Volume
from models import bundle, predict
from models.bundle import BundleError
from models.recipe import (
    AnyPretrain,
    ClassifyRecipe2d,
    FinetuneRecipe,
    PretrainRecipe2d,
    Recipe,
)
from models.session import open_session
from trainer import checkpoint, export, finetune, pretrain, transfer
from trainer.__main__ import read_recipe
from trainer.build import build
from trainer.data import augment, images2d
from trainer.data.images2d import ResidentImages
from trainer.data.scans import discover
from trainer.errors import DataError, Preempted
from trainer.methods import pairs as drawing
from trainer.methods import views as batches
from trainer.methods.pcrl import Pcrl
from trainer.methods.views import Views
from trainer.report import Human

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FIELDS: dict[str, Any] = {
    "network": {"kind": "resnet18_unet2d", "width": 8},
    "preprocessing": {"size": 64},
    "crops": {"input_size": 32, "cutout_size": 5},
    "method": {"embedding_size": 8, "queue_size": 40, "outer_rank": 4},
    "num_steps": 6,
    "batch_size": 4,
    "learning_rate": 0.01,
    "checkpoint_every": 2,
    "log_every": 1,
}
CLASSIFY: dict[str, Any] = {
    "labels": ["bright"],
    "network": {"kind": "resnet18_unet2d", "width": 8},
    "preprocessing": {"size": 64},
    "crops": {"input_size": 32, "crop_area": [0.8, 1.0]},
    "num_steps": 4,
    "batch_size": 4,
    "learning_rate": 0.001,
    "validate_every": 2,
    "log_every": 1,
}


def write_films(folder: Path, names: str, first_seed: int = 0) -> None:
    """Noise of 70 x 60 pixels, brighter in its middle for every second name."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, name in enumerate(names):
        pixels = np.random.default_rng(first_seed + at).normal(90, 20, (70, 60))
        pixels[20:50, 15:45] += 60 * (at % 2)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split by subfolders, with a table: every second film is bright."""
    folder = tmp_path_factory.mktemp("films")
    write_films(folder / "train", "abcdef")
    write_films(folder / "val", "ghij", 20)
    lines = [f"{name},{at % 2}" for names in ("abcdef", "ghij") for at, name in enumerate(names)]
    (folder / "labels.csv").write_text("\n".join(["id,bright", *lines]))
    return folder


@pytest.fixture
def recipe() -> PretrainRecipe2d:
    return PretrainRecipe2d.model_validate(FIELDS)


def world(**method: Any) -> tuple[Pcrl, ResidentImages]:
    fields = {**FIELDS, "method": {**FIELDS["method"], **method}}
    torch.manual_seed(0)
    pcrl = Pcrl(PretrainRecipe2d.model_validate(fields)).train()
    random = np.random.default_rng(0)
    squares = [random.integers(0, 256, (64, 64), dtype=np.uint8) for _ in range(6)]
    return pcrl, ResidentImages.of(squares, device=CPU)


def views_of(pcrl: Pcrl, images: ResidentImages, step: int = 1) -> Views:
    return pcrl.make_views(images, None, step)


@pytest.mark.parametrize("preset", ["paper", "official", "recommended"])
def test_no_gradient_reaches_the_momentum_networks_and_all_else_gets_one(preset: str) -> None:
    fields = {"outer_rank": 4} if preset == "paper" else {"outer_rank": None}
    pcrl, images = world(preset=preset, **fields)

    pcrl.losses(views_of(pcrl, images)).total.backward()

    without = {name for name, value in pcrl.named_parameters() if value.grad is None}
    momentum = {name for name, _ in pcrl.named_parameters() if name.startswith("momentum_")}
    assert without == momentum and len(momentum) > 30


def test_the_momentum_encoder_moves_by_the_average() -> None:
    pcrl, images = world()
    before = copy.deepcopy(pcrl.momentum_encoder).state_dict()
    losses = pcrl.losses(views_of(pcrl, images))
    with torch.no_grad():
        for parameter in pcrl.student.encoder.parameters():
            parameter.add_(1.0)

    pcrl.update(losses)

    ours = pcrl.student.encoder.state_dict()
    for name, value in pcrl.momentum_encoder.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.99 * before[name] + 0.01 * ours[name])
            assert not torch.equal(value, before[name])


@pytest.mark.parametrize(("lam", "same"), [(1.0, "o"), (0.0, "m")])
def test_an_unmixed_hybrid_is_the_encoder_that_it_is(lam: float, same: str) -> None:
    pcrl, images = world()
    views = views_of(pcrl, images)
    indicators = views.indicators.clone()
    indicators[2] = indicators[0 if same == "o" else 1]

    def losses(mix: float) -> dict[str, torch.Tensor]:
        changed = dataclasses.replace(views, indicators=indicators, mix=torch.tensor(mix))
        return pcrl.losses(changed).reconstruction

    torch.testing.assert_close(losses(lam)["h"], losses(lam)[same])
    assert not torch.isclose(losses(0.5)["h"], losses(0.5)[same])


def test_the_target_does_not_see_the_corruption(monkeypatch: pytest.MonkeyPatch) -> None:
    pcrl, images = world()
    views = views_of(pcrl, images)
    real = drawing.generator

    def other(seed: int, step: int, purpose: str, device: torch.device = CPU) -> torch.Generator:
        moved = 99 if purpose in ("painting", "noise") else step
        return real(seed, moved, purpose, device)

    monkeypatch.setattr(drawing, "generator", other)
    again = views_of(pcrl, images)

    assert torch.equal(again.clean_o, views.clean_o) and torch.equal(again.clean_m, views.clean_m)
    assert not torch.equal(again.input_o, views.input_o)
    assert not torch.equal(again.input_m, views.input_m)


def test_the_target_is_normalised_as_the_input_and_the_output_has_no_activation() -> None:
    pcrl, images = world()
    views = views_of(pcrl, images)
    plain = PretrainRecipe2d.model_validate(
        {**FIELDS, "preprocessing": {"size": 64, "normalisation": None}}
    )
    unit = batches.make_views(plain, images, None, 1)

    expected = images2d.as_channels(unit.clean_o[:, :1], pcrl.recipe.preprocessing.normalisation)
    torch.testing.assert_close(views.clean_o, expected)
    assert unit.clean_o.min() >= 0 and unit.clean_o.max() <= 1 and views.clean_o.min() < -0.5
    with torch.no_grad():
        pcrl.student.out.bias.fill_(-7.0)
        features = pcrl.student.encoder(views.input_o)
        decoded = pcrl._decode(features.bottleneck, features)
    assert decoded.mean() < -5


def test_the_loss_is_the_step_as_the_paper_writes_it() -> None:
    pcrl, images = world()
    pcrl.eval()  # running statistics: the order of passes does not matter
    views = views_of(pcrl, images)
    lam = views.mix

    losses = pcrl.losses(views)

    with torch.no_grad():
        f_o, f_m = pcrl.student.encoder(views.input_o), pcrl.momentum_encoder(views.input_m)
        f_h = [lam * o + (1 - lam) * m for o, m in zip(f_o, f_m, strict=True)]
        clean_h = lam * views.clean_o + (1 - lam) * views.clean_m
        cases = zip("omh", (f_o, f_m, f_h), (views.clean_o, views.clean_m, clean_h), strict=True)
        for at, (name, features, clean) in enumerate(cases):
            code = views.indicators[at]
            given = type(f_o)(*features[:-1], pcrl.attention(features[-1], code))
            restored = pcrl.student.out(pcrl.student.decoder(given))
            error = (restored - augment.apply_indicators(clean, code)).square().mean()
            torch.testing.assert_close(losses.reconstruction[name], error)
    total = 0.5 * losses.contrast + 0.5 * sum(losses.reconstruction.values())
    torch.testing.assert_close(losses.total, total)


def test_a_full_queue_of_like_embeddings_is_at_chance() -> None:
    """Why the loss rises while the queue fills: random vectors are far, own embeddings are near."""
    pcrl, images = world(queue_size=512, embedding_size=128)
    views = views_of(pcrl, images)

    with torch.no_grad():
        empty = float(pcrl.losses(views).contrast)
        for _ in range(512 // 12 + 1):  # nothing is trained
            pcrl.update(pcrl.losses(views))
        full = float(pcrl.losses(views).contrast)

    chance = np.log(1 + 512)
    assert empty < full < chance + 0.2
    assert full > chance - 0.7 and empty < chance - 1.2


def state_after(recipe: AnyPretrain, scans: Path, out: Path, report, steps: int) -> Any:
    left = [steps]

    def stop() -> bool:
        left[0] -= 1
        return left[0] <= 0

    with pytest.raises(Preempted):
        pretrain.run(
            recipe, discover(scans, dims=2), out, report, device=CPU, should_stop=stop,
            cache=scans.parent / "cache2d",
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


def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, films: Path, recipe: PretrainRecipe2d, report
) -> None:
    whole = state_after(recipe, films, tmp_path / "whole", report, 5)
    state_after(recipe, films, tmp_path / "stopped", report, 2)
    stopped = state_after(recipe, films, tmp_path / "stopped", report, 3)

    kept = ("step", "method", "optimizer")
    assert stopped["step"] == 5
    assert equal({k: stopped[k] for k in kept}, {k: whole[k] for k in kept})
    stopped["method"]["queue.vectors"][0] *= -1
    assert not equal(stopped["method"], whole["method"])


def trainer(*arguments: object, kill_at: int | None = None) -> tuple[int, list[dict[str, Any]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, arguments), "--events", "jsonl",
         "--threads", "1", "--device", "cpu"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    events = []
    assert process.stdout is not None
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "metric" and events[-1]["step"] == kill_at:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait(), events


@pytest.mark.nightly
def test_a_folder_of_png_becomes_an_encoder_however_often_it_is_killed(
    tmp_path: Path, films: Path, recipe: PretrainRecipe2d, report
) -> None:
    (tmp_path / "pre.json").write_text(json.dumps({"kind": "pretrain", **FIELDS}))
    arguments = ("pretrain", tmp_path / "pre.json", "--scans", films, "--out", tmp_path / "pre")

    killed, before = trainer(*arguments, kill_at=4)
    status, events = trainer(*arguments)
    with pytest.MonkeyPatch.context() as patch:  # one export is enough
        patch.setattr(export, "publish", lambda *_, **__: tmp_path)
        pretrain.run(
            recipe, discover(films, dims=2), tmp_path / "whole", report,
            device=CPU, should_stop=lambda: False,
        )  # fmt: skip

    assert (killed, status) == (-signal.SIGKILL, 0), events[-1]
    assert any("resuming after step" in event.get("message", "") for event in events)
    reported = [event for event in before + events if event["event"] == "metric"]
    losses = {event["step"]: event["values"]["loss"] for event in reported}
    assert losses == {step: values["loss"] for step, values in report.metrics}
    ends = [checkpoint.load_newest(tmp_path / out / "checkpoints") for out in ("pre", "whole")]
    assert ends[0] is not None and ends[1] is not None
    assert equal(ends[0]["method"], ends[1]["method"])
    check_encoder(tmp_path / "pre" / "bundle")


def check_encoder(folder: Path) -> None:
    """The bundle is told as 2D, computes what torch computes, and takes no volume."""
    manifest = bundle.load(folder)
    assert manifest.kind == "encoder" and manifest.patch_size == (64, 64)
    assert {parity.input_kind for parity in manifest.parity} == {"random", "real"}
    assert all(parity.passed for parity in manifest.parity)
    assert manifest.outputs[0].shape == ("batch", 64)
    assert "2D U-Net on a ResNet-18, width 8" in (folder / "card.md").read_text()
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    image = np.random.default_rng(0).random((1, 3, 96, 32), dtype=np.float32)
    assert session.run(None, {"image": image})[0].shape == (1, 64)
    volume = Volume(np.zeros((8, 8, 8), np.float32), np.eye(4))
    with pytest.raises(BundleError, match="2D images") as caught:
        predict.embed(open_session(folder), volume)
    assert caught.value.code == "wrong_model_kind"


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an untrained encoder, one affine of which is no default."""
    torch.manual_seed(0)
    recipe = PretrainRecipe2d.model_validate(FIELDS)
    pcrl = Pcrl(recipe)
    torch.nn.init.uniform_(pcrl.student.encoder.stage8[0].shortcut.norm.weight)
    state = {
        "step": 1, "recipe": recipe.model_dump_json(), "recipe_digest": recipe.digest(),
        "data_digest": "d" * 64, "run_id": "", "sample": torch.rand(1, 3, 32, 32).half(),
        "method": pcrl.state_dict(),
    }  # fmt: skip
    return export.publish(state, tmp_path_factory.mktemp("parent") / "bundle", Human())


def test_a_classifier_starts_from_it_and_tells_every_key(
    tmp_path: Path, films: Path, parent: Path, report
) -> None:
    recipe = ClassifyRecipe2d.model_validate(CLASSIFY)
    scans = discover(films, dims=2)

    folder = finetune.run(
        recipe, scans, tmp_path / "fine", report,
        device=CPU, should_stop=lambda: False, parent=parent,
    )  # fmt: skip

    manifest = bundle.load(folder)
    loaded, skipped = set(manifest.lineage.loaded_keys), set(manifest.lineage.skipped_keys)
    assert manifest.kind == "classifier" and manifest.channels == ("red", "green", "blue")
    assert {"encoder.stem.conv.weight", "encoder.stem.norm.running_mean"} <= loaded
    assert all(key.startswith(("decoder.", "out.")) for key in skipped) and len(skipped) > 20
    assert manifest.metrics["auc_bright"].n == 4
    assert all(parity.passed for parity in manifest.parity)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_affine_of_each_norm_is_carried_over_by_key(parent: Path, norm: str) -> None:
    fine = ClassifyRecipe2d.model_validate({**CLASSIFY, "norm": norm})
    network = build(fine, fused=False)

    told = transfer.load_parent(network, parent, fine)

    affine, key = load_file(parent / bundle.WEIGHTS), "encoder.stage8.0.shortcut.norm.weight"
    assert torch.equal(network.state_dict()[key], affine[key])
    assert not (affine[key] == 1).any()
    statistics = [key for key in told.skipped if "running_" in key and key.startswith("encoder.")]
    assert bool(statistics) == (norm == "group")
    assert set(told.fresh) == {"head.weight", "head.bias"}
    assert set(told.loaded) | set(told.skipped) == affine.keys()


def test_another_width_and_another_number_of_axes_are_refused(parent: Path) -> None:
    wider = ClassifyRecipe2d.model_validate({**CLASSIFY, "network": {"kind": "resnet18_unet2d"}})
    volume = FinetuneRecipe.model_validate({"labels": {"a": 1}, "network": {"base_width": 2}})

    with pytest.raises(DataError, match="incompatible_parent"):
        transfer.load_parent(build(wider, fused=False), parent, wider)
    with pytest.raises(DataError, match="a resnet18_unet2d, the recipe's unet3d"):
        transfer.load_parent(build(volume, fused=False), parent, volume)


def test_what_has_the_wrong_dimensions_is_refused_by_its_name(
    tmp_path: Path, films: Path, recipe: PretrainRecipe2d, report
) -> None:
    affine = np.eye(4)
    flat, deep = tmp_path / "flat", tmp_path / "deep"
    write_films(flat, "xy")
    deep.mkdir()
    nifti.write(deep / "liver.nii", np.random.rand(8, 8, 8).astype(np.float32), affine)

    with pytest.raises(DataError, match=r"unusable_scan: scan x.png is a 2D image"):
        discover(flat)
    with pytest.raises(DataError, match=r"unusable_scan: scan liver.nii is a volume"):
        discover(deep, dims=2)
    (deep / "liver.nii").rename(deep / "liver.png")  # told by content too
    with pytest.raises(DataError, match=r"scan liver: not_two_dimensional"):
        pretrain.run(
            recipe, discover(deep, dims=2), tmp_path / "out", report,
            device=CPU, should_stop=lambda: False,
        )  # fmt: skip
    assert len(discover(flat, dims=2).scans) == 2 and len(discover(films, dims=2).of("val")) == 4


def test_the_json_list_may_name_images(
    tmp_path: Path, films: Path, recipe: PretrainRecipe2d, report
) -> None:
    listed = [{"id": name, "image": str(films / "train" / f"{name}.png")} for name in "abc"]
    (tmp_path / "scans.json").write_text(json.dumps({"digest": "d" * 64, "scans": listed}))

    state = state_after(recipe, tmp_path / "scans.json", tmp_path / "out", report, 1)

    assert state["step"] == 1 and tuple(state["sample"].shape) == (1, 3, 64, 64)


def test_a_name_may_be_a_uid_and_an_ending_in_capitals(tmp_path: Path) -> None:
    write_films(tmp_path, "a")
    (tmp_path / "a.png").rename(tmp_path / "1.2.840.7")
    write_films(tmp_path, "b")
    (tmp_path / "b.png").rename(tmp_path / "b.PNG")
    (tmp_path / "notes.txt").write_text("no image")

    assert [scan.id for scan in discover(tmp_path, dims=2).scans] == ["1.2.840.7", "b"]
    write_films(tmp_path, "b")
    with pytest.raises(DataError, match="two scans are called b"):
        discover(tmp_path, dims=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": {"kind": "crop_pairs"}}, "crops.kind"),
        ({"network": {"kind": "unet3d"}}, "preprocessing.size"),
        ({"preprocessing": {"spacing_mm": [1, 1, 1]}}, "preprocessing.spacing_mm"),
        ({"method": {"skip": False, "queue_size": 40}}, "skip false is for unet3d alone"),
    ],
)
def test_parts_of_other_dimensions_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"kind": "pretrain", **FIELDS, **change}))

    with pytest.raises(DataError, match=message):
        read_recipe(path, "pretrain")
    path.write_text(json.dumps({"kind": "pretrain", **FIELDS}))
    assert isinstance(read_recipe(path, "pretrain"), PretrainRecipe2d)


def test_the_network_alone_makes_a_recipe_2d_with_the_papers_batch() -> None:
    network = {"kind": "resnet18_unet2d"}
    adapter: TypeAdapter[Any] = TypeAdapter(Recipe)
    paper = adapter.validate_python({"kind": "pretrain", "network": network})
    official = adapter.validate_python(
        {"kind": "pretrain", "network": network, "method": {"preset": "official"}}
    )
    classify = adapter.validate_python({"kind": "classify", "network": network, "labels": ["a"]})

    assert (paper.batch_size, paper.num_steps, paper.crops.outpaint_probability) == (
        256,
        73564,
        0.5,
    )
    assert (official.batch_size, official.crops.outpaint_probability) == (64, 0.0)
    assert (classify.batch_size, classify.norm) == (512, "batch")
    for recipe in (paper, official, classify):
        assert adapter.validate_json(recipe.model_dump_json()) == recipe
        assert adapter.validate_python(recipe) is recipe
