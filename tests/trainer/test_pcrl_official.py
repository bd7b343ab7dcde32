"""Preset `official` against its own description, term by term (algorithms.md 1.2 and 1.3)."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from trainer.data.augment import apply_indicators
from trainer.methods.contrast import encode_in_groups


@pytest.fixture
def world(build):
    method, views_of = build(preset="official")
    torch.nn.init.normal_(method.momentum_encoder.down64.first.conv.weight)
    return method, views_of(1)


def bottleneck_and_decoder(method, features):
    def decode(bottleneck: torch.Tensor) -> torch.Tensor:
        joined = features._replace(bottleneck=bottleneck)
        return torch.sigmoid(method.student.out(method.student.decoder(joined)))

    return features.bottleneck, decode


def hybrid(ordinary, momentum, lam):
    return type(ordinary)(
        *(lam * o + (1 - lam) * m for o, m in zip(ordinary, momentum, strict=True))
    )


def test_four_reconstructions_are_averaged(world) -> None:
    """Row 9: plain(x1), hybrid(x1, x2), and both of the batch mixed with itself."""
    method, views = world
    lam, mixup, partner = float(views.mix), float(views.mixup), views.partner

    losses = method.losses(views)

    t_o, t_m = views.indicators
    encode_o, attend = method.student.encoder, method.attention
    features_o = encode_o(views.input_o)
    features_m = encode_in_groups(method.momentum_encoder, views.input_m, method.recipe)
    plain, decode = bottleneck_and_decoder(method, features_o)
    attended_o, attended_m = attend(plain, t_o), attend(features_m.bottleneck, t_m)
    target_o, target_m = apply_indicators(views.input_o, t_o), apply_indicators(views.input_m, t_m)
    _, decode_h = bottleneck_and_decoder(method, hybrid(features_o, features_m, lam))

    def blend(x: torch.Tensor) -> torch.Tensor:
        return mixup * x + (1 - mixup) * x[partner]

    mixed_o = encode_o(blend(views.input_o))
    mixed_m = encode_in_groups(method.momentum_encoder, blend(views.input_m), method.recipe)
    mixed_h = hybrid(mixed_o, mixed_m, lam)
    clean_o, clean_m = blend(views.clean_o), blend(views.clean_m)
    expected = {
        "o": F.mse_loss(decode(attended_o), target_o),
        "h": F.mse_loss(
            decode_h(lam * attended_o + (1 - lam) * attended_m),
            lam * target_o + (1 - lam) * target_m,
        ),
        "mixup_o": F.mse_loss(
            bottleneck_and_decoder(method, mixed_o)[1](mixed_o.bottleneck), clean_o
        ),
        "mixup_h": F.mse_loss(
            bottleneck_and_decoder(method, mixed_h)[1](mixed_h.bottleneck),
            lam * clean_o + (1 - lam) * clean_m,
        ),
    }
    assert losses.reconstruction.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses.reconstruction[name], value, msg=name)
    assert len({round(float(value.detach()), 5) for value in expected.values()}) == 4
    mean = sum(expected.values()) / 4
    torch.testing.assert_close(losses.total, losses.contrast + mean)


def test_three_terms_are_contrasted_each_after_the_keys_before_it(world) -> None:
    """Rows 11 to 13, binary NCE, Z from the first batch."""
    method, views = world
    mixup, partner, count = float(views.mixup), views.partner, len(method.queue.vectors)

    losses = method.losses(views)

    def blend(x: torch.Tensor) -> torch.Tensor:
        return mixup * x + (1 - mixup) * x[partner]

    query = method.projector(method.student.encoder(views.input_o).bottleneck)
    key = method.momentum_projector(
        encode_in_groups(method.momentum_encoder, views.input_m, method.recipe).bottleneck
    )
    mixup_query = method.projector(method.student.encoder(blend(views.input_o)).bottleneck)
    mixup_key = method.momentum_projector(
        encode_in_groups(method.momentum_encoder, blend(views.input_m), method.recipe).bottleneck
    )
    mixed_key = F.normalize(blend(key), dim=1)
    negatives = method.queue.vectors.clone()
    z, total, at = None, 0.0, 0
    for q, k in ((query, key), (mixup_query, mixup_key), (mixup_query, mixed_key)):
        similar = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1)
        x = (similar.double() / 0.2).exp()
        z = x.mean() if z is None else z
        x = x / z
        positive = (x[:, 0] / (x[:, 0] + count)).log()
        rest = (count / (x[:, 1:] + count)).log().sum(dim=1)
        total -= float((positive + rest).mean().detach()) / 3
        negatives[at : at + 4], at = k, at + 4
    assert math.isclose(float(losses.contrast.detach()), total, rel_tol=1e-4)
    torch.testing.assert_close(losses.pushed, torch.cat([key, mixup_key, mixed_key]))
    torch.testing.assert_close(losses.normaliser, z.float())


@pytest.mark.parametrize(("momentum", "frozen"), [(1.0, True), (0.9, False)])
def test_the_normaliser_starts_at_the_first_batch_and_follows_by_its_momentum(
    build, momentum: float, frozen: bool
) -> None:
    method, views_of = build(preset="official", normaliser_momentum=momentum)
    fresh, _ = build(preset="official", normaliser_momentum=0.0)

    first = method.losses(views_of(1))
    method.update(first)
    second = method.losses(views_of(2))
    fresh.load_state_dict(method.state_dict())
    estimate = fresh.losses(views_of(2)).normaliser

    assert torch.equal(method.normaliser, first.normaliser) and float(first.normaliser) > 0
    expected = momentum * first.normaliser + (1 - momentum) * estimate
    torch.testing.assert_close(second.normaliser, expected)
    assert torch.equal(second.normaliser, first.normaliser) == frozen
    assert not torch.isclose(estimate, first.normaliser)


def test_the_normaliser_is_part_of_the_state(world) -> None:
    method, views = world
    method.update(method.losses(views))

    assert float(method.state_dict()["normaliser"]) > 0


def test_info_nce_leaves_the_normaliser_alone(build) -> None:
    method, views_of = build()

    method.update(method.losses(views_of(1)))

    assert float(method.normaliser) == 0
