"""The rows of the paper's tables 1 and 2: each is what it says, and no more."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from pydantic import ValidationError

from models.networks.unet3d import UNet3d, pooled
from models.recipe import Pcrl as PcrlRecipe
from models.recipe import PretrainRecipe2d
from models.recipe.ablations import ABLATIONS
from trainer.data.images2d import ResidentImages
from trainer.losses import nce_loss
from trainer.methods.pcrl import Pcrl
from trainer.methods.views import kept

Build = Callable[..., Any]


def contrast(method: Pcrl, views: Any) -> torch.Tensor:
    """InfoNCE of the two views, by hand."""
    query = method.projector(method.student.encoder(views.input_o).bottleneck)
    parts = [method.momentum_encoder(part).bottleneck for part in views.input_m.chunk(2)]
    key = method.momentum_projector(torch.cat(parts))
    return nce_loss(query, key, method.queue.vectors, 0.2)


def test_contra_loss_is_the_contrast_alone_and_has_no_decoder(build: Build) -> None:
    method, views_of = build(preset="contra_loss")
    views = views_of(1)

    losses = method.losses(views)

    assert torch.allclose(losses.total, contrast(method, views), atol=1e-6)
    assert losses.reconstruction == {} and losses.rotation is None
    assert not any("decoder" in name or "attention" in name for name in method.state_dict())


def test_self_reconstruction_asks_for_the_clean_ordinary_view_as_it_is(build: Build) -> None:
    method, views_of = build(preset="self_recons")
    views = views_of(1)

    losses = method.losses(views)

    assert isinstance(method.student, UNet3d)
    restored = F.mse_loss(torch.sigmoid(method.student(views.input_o)), views.clean_o)
    expected = 0.5 * contrast(method, views) + 0.5 * restored
    assert torch.allclose(losses.total, expected, atol=1e-5)
    assert losses.reconstruction.keys() == {"o"}
    assert not torch.allclose(losses.total, 0.5 * contrast(method, views), atol=1e-5)


def test_rotation_is_told_of_the_turned_ordinary_view(build: Build) -> None:
    method, views_of = build(preset="rotnet")
    views = views_of(1)

    losses = method.losses(views)

    turned = torch.stack(
        [
            view.rot90(int(t), dims=(1, 2))
            for view, t in zip(views.input_o, views.turns, strict=True)
        ]
    )
    logits = method.rotation_head(pooled(method.student.encoder(turned).bottleneck))
    told = F.cross_entropy(logits, views.turns)
    assert len(set(views.turns.tolist())) > 1
    assert losses.rotation is not None and torch.allclose(losses.rotation, told, atol=1e-6)
    expected = 0.5 * contrast(method, views) + 0.5 * told
    assert torch.allclose(losses.total, expected, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_lesser_transformation_undoes_the_rest_of_it(dims: int) -> None:
    drawn = torch.cat([torch.ones(2, dims), F.one_hot(torch.tensor([3, 1]), 4).float()], dim=1)

    assert torch.equal(kept(drawn, "flips_and_turns", dims), drawn)
    unturned = [1.0, 0.0, 0.0, 0.0]
    assert kept(drawn, "flips", dims).tolist() == [[1.0] * dims + unturned] * 2
    assert kept(drawn, "none", dims).tolist() == [[0.0] * dims + unturned] * 2


@pytest.mark.parametrize(
    ("preset", "decoded", "attends"),
    [
        ("trans_att_flip", {"o", "m"}, True),
        ("trans_att", {"o", "m"}, True),
        ("crossmix_05", {"o", "m", "h"}, False),
        ("crossmix_1", {"o", "m", "h"}, False),
    ],
)
def test_what_is_decoded_and_whether_there_is_an_attention(
    build: Build, preset: str, decoded: set[str], attends: bool
) -> None:
    method, views_of = build(preset=preset, **({"outer_rank": 4} if attends else {}))
    views = views_of(1)
    # The momentum and hybrid targets are those of T; without T the clean views and their mix.
    targets = method._targets(views)

    losses = method.losses(views)

    assert losses.reconstruction.keys() == decoded
    assert (method.attention is not None) == attends
    mixed = views.mix * views.clean_o + (1 - views.mix) * views.clean_m
    plain = {"o": views.clean_o, "m": views.clean_m, "h": mixed}
    assert all(torch.equal(targets[e], plain[e]) for e in decoded) == (not attends)
    assert method.spec.mix_alpha == (0.5 if preset == "crossmix_05" else 1.0)


@pytest.mark.parametrize("preset", ABLATIONS)
def test_every_row_trains_in_2d_and_every_weight_gets_a_gradient(preset: str) -> None:
    fields = {"preset": preset, "embedding_size": 8, "queue_size": 40}
    if "trans_att" in preset:
        fields["outer_rank"] = 4
    recipe = PretrainRecipe2d.model_validate(
        {
            "network": {"kind": "resnet18_unet2d", "width": 8},
            "preprocessing": {"size": 64},
            "crops": {"input_size": 32, "cutout_size": 8},
            "method": fields,
            "batch_size": 4,
        }
    )
    method = Pcrl(recipe).train()
    squares = [np.random.default_rng(n).integers(0, 256, (64, 64), dtype=np.uint8) for n in (0, 1)]
    images = ResidentImages.of(squares, device=torch.device("cpu"))

    method.losses(method.make_views(images, None, 1)).total.backward()

    assert all(parameter.grad is not None for parameter in method.trained())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attention": "none"}, "transformation must be 'none'"),
        ({"attention": "none", "transformation": "none"}, "belong to an attention"),
        ({"reconstructions": ()}, "reconstruction_weight is 0 if and only if"),
        ({"preset": "contra_loss", "contrast_weight": 0}, "are both 0"),
    ],
)
def test_parts_that_contradict_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PcrlRecipe.model_validate(fields)
