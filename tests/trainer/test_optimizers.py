"""The recipe's optimizer, and its rate at every step."""

import pytest
import torch
from torch import nn

from models.recipe import Constant, Cosine, Drops, Optimizer, PretrainRecipe
from trainer.optimizers import make_optimizer, rate_at, set_rate


@pytest.mark.parametrize(
    ("kind", "torchs"),
    [
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("nadam", torch.optim.NAdam),
    ],
)
def test_an_optimizer_is_torchs_with_the_recipes_numbers(kind: str, torchs: type) -> None:
    recipe = PretrainRecipe.model_validate(
        {"optimizer": {"kind": kind, "beta2": 0.99}, "momentum": 0.5, "weight_decay": 0.1}
    )

    made = make_optimizer([nn.Parameter(torch.zeros(3))], recipe)

    (group,) = made.param_groups
    assert type(made) is torchs and group["weight_decay"] == 0.1
    assert (group["momentum"] == 0.5) if kind == "sgd" else (group["betas"] == (0.5, 0.99))
    assert set_rate(made, recipe, 1) == group["lr"] == recipe.learning_rate


def test_rates_follow_the_schedule() -> None:
    drops = Optimizer(schedule=Drops(at=(0.5, 0.75), factor=0.1))

    assert [rate_at(1.0, drops, done, 4) for done in range(4)] == [1.0, 1.0, 0.1, 0.1**2]
    cosine = [rate_at(2.0, Optimizer(schedule=Cosine()), done, 4) for done in (0, 2)]
    assert cosine == pytest.approx([2.0, 1.0])
    warm = Optimizer(schedule=Constant(), warmup_steps=3)
    assert [rate_at(1.0, warm, done, 10) for done in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_drops_must_rise() -> None:
    with pytest.raises(ValueError, match="must rise"):
        Drops(at=(0.5, 0.5))
