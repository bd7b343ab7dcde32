"""An encoder with ImageNet's weights, from a file: a bundle like any other, with nothing trained.

Every key of the file is accounted for: what the encoder took, and what it did not, stands in the
lineage, with the file's SHA-256 as the parent's digest.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.bundle import sha256_of
from models.networks.resnet_unet2d import (
    ResNet18Encoder,
    Taken,
    load_torchvision_resnet18,
)
from models.recipe import ImageNet, PretrainRecipe2d
from trainer import export, folder
from trainer.build import build_encoder
from trainer.data.images2d import load_images
from trainer.data.scan_set import ScanSet
from trainer.errors import DataError
from trainer.report import Report


def run(
    recipe: PretrainRecipe2d,
    weights: Path,
    scans: ScanSet,
    out: Path,
    report: Report,
    *,
    device: torch.device,
    run_id: str | None = None,
    cache: Path | None = None,
) -> Path:
    """Make the bundle, proven as after a pretraining.

    Args:
        recipe: Its method is `imagenet`.
        weights: A state dict of torchvision's ResNet-18: safetensors, or what `torch.save` wrote.
        scans: What the encoder will be used on: the parity check's input, and the digest.
        out: The run's folder.
        report: Told what was not taken.
        device: Where the exported network runs over the scans.
        run_id: The service's name for the run.
        cache: Folder of prepared images; `out/cache` if None.

    Raises:
        DataError: `bad_weights`: the file is none of these, or not the one that is meant.
        ParityError: ONNX and torch disagree.
    """
    assert isinstance(recipe.method, ImageNet)
    if (done := folder.finished(out, recipe, report)) is not None:
        return done
    digest = _digest(weights, recipe.method.sha256)
    encoder, taken = load_encoder(recipe, weights)
    report.log("info", f"{len(taken.taken)} keys taken; not taken: {', '.join(taken.left) or '-'}")
    spec, chosen = recipe.preprocessing, scans.of("train")
    images = load_images(chosen, spec, cache or out / folder.CACHE, report, device)
    sample = images.inputs(torch.tensor([0]), spec).half().cpu()
    state = {
        **folder.header(recipe, scans, sample, device, run_id),
        "step": 0,
        "method": {f"student.encoder.{key}": v for key, v in encoder.state_dict().items()},
        "parent_digest": digest,
        "loaded_keys": list(taken.taken),
        "skipped_keys": list(taken.left),
    }
    return export.publish(state, out / folder.BUNDLE, report, chosen, device=device)


def load_encoder(recipe: PretrainRecipe2d, weights: Path) -> tuple[ResNet18Encoder, Taken]:
    """The recipe's encoder with the weights of a file, and what became of the file's keys.

    Raises:
        DataError: `bad_weights`: the file is no ResNet-18, or does not fit the recipe's width.
    """
    encoder = build_encoder(recipe)
    assert isinstance(encoder, ResNet18Encoder)
    try:
        return encoder, load_torchvision_resnet18(encoder, read_weights(weights))
    except ValueError as error:
        raise DataError("bad_weights", str(error)) from error


def choose(recipe: ImageNet, files: Mapping[str, Path]) -> str:
    """The digest of the file that a recipe means, of several by their SHA-256.

    Raises:
        DataError: `bad_weights`: none of the files is meant, or it is not told which.
    """
    if not files:
        raise DataError("bad_weights", "it takes its weights from a file: --weights FILE")
    if recipe.sha256 is not None:
        if recipe.sha256 not in files:
            found = ", ".join(files)
            raise DataError("bad_weights", f"the recipe says {recipe.sha256}, found {found}")
        return recipe.sha256
    if len(files) > 1:
        raise DataError("bad_weights", "several files are given; `sha256` tells which is meant")
    return next(iter(files))


def by_digest(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by their SHA-256.

    Raises:
        DataError: `bad_weights`: one is not there.
    """
    return {_digest(path, None): path for path in paths}


def read_weights(path: Path) -> dict[str, Tensor]:
    """A file's tensors by name; never runs code from it.

    Raises:
        DataError: `bad_weights`.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        kind = type(error).__name__
        raise DataError(
            "bad_weights", f"neither safetensors nor a state dict that is safe to read ({kind})"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise DataError("bad_weights", "the file holds no plain state dict of tensors")
    return found


def _digest(path: Path, expected: str | None) -> str:
    if not path.is_file():
        raise DataError("bad_weights", "there is no file of weights")
    found = sha256_of(path)
    if expected is not None and found != expected:
        raise DataError("bad_weights", f"the file's SHA-256 is {found}, the recipe says {expected}")
    return found
