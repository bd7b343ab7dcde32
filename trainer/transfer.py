"""Weights of a bundle into a fine-tuning network, key by key; every key is accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from models import bundle
from models.bundle import BundleError, Manifest
from models.recipe import AnyClassify, FinetuneRecipe
from trainer.build import STEMS
from trainer.errors import DataError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Transfer:
    """What became of the parent's keys.

    Attributes:
        parent_digest: The parent bundle.
        loaded: Keys whose values the network took.
        skipped: Keys of the parent that it did not take.
        fresh: Keys of the network that stay random.
        inflated: Keys among `loaded` that were spread over more input channels.
    """

    parent_digest: str
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    fresh: tuple[str, ...]
    inflated: tuple[str, ...] = ()


def load_parent(network: nn.Module, parent: Path, recipe: FinetuneRecipe | AnyClassify) -> Transfer:
    """Start a network from a bundle.

    The affine of each batch norm becomes the affine of the group norm in its place; running
    statistics are taken by a batch norm and skipped by a group norm. The output layer is taken
    only from a model of the same kind and the same labels. A stem that read one channel is spread
    over all channels of the recipe (`inflated`).

    Raises:
        DataError: `incompatible_parent`, `bad_parent`.
    """
    try:
        manifest = bundle.load(parent)
    except BundleError as error:
        raise DataError("bad_parent", str(error)) from error
    found, expected = manifest.recipe.network.kind, recipe.network.kind
    if found != expected:
        raise DataError("incompatible_parent", f"the parent is a {found}, the recipe's {expected}")
    if not (parent / bundle.WEIGHTS).is_file():
        raise DataError("bad_parent", f"the bundle has no {bundle.WEIGHTS}")
    with safe_open(parent / bundle.WEIGHTS, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
    wanted = _wanted(manifest, recipe)
    chosen = {k: v for k, v in weights.items() if k.startswith(wanted)}
    stem, num_channels = STEMS[recipe.network.kind], len(recipe.channels)
    is_inflated = stem in chosen and chosen[stem].shape[1] == 1 and num_channels > 1
    if is_inflated:
        chosen[stem] = inflated(chosen[stem], num_channels)
    loaded = take(network, chosen)
    ours = network.state_dict().keys()
    return Transfer(
        parent_digest=bundle.digest_of(parent),
        loaded=tuple(loaded),
        skipped=tuple(sorted(weights.keys() - set(loaded))),
        fresh=tuple(sorted(ours - set(loaded))),
        inflated=(stem,) if is_inflated else (),
    )


def inflated(weight: Tensor, num_channels: int) -> Tensor:
    """A stem for several channels that answers to equal channels as it did to the one (bug B17).

    Args:
        weight: (F, 1, ...) of a convolution.
        num_channels: C.

    Returns:
        (F, C, ...): copies divided by C.
    """
    shape = [weight.shape[0], num_channels, *weight.shape[2:]]
    return weight.expand(shape) / num_channels


def take(network: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Copy every value that has its place in the network.

    Returns:
        The keys copied. Not copied are the statistics of batch norm, when the network has none.

    Raises:
        DataError: `incompatible_parent`: a key with no place or of another shape, or a part of
            the network (its encoder, say) that `weights` fills with a hole in it.
    """
    own = network.state_dict()
    loaded = []
    for name, value in weights.items():
        if name not in own:
            if name.rpartition(".")[2] in _STATISTICS:
                continue
            raise DataError("incompatible_parent", f"the network has no {name}")
        if own[name].shape != value.shape:
            raise DataError(
                "incompatible_parent",
                f"{name} is {tuple(value.shape)} in the parent, {tuple(own[name].shape)} here",
            )
        own[name].copy_(value)
        loaded.append(name)
    parts = {name.partition(".")[0] for name in weights}
    for name in own.keys() - set(loaded):
        if name.partition(".")[0] in parts and name.rpartition(".")[2] not in _STATISTICS:
            raise DataError("incompatible_parent", f"the parent has no {name}")
    return sorted(loaded)


def _wanted(manifest: Manifest, recipe: FinetuneRecipe | AnyClassify) -> tuple[str, ...]:
    """Prefixes of the parent's keys to take."""
    if not isinstance(recipe, FinetuneRecipe):
        is_same = manifest.kind == "classifier" and manifest.labels == recipe.labels
        return ("encoder.", "head.") if is_same else ("encoder.",)
    if recipe.transfer == "encoder":
        return ("encoder.",)
    activation = "softmax" if recipe.labels else "sigmoid"
    same = (manifest.labels, manifest.activation) == (recipe.targets, activation)
    if manifest.kind == "classifier":
        raise DataError("incompatible_parent", "the parent is a classifier and has no decoder")
    is_same = manifest.kind == "segmenter" and same
    return ("encoder.", "decoder.", "out.") if is_same else ("encoder.", "decoder.")
