"""The encoder of a checkpoint or a bundle, and the same network with random weights.

B batch, F features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor, nn

from models import bundle
from models.bundle import BundleError
from models.networks.unet3d import pooled
from models.recipe import AnyRecipe, Recipe
from trainer import checkpoint
from trainer.build import build
from trainer.errors import DataError

_RECIPE: TypeAdapter[AnyRecipe] = TypeAdapter(Recipe)
_PART = "encoder."


def load_encoder(path: Path) -> tuple[nn.Module, AnyRecipe, str]:
    """The encoder, the recipe that it was trained by, and what it came from.

    Args:
        path: A checkpoint's file or a bundle's folder, of pretraining or fine-tuning.

    Raises:
        DataError: `bad_encoder`.
    """
    if not path.exists():
        raise DataError("bad_encoder", "there is neither a checkpoint nor a bundle")
    try:
        weights, recipe, name = _of_bundle(path) if path.is_dir() else _of_checkpoint(path)
    except BundleError as error:
        raise DataError("bad_encoder", str(error)) from error
    encoder = random_encoder(recipe, seed=0)
    own = {key.partition(_PART)[2]: value for key, value in weights.items() if _PART in key}
    try:
        encoder.load_state_dict(own)
    except RuntimeError as error:
        detail = "its weights are not those of its recipe's network"
        raise DataError("bad_encoder", detail) from error
    return encoder, recipe, name


def random_encoder(recipe: AnyRecipe, *, seed: int) -> nn.Module:
    """The recipe's encoder before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build(recipe, fused=False).encoder
    assert isinstance(encoder, nn.Module)
    return encoder.eval()


@torch.inference_mode()
def features_of(
    encoder: nn.Module, images: Tensor, device: torch.device, batch: int = 32
) -> Tensor:
    """GAP of the last level, float32 (B, F) on the host, with the statistics of training."""
    was_training = encoder.training
    encoder.eval()
    parts = [
        pooled(encoder(part.to(device).float()).bottleneck).float()
        for part in torch.split(images, batch)
    ]
    encoder.train(was_training)
    return torch.cat(parts).cpu()


def _of_bundle(folder: Path) -> tuple[dict[str, Tensor], AnyRecipe, str]:
    manifest = bundle.load(folder)
    if not (folder / bundle.WEIGHTS).is_file():
        raise DataError("bad_encoder", f"the bundle has no {bundle.WEIGHTS}")
    with safe_open(folder / bundle.WEIGHTS, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
    found = {name: value for name, value in weights.items() if name.startswith(_PART)}
    return found, manifest.recipe, bundle.digest_of(folder)


def _of_checkpoint(path: Path) -> tuple[dict[str, Tensor], AnyRecipe, str]:
    state = checkpoint.load(path)
    recipe = _RECIPE.validate_json(state["recipe"])
    start = f"student.{_PART}" if "method" in state else _PART
    weights: dict[str, Tensor] = state["method"] if "method" in state else state["network"]
    found = {name: value for name, value in weights.items() if name.startswith(start)}
    return found, recipe, f"{path.name}, step {state['step']}"
