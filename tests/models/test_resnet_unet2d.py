"""The 2D U-Net and its heads against algorithms.md 1.1, 6.1 and slow definitions."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.networks.heads import NUM_INDICATORS_2D, Projector, TransAttention
from models.networks.resnet_unet2d import (
    STRIDE,
    ResNet18Encoder,
    ResNetUNet2d,
    load_torchvision_resnet18,
)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_network_at_width_64_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        network = ResNetUNet2d(3, 3, 64, "batch")

        counts = [count(m) for m in (network.encoder, network.decoder, network.out, network)]

        assert counts == [11_176_512, 3_151_552, 435, 14_328_499]
        assert count(ResNetUNet2d(3, 3, 64, "group")) == 14_328_499


def test_encoding_and_decoding_take_the_papers_operations() -> None:
    with torch.device("meta"):
        network = ResNetUNet2d(3, 3, 64)
        image = torch.empty(1, 3, 224, 224)

        with FlopCounterMode(display=False) as of_encoder:
            features = network.encoder(image)
        with FlopCounterMode(display=False) as of_decoder:
            network.out(network.decoder(features))

    assert of_encoder.get_total_flops() == pytest.approx(3.63e9, rel=1e-3)
    assert of_decoder.get_total_flops() == pytest.approx(4.67e9, rel=1e-3)


def test_the_heads_at_512_channels_have_the_papers_parameters() -> None:
    with torch.device("meta"):
        squeeze = TransAttention(
            512, kind="se", post_conv=False, num_indicators=NUM_INDICATORS_2D, dims=2
        )
        with_conv = TransAttention(512, kind="se", num_indicators=NUM_INDICATORS_2D, dims=2)

        assert count(Projector(512, 128)) == 82_176
        assert count(squeeze) == 133_376
        assert count(with_conv) == 133_376 + 512 * 512 * 9 + 512


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("width", [4, 12])
def test_any_width_keeps_the_extent_of_the_image(norm: str, width: int) -> None:
    network = ResNetUNet2d(3, 2, width, "batch" if norm == "batch" else "group")
    image = torch.rand(2, 3, STRIDE, 2 * STRIDE)

    features = network.encoder(image)
    logits = network(image)

    assert logits.shape == (2, 2, 32, 64)
    assert [tuple(level.shape[1:]) for level in features] == [
        (width, 16, 32), (width, 8, 16), (2 * width, 4, 8), (4 * width, 2, 4), (8 * width, 1, 2),
    ]  # fmt: skip
    assert features.bottleneck is features[-1]


def test_a_width_that_leaves_half_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        ResNetUNet2d(width=6)


def test_both_norms_keep_their_affine_under_the_same_keys() -> None:
    batch = dict(ResNetUNet2d(width=8, norm="batch").named_parameters())
    group = dict(ResNetUNet2d(width=8, norm="group").named_parameters())

    assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in group.items()}
    assert sum("norm" in name for name in batch) == 2 * (20 + 10)


def test_a_decoder_level_doubles_joins_and_convolves_twice() -> None:
    torch.manual_seed(0)
    network = ResNetUNet2d(width=8).eval()
    level = network.decoder.up8
    x, skip = torch.rand(1, 32, 2, 3), torch.rand(1, 16, 4, 6)

    actual = level(x, skip)

    doubled = torch.zeros(1, 32, 4, 6)
    for r in range(4):
        for c in range(6):
            doubled[:, :, r, c] = x[:, :, r // 2, c // 2]
    expected = torch.cat([doubled, skip], dim=1)
    for part in (level.first, level.second):
        scale = (1 + part.norm.eps) ** -0.5  # running statistics of a fresh norm: 0 and 1
        expected = torch.relu(F.conv2d(expected, part.conv.weight, padding=1) * scale)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["outer", "se"])
def test_attention_in_2d_is_attention_in_3d_on_one_slice(kind: str) -> None:
    torch.manual_seed(0)
    chosen = "outer" if kind == "outer" else "se"
    flat = TransAttention(6, kind=chosen, num_indicators=6, dims=2)
    deep = TransAttention(6, kind=chosen, num_indicators=6, dims=3)
    weights = {k: v for k, v in flat.state_dict().items() if k != "post_conv.weight"}
    centre = torch.zeros(6, 6, 3, 3, 3)
    centre[..., 1] = flat.state_dict()["post_conv.weight"]
    deep.load_state_dict({**weights, "post_conv.weight": centre})
    bottleneck, indicator = torch.rand(3, 6, 4, 5), torch.rand(3, 6)

    actual = flat(bottleneck, indicator)

    assert actual.shape == bottleneck.shape
    torch.testing.assert_close(actual, deep(bottleneck[..., None], indicator)[..., 0])
    assert not torch.allclose(actual, flat(bottleneck, 1 - indicator))


def test_embeddings_of_2d_bottlenecks_have_unit_length() -> None:
    embedding = Projector(8, 5)(torch.rand(3, 8, 2, 2))

    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def foreign_resnet18() -> dict[str, Tensor]:
    """Random values under the names and in the shapes of torchvision's ResNet-18."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    norms = {"bn1": 64}
    channels = 64
    for layer, out in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            at = f"layer{layer}.{block}"
            shapes[f"{at}.conv1.weight"] = (out, channels, 3, 3)
            shapes[f"{at}.conv2.weight"] = (out, out, 3, 3)
            norms |= {f"{at}.bn1": out, f"{at}.bn2": out}
            if out != channels:
                shapes[f"{at}.downsample.0.weight"] = (out, channels, 1, 1)
                norms[f"{at}.downsample.1"] = out
            channels = out
    for name, size in norms.items():
        parts = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{name}.{part}": (size,) for part in parts}
    shapes |= {"fc.weight": (1000, 512), "fc.bias": (1000,)}
    random = torch.Generator().manual_seed(0)
    return {
        # Small values, so that eighteen layers neither explode nor vanish.
        name: torch.rand(shape, generator=random) * (0.1 if len(shape) == 4 else 1) + 0.01
        for name, shape in shapes.items()
    }


def slow_resnet18(weights: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """ResNet-18 as published, from torchvision's names; the five levels."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        unit = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
        return (
            unit * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]
        )

    x = F.conv2d(image, weights["conv1.weight"], stride=2, padding=3)
    levels = [torch.relu(norm(x, "bn1"))]
    x = F.max_pool2d(levels[0], 3, stride=2, padding=1)
    for layer in range(1, 5):
        for block in (0, 1):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = F.conv2d(x, weights[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = torch.relu(norm(y, f"{at}.bn1"))
            y = norm(F.conv2d(y, weights[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if f"{at}.downsample.0.weight" in weights:
                x = F.conv2d(x, weights[f"{at}.downsample.0.weight"], stride=stride)
                x = norm(x, f"{at}.downsample.1")
            x = torch.relu(y + x)
        levels.append(x)
    return levels


def test_weights_of_torchvision_make_the_encoder_its_resnet18() -> None:
    weights = foreign_resnet18()
    encoder = ResNet18Encoder(3, 64).eval()
    image = torch.rand(1, 3, 32, 64)
    fresh = [level.detach().clone() for level in encoder(image)]

    report = load_torchvision_resnet18(encoder, weights)

    for level, expected, before in zip(
        encoder(image), slow_resnet18(weights, image), fresh, strict=True
    ):
        torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(level, before, rtol=1e-3, atol=1e-3)
    assert report.left == ("fc.bias", "fc.weight")
    assert len(report.taken) == len(weights) - 2


def test_a_group_norm_encoder_takes_the_affine_and_leaves_the_statistics() -> None:
    weights = foreign_resnet18()
    encoder = ResNet18Encoder(3, 64, norm="group")

    report = load_torchvision_resnet18(encoder, weights)

    assert torch.equal(encoder.state_dict()["stem.norm.weight"], weights["bn1.weight"])
    assert {name.rpartition(".")[2] for name in report.left} == {
        "running_mean", "running_var", "bias", "weight",
    }  # fmt: skip
    assert {name for name in report.left if name.endswith(("weight", "bias"))} == {
        "fc.weight", "fc.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, r"conv1.weight is \(64, 1, 7, 7\)"),
        ({"layer3.1.bn2.bias": None}, "no layer3.1.bn2.bias"),
    ],
)
def test_another_network_is_refused_before_anything_is_copied(
    change: dict[str, Tensor | None], message: str
) -> None:
    weights = {k: v for k, v in {**foreign_resnet18(), **change}.items() if v is not None}
    encoder = ResNet18Encoder(3, 64)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    with pytest.raises(ValueError, match=message):
        load_torchvision_resnet18(encoder, weights)

    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
