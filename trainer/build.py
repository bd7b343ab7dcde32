"""The network that a recipe asks for, with random weights."""

from __future__ import annotations

import torch
from torch import nn

from models.networks.classifier import Classifier
from models.networks.encoder_alone import EncoderAlone
from models.networks.resnet_unet2d import ResNet18Encoder, ResNetUNet2d
from models.networks.unet3d import Norm, UNet3d, UNet3dEncoder
from models.recipe import (
    AnyClassify,
    AnyPretrain,
    AnyRecipe,
    ClassifyRecipe,
    ClassifyRecipe2d,
    FinetuneRecipe,
    PretrainRecipe,
    PretrainRecipe2d,
)

STEMS = {
    "unet3d": "encoder.down64.first.conv.weight",
    "resnet18_unet2d": "encoder.stem.conv.weight",
}
"""The first convolution, whose weight knows how many channels the image has."""

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""How the weights of convolutions lie in memory, by their axes: 2D and 3D."""


def build(recipe: AnyRecipe, *, fused: bool) -> nn.Module:
    """A network with random weights.

    Args:
        recipe: What to build it for.
        fused: Whether a decoder in 3D computes its up-convolutions fused; changes no parameter.
    """
    norm, num_features = norm_of(recipe), recipe.network.num_features
    match recipe:
        case PretrainRecipe() | PretrainRecipe2d():
            return build_student(recipe, fused=fused)
        case FinetuneRecipe():
            channels, width = len(recipe.channels), recipe.network.base_width
            return UNet3d(channels, num_outputs(recipe), width, norm, fused=fused)
        case ClassifyRecipe():
            encoder: nn.Module = UNet3dEncoder(
                len(recipe.channels), recipe.network.base_width, norm
            )
            return Classifier(encoder, num_features, num_outputs(recipe))
        case ClassifyRecipe2d():
            encoder = ResNet18Encoder(recipe.network.in_channels, recipe.network.width, norm)
            return Classifier(encoder, num_features, num_outputs(recipe))


Student = UNet3d | ResNetUNet2d | EncoderAlone
"""What pretraining makes; its `encoder` is what is served."""


def build_student(recipe: AnyPretrain, *, fused: bool) -> Student:
    """The encoder that the recipe trains, with its decoder, if the method trains one.

    The decoder gives as many channels as the image has.
    """
    if not recipe.method.trains_decoder:
        return EncoderAlone(build_encoder(recipe))
    norm, skip = norm_of(recipe), recipe.method.has_skips
    if isinstance(recipe, PretrainRecipe2d):
        channels = recipe.network.in_channels
        return ResNetUNet2d(channels, channels, recipe.network.width, norm, skip=skip)
    return UNet3d(1, 1, recipe.network.base_width, norm, fused=fused, skip=skip)


def build_encoder(recipe: AnyPretrain) -> UNet3dEncoder | ResNet18Encoder:
    """The encoder alone."""
    if isinstance(recipe, PretrainRecipe2d):
        channels = recipe.network.in_channels
        return ResNet18Encoder(channels, recipe.network.width, norm_of(recipe))
    return UNet3dEncoder(1, recipe.network.base_width, norm_of(recipe))


def lay_out(network: nn.Module) -> None:
    """Put the channels of every convolution last, as the fastest kernels read them."""
    for parameter in network.parameters():
        if parameter.ndim in LAYOUTS:
            parameter.data = parameter.data.contiguous(memory_format=LAYOUTS[parameter.ndim])


def num_outputs(recipe: FinetuneRecipe | AnyClassify) -> int:
    """Logits of the network: one a label, and one for the background of exclusive classes."""
    if isinstance(recipe, FinetuneRecipe):
        return 1 + len(recipe.labels) if recipe.labels else len(recipe.regions)
    return len(recipe.labels)


def norm_of(recipe: AnyRecipe) -> Norm:
    """Batch norm in pretraining, group norm where fine-tuning has small batches (P, section 7)."""
    match recipe:
        case PretrainRecipe() | PretrainRecipe2d():
            return "batch"
        case FinetuneRecipe():
            return "group"
        case _:
            return recipe.norm
