"""The U-Net and the heads against the numbers of algorithms.md 1.1 and slow definitions."""

import pytest
import torch
from torch import nn

from models.networks.heads import OuterGate, Projector, TransAttention
from models.networks.unet3d import UNet3d


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
