"""C2L's three terms, against their definition sample by sample."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.recipe import C2l as C2lRecipe
from models.recipe import PretrainRecipe, PretrainRecipe2d
from trainer.data.images2d import ResidentImages
from trainer.methods.c2l import C2l

FIELDS: dict[str, Any] = {
    "network": {"kind": "resnet18_unet2d", "width": 8},
    "preprocessing": {"size": 64},
    "crops": {"input_size": 32, "cutout_size": 8},
    "method": {"name": "c2l", "embedding_size": 8, "queue_size": 40},
    "batch_size": 4,
}


def world(**method: Any) -> tuple[C2l, Any]:
    torch.manual_seed(0)
    fields = {**FIELDS, "method": {**FIELDS["method"], **method}}
    c2l = C2l(PretrainRecipe2d.model_validate(fields)).train()
    squares = [np.random.default_rng(n).integers(0, 256, (64, 64), dtype=np.uint8) for n in (0, 1)]
    images = ResidentImages.of(squares, device=torch.device("cpu"))
    return c2l, c2l.make_views(images, None, 1)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


@torch.no_grad()
def test_the_loss_is_the_mean_of_three_softmaxes_over_the_queue() -> None:
    c2l, views = world(contrast_loss="info_nce", push_when="after_step", temperature=0.5)
    lam = float(views.mixup)

    losses = c2l.losses(views)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [lam * x[b] + (1 - lam) * x[int(p)] for b, p in enumerate(views.partner)]
        )

    def keys(images: torch.Tensor) -> torch.Tensor:
        parts = [c2l.momentum_encoder(part).bottleneck for part in images.chunk(2)]
        return c2l.momentum_projector(torch.cat(parts))

    query = c2l.projector(c2l.student.encoder(views.query).bottleneck)
    mixup_query = c2l.projector(c2l.student.encoder(mixed(views.query)).bottleneck)
    key, mixup_key = keys(views.key), keys(mixed(views.key))
    mixed_key = torch.stack([unit(row) for row in mixed(key)])
    slow = 0.0
    for queries, positives in ((query, key), (mixup_query, mixup_key), (mixup_query, mixed_key)):
        for q, k in zip(queries, positives, strict=True):
            own = math.exp(float(q @ k) / 0.5)
            others = sum(math.exp(float(q @ n) / 0.5) for n in c2l.queue.vectors)
            slow -= math.log(own / (own + others)) / 12
    assert math.isclose(float(losses.total), slow, rel_tol=1e-4)
    assert torch.allclose(losses.pushed, torch.cat([key, mixup_key, mixed_key]), atol=1e-5)


def test_a_step_pushes_its_keys_and_moves_the_momentum_encoder() -> None:
    c2l, views = world(ema_momentum=0.5)
    losses = c2l.losses(views)
    with torch.no_grad():
        c2l.student.encoder.stem.conv.weight.add_(1.0)
    before = c2l.momentum_encoder.stem.conv.weight.clone()

    c2l.update(losses)

    assert torch.equal(c2l.queue.vectors[:12], losses.pushed)
    assert int(c2l.queue.pointer) == 12 and float(c2l.normaliser) > 0
    assert torch.allclose(c2l.momentum_encoder.stem.conv.weight, before + 0.5, atol=1e-6)


def test_no_gradient_reaches_the_momentum_networks() -> None:
    c2l, views = world()

    c2l.losses(views).total.backward()

    without = {name for name, value in c2l.named_parameters() if value.grad is None}
    assert without == {n for n, _ in c2l.named_parameters() if n.startswith("momentum_")} != set()


def test_the_defaults_are_the_official_codes() -> None:
    recipe = PretrainRecipe2d.model_validate({"method": {"name": "c2l"}})

    assert (recipe.batch_size, recipe.learning_rate, recipe.momentum) == (128, 0.03, 0.9)
    assert recipe.optimizer.schedule.kind == "drops" and recipe.crops.outpaint_probability == 0
    method = recipe.method
    assert isinstance(method, C2lRecipe) and (method.temperature, method.ema_momentum) == (
        0.07,
        0.999,
    )
    assert PretrainRecipe.model_validate({"method": {"name": "c2l"}}).num_steps == 9_345


def test_a_queue_smaller_than_a_step_is_refused() -> None:
    with pytest.raises(ValidationError, match="queue_size 40 is below the 384 vectors"):
        PretrainRecipe.model_validate({"method": {"name": "c2l", "queue_size": 40}})
