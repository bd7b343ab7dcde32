"""The network that a recipe asks for: one dict a kind of architecture."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.networks.classifier import Classifier
from models.networks.unet3d import Norm, UNet3d, UNet3dEncoder
from models.recipe import AnyRecipe, ClassifyRecipe, FinetuneRecipe, PretrainRecipe

ENCODERS: dict[str, Callable[[int, int, Norm], tuple[nn.Module, int]]] = {
    "unet3d": lambda channels, width, norm: (UNet3dEncoder(channels, width, norm), 16 * width),
}
"""By `recipe.network.kind`: input channels, base width and norm to an encoder and its features."""

STEMS = {"unet3d": "encoder.down64.first.conv.weight"}
"""The first convolution, whose weight knows how many channels the image has."""


def build(recipe: AnyRecipe, *, fused: bool) -> nn.Module:
    """A network with random weights.

    Args:
        recipe: What to build it for.
        fused: Whether a decoder computes its up-convolutions fused; changes no parameter.
    """
    width, norm = recipe.network.base_width, norm_of(recipe)
    match recipe:
        case PretrainRecipe():
            return UNet3d(1, 1, width, norm, fused=fused, skip=recipe.method.skip)
        case FinetuneRecipe():
            return UNet3d(len(recipe.channels), num_outputs(recipe), width, norm, fused=fused)
        case ClassifyRecipe():
            make = ENCODERS[recipe.network.kind]
            encoder, num_features = make(len(recipe.channels), width, norm)
            return Classifier(encoder, num_features, num_outputs(recipe))


def num_outputs(recipe: FinetuneRecipe | ClassifyRecipe) -> int:
    """Logits of the network: one a label, and one for the background of exclusive classes."""
    if isinstance(recipe, ClassifyRecipe):
        return len(recipe.labels)
    return 1 + len(recipe.labels) if recipe.labels else len(recipe.regions)


def norm_of(recipe: AnyRecipe) -> Norm:
    """Batch norm in pretraining, group norm where fine-tuning has small batches (P, section 7)."""
    if isinstance(recipe, ClassifyRecipe):
        return recipe.norm
    return "batch" if isinstance(recipe, PretrainRecipe) else "group"
