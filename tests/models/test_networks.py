"""The U-Net and the heads against the numbers of algorithms.md 1.1 and slow definitions."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.networks import fused_up
from models.networks.fused_up import Form
from models.networks.heads import OuterGate, Projector, TransAttention
from models.networks.unet3d import Features, Norm, SkipResponses, UNet3d, fold


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_network_at_width_32_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        network = UNet3d(1, 1, 32, "batch")

        counts = [count(m) for m in (network.encoder, network.decoder, network.out, network)]

        assert counts == [7_027_776, 12_045_824, 65, 19_073_665]
        assert count(UNet3d(1, 1, 32, "group")) == 19_073_665


def test_the_heads_at_512_channels_have_the_papers_parameters() -> None:
    with torch.device("meta"):
        projector = Projector(512, 128)
        squeeze = TransAttention(512, kind="se", post_conv=False)
        outer = TransAttention(512, kind="outer", post_conv=False)
        low_rank = TransAttention(512, kind="outer", rank=8, post_conv=False)

        assert count(projector) == 82_176
        assert count(squeeze) == 133_632
        assert count(outer) == 133_632 + 512**3
        assert count(low_rank) == 133_632 + 3 * 512 * 8


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("width", [2, 3, 8])
def test_any_width_keeps_the_extent_of_the_image(norm: str, width: int) -> None:
    network = UNet3d(1, 3, width, "batch" if norm == "batch" else "group")
    image = torch.rand(2, 1, 16, 24, 32)

    features = network.encoder(image)
    logits = network(image)

    assert logits.shape == (2, 3, 16, 24, 32)
    assert features.skip64.shape == (2, 2 * width, 16, 24, 32)
    assert features.bottleneck.shape == (2, 16 * width, 2, 3, 4)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_outer_gate_equals_the_outer_product_fed_to_a_linear_layer(rank: int | None) -> None:
    torch.manual_seed(0)
    channels = 6
    gate = OuterGate(channels, rank)
    bottleneck, indicator = torch.rand(4, channels, 2, 2, 2), torch.rand(4, 7)
    if rank is None:
        weight = gate.bilinear.weight  # (C, C_p, C_l)
    else:
        parts = gate.bilinear
        weight = torch.einsum(
            "cr,ra,rb->cab", parts.out.weight, parts.of_p.weight, parts.of_l.weight
        )

    actual = gate(bottleneck, indicator)

    f_p, f_l = gate.condition(indicator), bottleneck.mean((2, 3, 4))
    for b in range(4):
        outer = f_p[b][:, None] @ f_l[b][None, :]  # M of Eq. 1
        expected = torch.sigmoid(torch.relu(weight.reshape(channels, -1) @ outer.flatten()))
        torch.testing.assert_close(actual[b], expected)
    assert (actual >= 0.5).all() and (actual < 1).all()


def test_embeddings_have_unit_length() -> None:
    embedding = Projector(8, 5)(torch.rand(3, 8, 2, 2, 2))

    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def networks_of_one_function(norm: Norm) -> tuple[UNet3d, UNet3d]:
    """A plain and a fused network with the same parameters, in float64."""
    torch.manual_seed(0)
    plain = UNet3d(1, 3, 4, norm, fused=False).double()
    fused = UNet3d(1, 3, 4, norm, fused=True).double()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("form", ["transposed", "windows"])
def test_the_fused_decoder_is_the_plain_one_with_its_gradients(norm: Norm, form: Form) -> None:
    plain, fused = networks_of_one_function(norm)
    for level in (fused.decoder.up256, fused.decoder.up128, fused.decoder.up64):
        level.form = form
    image = torch.rand(3, 1, 8, 24, 16, dtype=torch.float64)  # one voxel wide at the bottleneck

    outputs = [network(image) for network in (plain, fused)]
    for output in outputs:
        output.square().mean().backward()

    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_the_fused_network_is_equal_in_float32_to_1e_4() -> None:
    plain, fused = networks_of_one_function("group")
    image = torch.rand(3, 1, 16, 8, 24)

    difference = (plain.float()(image) - fused.float()(image)).abs().max()

    assert difference < 1e-4


@pytest.mark.parametrize("form", ["transposed", "windows"])
def test_a_folded_network_answers_like_the_one_it_came_from(form: Form) -> None:
    plain, fused = networks_of_one_function("group")
    image = torch.rand(2, 1, 16, 24, 8, dtype=torch.float64)

    for network in (plain, fused):
        folded = fold(network, form)

        torch.testing.assert_close(folded(image), plain(image), rtol=0, atol=1e-12)
        assert set(network.state_dict()) == set(plain.state_dict())


def test_a_wrong_tap_at_the_border_would_be_seen() -> None:
    """Negative control: without the ones' channel the transposed bias leaks past the border."""
    plain, fused = networks_of_one_function("group")
    level = fused.decoder.up64
    kernel, bias = level._fused_kernels()
    inner = bias.sum(dim=(2, 3, 4), keepdim=True).expand_as(bias) / 8  # right inside only
    x = torch.rand(1, 16, 2, 2, 2, dtype=torch.float64)
    doubled = plain.decoder.up64.up(x)
    of_up, _ = plain.decoder.up64._halves()
    expected = nn.functional.conv3d(doubled, of_up, padding=1)

    torch.testing.assert_close(fused_up.fused_up(x, kernel, bias), expected, rtol=0, atol=1e-12)
    assert (fused_up.fused_up(x, kernel, inner) - expected).abs().max() > 1e-3


def test_a_mix_of_skip_responses_decodes_like_the_mixed_skips() -> None:
    plain, fused = networks_of_one_function("group")
    one, other = (plain.encoder(torch.rand(2, 1, 8, 8, 16, dtype=torch.float64)) for _ in range(2))
    mixed = Features(*(0.3 * a + 0.7 * b for a, b in zip(one, other, strict=True)))

    responses = zip(
        fused.decoder.skip_responses(one), fused.decoder.skip_responses(other), strict=True
    )
    decoded = fused.decoder.decode(
        mixed.bottleneck, SkipResponses(*(0.3 * a + 0.7 * b for a, b in responses))
    )

    torch.testing.assert_close(decoded, plain.decoder(mixed), rtol=0, atol=1e-12)


def test_without_skips_fused_folded_and_plain_are_one_function() -> None:
    torch.manual_seed(0)
    plain = UNet3d(1, 1, 4, "group", fused=False, skip=False).double()
    fused = UNet3d(1, 1, 4, "group", fused=True, skip=False).double()
    fused.load_state_dict(plain.state_dict())
    image = torch.rand(2, 1, 8, 16, 24, dtype=torch.float64)

    expected = plain(image)

    for network in (fused, fold(plain), fold(fused)):
        torch.testing.assert_close(network(image), expected, rtol=0, atol=1e-12)
    with torch.device("meta"):
        narrow, whole = UNet3d(skip=False), UNet3d()
        of_skips = sum(27 * skip * skip for skip in (256, 128, 64))
        assert count(whole) - count(narrow) == of_skips


def test_fusing_saves_the_operations_that_it_promises() -> None:
    """algorithms.md 6.4: an inference decode falls from 210 to 132 GFLOP at 64x64x32."""

    def gflop(network: UNet3d) -> float:
        image = torch.empty(1, 1, 64, 64, 32, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            features = network.encoder(image)
            encoder = counter.get_total_flops()
            network.out(network.decoder(features))
        return (counter.get_total_flops() - encoder) / 1e9

    network = UNet3d(fused=False)
    plain, fused = gflop(network.to("meta")), gflop(fold(UNet3d(), "transposed").to("meta"))

    assert plain == pytest.approx(210.47, rel=1e-3)
    assert fused == pytest.approx(132, rel=0.01)
