"""RotNet: four orientations of every crop, told apart."""

import math

import numpy as np
import pytest
import torch

from models.recipe import PretrainRecipe2d
from trainer.data.images2d import ResidentImages
from trainer.methods.rotnet import RotNet, in_all_turns, turn_loss


def test_every_image_is_shown_in_four_orientations_as_numpy_turns_it() -> None:
    images = torch.rand(2, 1, 4, 4, 3)

    turned = in_all_turns(images)

    expected = [np.rot90(image.numpy(), turn, axes=(1, 2)) for turn in range(4) for image in images]
    assert np.array_equal(turned.numpy(), np.stack(expected))


def test_the_loss_is_the_mean_cross_entropy_of_the_turns() -> None:
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slow, right = 0.0, 0
    for at, row in enumerate(logits.tolist()):
        turn = at // 2
        slow -= math.log(math.exp(row[turn]) / sum(math.exp(value) for value in row)) / 8
        right += max(row) == row[turn]

    loss, accuracy = turn_loss(logits)

    assert math.isclose(float(loss), slow, rel_tol=1e-6)
    assert float(accuracy) == right / 8
    sure = torch.eye(4).repeat_interleave(2, dim=0) * 100
    assert float(turn_loss(sure)[0]) == 0.0 < float(turn_loss(sure.flip(0))[0])


@pytest.mark.parametrize("corrupted", [False, True])
def test_in_2d_every_weight_gets_a_gradient(corrupted: bool) -> None:
    recipe = PretrainRecipe2d.model_validate(
        {
            "network": {"kind": "resnet18_unet2d", "width": 8},
            "preprocessing": {"size": 64},
            "crops": {"input_size": 32, "cutout_size": 8},
            "method": {"name": "rotnet", "corrupted": corrupted},
            "batch_size": 2,
        }
    )
    method = RotNet(recipe).train()
    squares = [np.random.default_rng(n).integers(0, 256, (64, 64), dtype=np.uint8) for n in (0, 1)]
    images = ResidentImages.of(squares, device=torch.device("cpu"))
    views = method.make_views(images, None, 1)

    losses = method.losses(views)
    losses.total.backward()

    assert views.shape == (2, 3, 32, 32)
    assert losses.named().keys() == {"loss", "rotation_accuracy"}
    assert all(parameter.grad is not None for parameter in method.trained())
    assert not any("decoder" in name for name in method.state_dict())
