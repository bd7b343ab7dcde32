"""PCRLv2 on 2D images: targets, locals and loss against slow definitions; a short run."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from PIL import Image
from torch import Tensor

from models import bundle
from models.recipe import ClassifyRecipe2d, PretrainRecipe2d
from trainer import checkpoint, pretrain, transfer
from trainer.build import build
from trainer.data import augment2d
from trainer.data.images2d import ResidentImages
from trainer.data.scans import discover
from trainer.errors import Preempted
from trainer.methods.pcrlv2 import PcrlV2, agree
from trainer.methods.pcrlv2_views import local_crops, of_images
from trainer.randomness import generator

CPU = torch.device("cpu")
NETWORK = {"kind": "resnet18_unet2d", "width": 8}
FIELDS: dict[str, Any] = {
    "network": NETWORK,
    "preprocessing": {"size": 64},
    "crops": {"input_size": 64, "cutout_size": 9},
    "method": {"name": "pcrlv2", "num_locals": 2, "local_side": 32},
    "batch_size": 4,
    "num_steps": 12,
    "checkpoint_every": 100,
    "log_every": 1,
}
UNSPOILED = {
    "cutout_holes": 0, "grayscale_probability": 0, "blur_probability": 0, "brightness": 0,
    "contrast": 0, "saturation": 0, "hue": 0, "max_rotation_deg": 0,
}  # fmt: skip


def recipe(**crops: Any) -> PretrainRecipe2d:
    return PretrainRecipe2d.model_validate({**FIELDS, "crops": {**FIELDS["crops"], **crops}})


def images() -> ResidentImages:
    """Noise with a bright square, at another place in each."""
    random = np.random.default_rng(0)
    squares = []
    for _ in range(8):
        square = random.integers(0, 60, (64, 64), dtype=np.uint8)
        row, column = random.integers(0, 40, 2)
        square[row : row + 24, column : column + 24] += 150
        squares.append(square)
    return ResidentImages.of(squares, device=CPU)


def made(**crops: Any) -> PcrlV2:
    torch.manual_seed(0)
    return PcrlV2(recipe(**crops)).train()


def test_the_defaults_are_the_official_codes() -> None:
    found = PretrainRecipe2d.model_validate({"network": NETWORK, "method": {"name": "pcrlv2"}})

    assert (found.batch_size, found.learning_rate, found.num_steps) == (64, 0.01, 294_255)
    crops, method = found.crops, found.method
    assert (crops.input_size, crops.crop_area, crops.outpaint_probability) == (224, (0.3, 1.0), 0.0)
    assert (method.num_locals, method.local_side, method.local_area) == (6, 96, (0.05, 0.3))
    local = local_crops(crops, method)
    assert (local.input_size, local.cutout_holes, crops.cutout_holes) == (96, 0, 3)
    assert local.model_copy(update=dict.fromkeys(["input_size", "crop_area", "cutout_holes"])) == (
        crops.model_copy(update=dict.fromkeys(["input_size", "crop_area", "cutout_holes"]))
    )


def cut(image: Tensor, geometry: augment2d.Geometry2d, at: int, side: int) -> Tensor:
    """One crop by Pillow, normalised by ImageNet's moments, (3, side, side)."""
    (top, left), (rows, columns) = geometry.start[at].tolist(), geometry.extent[at].tolist()
    crop = image.numpy()[top : top + rows, left : left + columns]
    resized = np.asarray(
        Image.fromarray(crop.astype(np.float32)).resize((side, side), Image.BILINEAR)
    )
    turned = resized[:, ::-1] if bool(geometry.flip[at]) else resized
    moments = zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    return torch.from_numpy(np.stack([(turned / 255 - mean) / std for mean, std in moments]))


def test_a_target_is_its_crop_and_what_is_seen_is_the_target_spoiled() -> None:
    asked, held, step = recipe(**UNSPOILED), images(), 3
    crops = of_images(asked, asked.method, held, step)
    spoiled = of_images(recipe(max_rotation_deg=0), asked.method, held, step)

    order = torch.randperm(4, generator=generator(0, step, "order"))
    epoch = torch.randperm(8, generator=generator(0, 1, "epoch"))
    scans = epoch[torch.arange(4)][order]  # the third batch of four of eight images
    drawing = generator(0, step, "geometry")
    for view in (0, 1):
        geometry = augment2d.draw_geometry(asked.crops, 64, 4, drawing)
        for place, sample in enumerate(order.tolist()):
            slow = cut(held.pixels[scans[place], 0], geometry, sample, 64)
            torch.testing.assert_close(crops.clean[view][place], slow.float(), atol=2e-2, rtol=0)
        torch.testing.assert_close(crops.seen[view], crops.clean[view])
        torch.testing.assert_close(spoiled.clean[view], crops.clean[view])
        assert not torch.allclose(spoiled.seen[view], crops.clean[view], atol=0.5)
    local = local_crops(asked.crops, asked.method)
    geometry = augment2d.draw_geometry(local, 64, 8, generator(0, step, "local geometry"))
    share = geometry.extent.prod(dim=1) / 64**2
    assert crops.seen_locals.shape == (8, 3, 32, 32) and float(share.max()) < 0.32
    for place in range(8):  # local after local: two rounds over the four images
        slow = cut(held.pixels[scans[place % 4], 0], geometry, place, 32)
        torch.testing.assert_close(crops.seen_locals[place], slow.float(), atol=2e-2, rtol=0)


def decoded_slowly(method: PcrlV2, seen: Tensor) -> list[Tensor]:
    """Five times: repeat every pixel, convolve, norm, ReLU, twice; no skip."""
    decoder = method.student.decoder
    x, found = method.student.encoder(seen).bottleneck, []
    for level in (decoder.up16, decoder.up8, decoder.up4, decoder.up2, decoder.up1):
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        for part in (level.first, level.second):
            x = part.norm(F.conv2d(x, part.conv.weight, padding=1)).clamp(min=0)
        found.append(x)
    return found


@pytest.mark.parametrize("level", range(5))
def test_the_loss_is_restoration_agreement_and_both_of_a_level(level: int) -> None:
    method = made()
    views = dataclasses.replace(method.make_views(images(), None, 4), level=level)
    crops = views.crops

    losses = method.losses(views)

    def heads(x: Tensor) -> tuple[Tensor, Tensor]:
        z = method.projections[level](x.mean(dim=(2, 3)))
        return z, method.predictions[level](z)

    def error(restored: Tensor, clean: Tensor) -> Tensor:
        assert restored.shape == clean.shape
        return ((restored - clean) ** 2).sum() / clean.numel()

    both = [decoded_slowly(method, seen) for seen in crops.seen]
    restored = sum(
        error(method.student.out(x[-1]), y) / 2 for x, y in zip(both, crops.clean, strict=True)
    )
    mid = sum(
        error(F.interpolate(method.mid_outputs[level](x[level]), (64, 64), mode="bilinear"), y) / 2
        for x, y in zip(both, crops.clean, strict=True)
    )
    (z1, p1), (z2, p2) = (heads(x[level]) for x in both)
    zl, pl = heads(decoded_slowly(method, crops.seen_locals)[level])
    parts = [(zl[n : n + 4], pl[n : n + 4], z, p) for n in (0, 4) for z, p in ((z1, p1), (z2, p2))]
    local = sum(agree(*part) for part in parts) / 4
    beta = 0.5 * (1 + math.cos(math.pi * 3 / 12))
    expected = restored + agree(z1, p1, z2, p2) + local + beta * mid
    torch.testing.assert_close(losses.total, expected, atol=1e-4, rtol=1e-4)


def test_every_level_is_drawn_and_every_weight_learns() -> None:
    method, held = made(), images()

    drawn = {method.make_views(held, None, step).level for step in range(1, 25)}

    assert drawn == {0, 1, 2, 3, 4}
    method.losses(method.make_views(held, None, 1)).total.backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert method.student.decoder.up16.first.conv.weight.shape[1] == 64  # the bottleneck alone


def test_a_short_run_lowers_the_loss_on_images_it_has_not_seen() -> None:
    method, held = made(), images()

    def loss() -> float:
        judged = copy.deepcopy(method)
        with torch.no_grad():
            batches = [judged.make_views(held, None, 1000 + step) for step in range(4)]
            return float(np.mean([float(judged.losses(batch).total) for batch in batches]))

    before, descent = loss(), method.descent(CPU)
    for step in range(1, 13):
        descent.step(method.make_views(held, None, step), step)

    assert loss() < before - 0.1


class Stops:
    """A report that says nothing; asked, it wants a stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_an_interrupted_run_goes_on_bit_for_bit_and_starts_a_classifier(
    tmp_path: Path, without_onnx
) -> None:
    (tmp_path / "films").mkdir()
    for at, square in enumerate(images().pixels[:, 0].numpy()):
        Image.fromarray(square).save(tmp_path / "films" / f"{at}.png")
    asked, scans = (
        recipe().model_copy(update={"num_steps": 2}),
        discover(tmp_path / "films", dims=2),
    )

    def run(out: Path, stops: Stops) -> Path:
        return pretrain.run(asked, scans, out, stops, device=CPU, should_stop=stops)

    folder = run(tmp_path / "whole", Stops(99))
    with pytest.raises(Preempted):
        run(tmp_path / "broken", Stops(1))
    run(tmp_path / "broken", Stops(99))

    whole, broken = (checkpoint.load_newest(tmp_path / name / "checkpoints") for name in
                     ("whole", "broken"))  # fmt: skip
    assert whole is not None and broken is not None
    for name, value in whole["method"].items():
        assert torch.equal(value, broken["method"][name]), name
    classify = {"labels": ["a"], "network": NETWORK, "preprocessing": {"size": 64}}
    fine = ClassifyRecipe2d.model_validate({"kind": "classify", **classify})
    taken = transfer.load_parent(build(fine, fused=False), folder, fine)
    assert set(taken.fresh) == {"head.weight", "head.bias"}
    assert any(key.startswith("decoder.up16") for key in taken.skipped)
    assert bundle.load(folder).recipe == asked
