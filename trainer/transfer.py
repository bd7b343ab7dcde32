"""Weights of a bundle into a fine-tuning network, key by key; every key is accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from models import bundle
from models.bundle import BundleError
from models.networks.unet3d import UNet3d
from models.recipe import FinetuneRecipe
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Transfer:
    """What became of the parent's keys.

    Attributes:
        parent_digest: The parent bundle.
        loaded: Keys whose values the network took.
        skipped: Keys of the parent that it did not take.
        fresh: Keys of the network that stay random.
    """

    parent_digest: str
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    fresh: tuple[str, ...]


def load_parent(network: UNet3d, parent: Path, recipe: FinetuneRecipe) -> Transfer:
    """Start a network from a bundle.

    The affine of each batch norm becomes the affine of the group norm in its place; running
    statistics have no counterpart and are skipped. The output layer is taken only from a segmenter
    of the same labels, with its decoder.

    Raises:
        DataError: `incompatible_parent`, `bad_parent`.
    """
    try:
        manifest = bundle.load(parent)
    except BundleError as error:
        raise DataError("bad_parent", str(error)) from error
    if manifest.recipe.network != recipe.network:
        raise DataError(
            "incompatible_parent",
            f"the parent's base_width is {manifest.recipe.network.base_width}, "
            f"the recipe's {recipe.network.base_width}",
        )
    if not (parent / bundle.WEIGHTS).is_file():
        raise DataError("bad_parent", f"the bundle has no {bundle.WEIGHTS}")
    wanted = ["encoder."]
    if recipe.transfer == "encoder_decoder":
        wanted.append("decoder.")
        if manifest.labels == tuple(recipe.labels):
            wanted.append("out.")
    with safe_open(parent / bundle.WEIGHTS, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
    chosen = {k: v for k, v in weights.items() if k.startswith(tuple(wanted))}
    loaded = take(network, chosen)
    ours = network.state_dict().keys()
    return Transfer(
        parent_digest=bundle.digest_of(parent),
        loaded=tuple(loaded),
        skipped=tuple(sorted(weights.keys() - set(loaded))),
        fresh=tuple(sorted(ours - set(loaded))),
    )


def take(network: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Copy every value that has its place in the network.

    Returns:
        The keys copied. Not copied are the statistics of batch norm, when the network has none.

    Raises:
        DataError: `incompatible_parent`: a key with no place, or of another shape.
    """
    own = network.state_dict()
    loaded = []
    for name, value in weights.items():
        if name not in own:
            if name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
                continue
            raise DataError("incompatible_parent", f"the network has no {name}")
        if own[name].shape != value.shape:
            raise DataError(
                "incompatible_parent",
                f"{name} is {tuple(value.shape)} in the parent, {tuple(own[name].shape)} here",
            )
        own[name].copy_(value)
        loaded.append(name)
    return sorted(loaded)
