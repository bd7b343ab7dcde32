"""PCRL's step against the paper's equations."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from models.recipe import PretrainRecipe
from trainer.data.resident import Resident
from trainer.data.sampling import PairSampler
from trainer.methods.pcrl import Pcrl, Views, mix_features


@pytest.fixture
def world(pretrain_recipe: PretrainRecipe) -> tuple[Pcrl, Resident, PairSampler]:
    torch.manual_seed(0)
    volume = np.random.default_rng(0).random((32, 32, 24)).astype(np.float16)
    volumes = Resident.of([volume], fill=[0], at_least=(24, 24, 16), device=torch.device("cpu"))
    return (
        Pcrl(pretrain_recipe).train(),
        volumes,
        PairSampler(pretrain_recipe.crops, volumes.shapes),
    )


def train_one_step(method: Pcrl, views: Views) -> torch.Tensor:
    optimizer = torch.optim.SGD(method.trained(), lr=0.1)
    losses = method.losses(views)
    losses.total.backward()
    optimizer.step()
    method.update(losses)
    return losses.pushed


def test_views_depend_on_the_step_alone(world) -> None:
    method, volumes, sampler = world

    first, again, other = (method.make_views(volumes, sampler, step) for step in (7, 7, 8))

    for name in ("clean_o", "clean_m", "input_o", "input_m", "indicators", "order"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.mix == again.mix != other.mix
    assert not torch.equal(first.input_o, other.input_o)


def test_the_target_does_not_see_painting_or_blur(world, pretrain_recipe) -> None:
    method, volumes, sampler = world
    crops = pretrain_recipe.crops.model_copy(
        update={"paint_probability": 0.0, "max_blur_sigma": 0.0}
    )
    plain = Pcrl(pretrain_recipe.model_copy(update={"crops": crops}))

    painted, clean = (m.make_views(volumes, sampler, 3) for m in (method, plain))

    assert torch.equal(painted.clean_o, clean.clean_o)
    assert torch.equal(painted.clean_m, clean.clean_m)
    assert torch.equal(painted.indicators, clean.indicators)
    assert not torch.equal(painted.input_o, clean.input_o)
    torch.testing.assert_close(clean.input_o, clean.clean_o)


def test_a_fused_step_is_the_plain_step(world, pretrain_recipe: PretrainRecipe) -> None:
    """Through the shared skip responses too: same losses, same gradients."""
    method, volumes, sampler = world
    plain = Pcrl(pretrain_recipe.model_copy(update={"fused": False})).train()
    plain.load_state_dict(method.state_dict())
    views = method.make_views(volumes, sampler, 1)

    losses = [step.losses(views) for step in (method, plain)]
    for loss in losses:
        loss.total.backward()

    for name, ours in losses[0].named().items():
        torch.testing.assert_close(ours, losses[1].named()[name], rtol=1e-5, atol=1e-6)
    gradients = [[p.grad for p in step.trained()] for step in (method, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-2  # so the tolerance is tight


@pytest.mark.parametrize(("lam", "encoder"), [(1.0, "o"), (0.0, "m")])
def test_an_unmixed_hybrid_decodes_as_the_encoder_it_is(world, lam: float, encoder: str) -> None:
    method, volumes, sampler = world
    method.eval()
    views = method.make_views(volumes, sampler, 1)
    # The momentum encoder must differ, or the control below compares equals.
    torch.nn.init.normal_(method.momentum_encoder.down64.first.conv.weight)
    with torch.no_grad():
        features = {
            "o": method.student.encoder(views.input_o),
            "m": method.momentum_encoder(views.input_m),
        }

        hybrid, _ = method.decode(
            mix_features(features["o"], features["m"], lam), views.indicators[2]
        )
        expected, _ = method.decode(features[encoder], views.indicators[2])
        other, _ = method.decode(features["m" if encoder == "o" else "o"], views.indicators[2])

    assert torch.equal(hybrid, expected)
    assert not torch.allclose(hybrid, other)


def test_no_gradient_reaches_the_momentum_networks_and_all_else_gets_one(world) -> None:
    method, volumes, sampler = world

    method.losses(method.make_views(volumes, sampler, 1)).total.backward()

    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("momentum_"), name


def test_the_momentum_networks_move_by_the_average_of_parameters_and_buffers(world) -> None:
    method, volumes, sampler = world
    torch.nn.init.normal_(method.momentum_encoder.down64.first.conv.weight)
    before = copy.deepcopy(method.state_dict())

    train_one_step(method, method.make_views(volumes, sampler, 1))

    after = method.state_dict()
    moved = 0
    for name, value in after.items():
        if not name.startswith("momentum_"):
            continue
        twin = after[
            name.replace("momentum_encoder", "student.encoder").replace("momentum_proj", "proj")
        ]
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.99 * before[name] + 0.01 * twin)
            moved += int(not torch.equal(value, before[name]))
        else:
            assert torch.equal(value, twin)
    assert moved > 40


def test_the_queue_holds_the_last_vectors_pushed_and_wraps_round(world) -> None:
    method, volumes, sampler = world
    pushed = []

    for step in range(1, 6):
        queue_before = method.queue.clone()
        views = method.make_views(volumes, sampler, step)
        losses = method.losses(views)
        assert torch.equal(method.queue, queue_before)  # the loss never writes to the queue
        method.update(losses)
        pushed.append(losses.pushed)

    size = len(method.queue)
    everything = torch.cat(pushed)  # 5 x 12 vectors into 40 places
    assert len(everything) == 60 and int(method.queue_pointer) == 60 % size
    expected = torch.empty_like(method.queue)
    for at, vector in enumerate(everything):
        expected[at % size] = vector
    assert torch.equal(method.queue, expected)
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(size))


def test_pushed_are_query_key_and_hybrid_in_this_order(world) -> None:
    method, volumes, sampler = world
    views = method.make_views(volumes, sampler, 1)

    losses = method.losses(views)

    query, key, _ = losses.pushed.chunk(3)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ method.queue.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(losses.contrast, expected)
    torch.testing.assert_close(
        losses.total, 0.5 * losses.contrast + 0.5 * sum(losses.reconstruction.values())
    )


def test_momentum_groups_normalise_apart_and_come_back_in_order(world) -> None:
    method, volumes, sampler = world
    views = method.make_views(volumes, sampler, 1)

    grouped = method._encode_momentum(views)

    order = views.order
    for part in (order[:2], order[2:]):
        alone = method.momentum_encoder(views.input_m[part])
        torch.testing.assert_close(grouped.bottleneck[part], alone.bottleneck)
    together = method.momentum_encoder(views.input_m)
    assert not torch.allclose(grouped.bottleneck, together.bottleneck)
