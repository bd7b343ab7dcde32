"""PCRL's step against the paper's equations."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from models.networks.unet3d import UNet3d
from models.recipe import PretrainRecipe
from trainer.methods.contrast import encode_in_groups
from trainer.methods.mixing import draw_mix
from trainer.methods.pcrl import Pcrl
from trainer.methods.views import Views
from trainer.randomness import generator

PRESETS = ("paper", "official", "recommended")


def train_one_step(method: Pcrl, views: Views) -> torch.Tensor:
    optimizer = torch.optim.SGD(method.trained(), lr=0.1)
    losses = method.losses(views)
    losses.total.backward()
    optimizer.step()
    method.update(losses)
    return losses.pushed


def scalars(method: Pcrl, views: Views) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return method.losses(views).named()


def make_momentum_differ(method: Pcrl) -> None:
    """As copies, both encoders give one feature, and a test that swaps them sees nothing."""
    torch.nn.init.normal_(method.momentum_encoder.down64.first.conv.weight)


@pytest.mark.parametrize("preset", PRESETS)
def test_views_depend_on_the_step_alone(build, preset: str) -> None:
    _, views_of = build(preset=preset)

    first, again, other = views_of(7), views_of(7), views_of(8)

    for name in Views.__slots__:
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    for name in ("clean_o", "input_o", "indicators", "mix", "mixup"):
        assert not torch.equal(getattr(first, name), getattr(other, name)), name


def test_the_target_does_not_see_painting_or_blur(build) -> None:
    off = {"paint_probability": 0.0, "max_blur_sigma": 0.0}
    (method, painted_of), (_, plain_of) = build(), build(crops=off)

    painted, plain = painted_of(3), plain_of(3)

    assert torch.equal(painted.clean_o, plain.clean_o)
    assert torch.equal(painted.clean_m, plain.clean_m)
    assert torch.equal(painted.indicators, plain.indicators)
    assert not torch.equal(painted.input_o, plain.input_o)
    torch.testing.assert_close(plain.input_o, plain.clean_o)
    targets = [method._targets(views) for views in (painted, plain)]
    assert all(torch.equal(targets[0][e], targets[1][e]) for e in "omh")


def test_shuffled_voxels_are_in_the_input_alone(build) -> None:
    """Row 32; nothing else is drawn anew for it."""
    crops = {"input_size": (24, 24, 24), "paint_probability": 0.0, "max_blur_sigma": 0.0}

    plain, shuffled = (build(crops={**crops, "shuffle_probability": p})[1](3) for p in (0.0, 1.0))

    assert torch.equal(shuffled.clean_o, plain.clean_o)
    torch.testing.assert_close(plain.input_o, plain.clean_o)
    for b in range(len(plain.scan)):
        assert not torch.allclose(shuffled.input_o[b], plain.input_o[b])
        assert not torch.allclose(shuffled.input_m[b], plain.input_m[b])


def test_a_corrupted_target_sees_them(build) -> None:
    """Negative control, and what the official code does (row 10)."""
    off = {"paint_probability": 0.0, "max_blur_sigma": 0.0}
    (method, painted_of), (_, plain_of) = build(target="corrupted"), build(crops=off)

    painted, plain = (method._targets(views_of(3)) for views_of in (painted_of, plain_of))

    assert all(not torch.allclose(painted[e], plain[e]) for e in "omh")


@pytest.mark.parametrize("fields", [{"preset": p} for p in PRESETS] + [{"skip": False}])
def test_a_fused_step_is_the_plain_step(build, fields) -> None:
    """Through the shared skip responses too: same losses, same gradients."""
    (method, views_of), (plain, _) = build(**fields), build(**fields, fused=False)
    plain.load_state_dict(method.state_dict())
    views = views_of(1)

    losses = [step.losses(views) for step in (method, plain)]
    for loss in losses:
        loss.total.backward()

    for name, ours in losses[0].named().items():
        torch.testing.assert_close(ours, losses[1].named()[name], rtol=1e-5, atol=1e-6)
    gradients = [[p.grad for p in step.trained()] for step in (method, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-2  # so the tolerance is tight


@pytest.mark.parametrize("crossmix", ["before_attention", "after_attention"])
@pytest.mark.parametrize(("lam", "encoder"), [(1.0, "o"), (0.0, "m")])
def test_an_unmixed_hybrid_is_the_encoder_that_it_is(
    build, crossmix: str, lam: float, encoder: str
) -> None:
    method, views_of = build(crossmix=crossmix)
    make_momentum_differ(method)
    views = views_of(1)
    same_t = views.indicators[0].expand(len(views.indicators), -1, -1)

    def errors(lam: float) -> dict[str, torch.Tensor]:
        mix = torch.tensor(lam)
        return scalars(method, replace(views, indicators=same_t, mix=mix))

    unmixed, mixed = errors(lam), errors(0.5)

    expected = unmixed[f"reconstruction_{encoder}"]
    other = unmixed[f"reconstruction_{'m' if encoder == 'o' else 'o'}"]
    assert torch.equal(unmixed["reconstruction_h"], expected)
    assert not torch.isclose(unmixed["reconstruction_h"], other, rtol=1e-3)
    assert not torch.isclose(mixed["reconstruction_h"], expected, rtol=1e-3)


def test_a_hybrid_of_its_own_t_mixes_before_it_turns(build) -> None:
    """Rows 5 and 6: T_h of the mix, against the mix of T_o and T_m."""
    (paper, views_of), (official, _) = build(), build(crossmix="after_attention")
    views = views_of(1)
    lam = float(views.mix)

    own = paper._targets(views)["h"]
    both = official._targets(replace(views, indicators=views.indicators[:2]))

    mixed = lam * views.clean_o + (1 - lam) * views.clean_m
    for b, code in enumerate(views.indicators[2]):
        axes = [axis for axis in range(3) if code[axis]]
        turned = mixed[b, 0].flip(axes).rot90(int(code[3:].argmax()), (0, 1))
        torch.testing.assert_close(own[b, 0], turned)
    torch.testing.assert_close(both["h"], lam * both["o"] + (1 - lam) * both["m"])
    assert not torch.allclose(both["h"], own)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_gradient_reaches_the_momentum_networks_and_all_else_gets_one(build, preset) -> None:
    method, views_of = build(preset=preset)

    method.losses(views_of(1)).total.backward()

    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("momentum_"), name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_momentum_networks_move_by_the_average_of_parameters_and_buffers(build, preset) -> None:
    method, views_of = build(preset=preset)
    beta = {"paper": 0.99, "official": 0.999, "recommended": 0.99}[preset]
    make_momentum_differ(method)
    before = copy.deepcopy(method.state_dict())

    train_one_step(method, views_of(1))

    after = method.state_dict()
    moved = 0
    for name, value in after.items():
        if not name.startswith("momentum_"):
            continue
        twin = after[
            name.replace("momentum_encoder", "student.encoder").replace("momentum_proj", "proj")
        ]
        if value.is_floating_point():
            torch.testing.assert_close(value, beta * before[name] + (1 - beta) * twin)
            moved += int(not torch.equal(value, before[name]))
        else:
            assert torch.equal(value, twin)
    assert moved > 40


def test_pushed_are_query_key_and_hybrid_in_this_order(build) -> None:
    method, views_of = build()
    make_momentum_differ(method)
    views = views_of(1)

    losses = method.losses(views)

    query, key, hybrid = losses.pushed.chunk(3)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ method.queue.vectors.T], 1)
    expected = F.cross_entropy(logits / 0.2, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(losses.contrast, expected)
    torch.testing.assert_close(
        losses.total, 0.5 * losses.contrast + 0.5 * sum(losses.reconstruction.values())
    )
    unmixed = method.losses(
        replace(views, mix=torch.tensor(1.0), indicators=views.indicators[:1].expand(3, -1, -1))
    )
    torch.testing.assert_close(unmixed.pushed.chunk(3)[2], unmixed.pushed.chunk(3)[0])
    assert not torch.allclose(hybrid, query, atol=1e-3)
    assert torch.equal(losses.scans, views.scan.repeat(3))


@pytest.mark.parametrize("projector_input", ["pre", "post"])
def test_an_embedding_from_before_the_gate_does_not_depend_on_t(build, projector_input) -> None:
    """Row 3: what is served must not depend on an indicator drawn at random."""
    method, views_of = build(projector_input=projector_input)
    views = views_of(1)
    other = replace(views, indicators=views.indicators.flip(1))

    pushed, with_other_t = (method.losses(v).pushed for v in (views, other))

    assert torch.equal(pushed, with_other_t) == (projector_input == "pre")


def test_without_skips_the_decoder_reads_the_bottleneck_alone(build) -> None:
    (without, views_of), (with_skips, _) = build(skip=False), build()
    views = views_of(1)

    for method, reads in ((without, False), (with_skips, True)):
        features = method.student.encoder(views.input_o)
        blank = features._replace(
            skip64=torch.zeros_like(features.skip64), skip256=torch.zeros_like(features.skip256)
        )
        decoded, of_blank = (method.student.decoder(f) for f in (features, blank))
        assert torch.equal(decoded, of_blank) != reads
    narrower = without.student.decoder.up64.convs.first.conv.weight
    assert narrower.shape[1] == without.student.decoder.up64.up.out_channels


def test_one_scans_embeddings_are_no_negatives_of_each_other(build) -> None:
    """Trap B4: with `mask_same_scan` a queue of a query's own scan leaves nothing to contrast."""
    (masked, views_of), (plain, _) = build(mask_same_scan=True), build()
    plain.load_state_dict(masked.state_dict())
    views = views_of(1)
    views = replace(views, scan=torch.zeros_like(views.scan))

    def contrast(method: Pcrl, scan: int) -> float:
        method.queue.scans.fill_(scan)
        return float(scalars(method, views)["contrast"])

    assert contrast(masked, 0) == 0
    assert contrast(masked, 1) == contrast(plain, 0) == contrast(plain, 1) > 0.5


def test_momentum_groups_normalise_apart(build) -> None:
    method, views_of = build()
    views = views_of(1)

    grouped = encode_in_groups(method.momentum_encoder, views.input_m, method.recipe)

    for part in (slice(0, 2), slice(2, 4)):
        alone = method.momentum_encoder(views.input_m[part])
        torch.testing.assert_close(grouped.bottleneck[part], alone.bottleneck)
    together = method.momentum_encoder(views.input_m)
    assert not torch.allclose(grouped.bottleneck, together.bottleneck)


def test_a_folded_lambda_is_never_below_a_half(build) -> None:
    def draws(*, fold: bool) -> list[float]:
        recipe = build(mix_fold=fold)[0].recipe
        return [draw_mix(recipe.method, generator(0, step, "mix")) for step in range(200)]

    plain, folded = draws(fold=False), draws(fold=True)

    assert folded == [max(lam, 1 - lam) for lam in plain]
    assert min(plain) < 0.1 and min(folded) >= 0.5
    assert abs(sum(plain) / 200 - 0.5) < 0.1


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_is_one_graph_for_the_compiler(build, preset: str) -> None:
    """No branch on a tensor's value and no `.item()`: either would break `fullgraph`."""
    method, views_of = build(preset=preset)
    views = views_of(1)

    compiled = torch.compile(method.losses, backend="eager", fullgraph=True)(views)

    torch.testing.assert_close(compiled.total, method.losses(views).total)


@pytest.mark.parametrize(("intensity", "is_bounded"), [({}, True), ({"kind": "zscore"}, False)])
def test_z_scores_are_reconstructed_beyond_one(
    pretrain_recipe: PretrainRecipe, intensity, is_bounded: bool
) -> None:
    """MR has no window: a sigmoid could make none of its intensities above 1 or below 0."""
    fields = pretrain_recipe.model_dump()
    fields["preprocessing"]["intensity"] = intensity or {"kind": "window"}
    method = Pcrl(PretrainRecipe.model_validate(fields)).eval()
    assert isinstance(method.student, UNet3d)

    with torch.no_grad():
        method.student.out.bias.fill_(3.0)
        features = method.student.encoder(torch.rand(2, 1, 16, 16, 16))
        out = method._decode(features.bottleneck, features)

    assert bool(out.max() <= 1.0) == is_bounded
