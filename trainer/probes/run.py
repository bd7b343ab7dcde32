"""A probe on scans: examples of every patient, one linear layer, and two controls.

The encoder is judged on patients whose examples the layer did not see. A random encoder of the same
shape says what the network's form alone gives; shuffled answers say what chance gives here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from models.recipe import Preprocessing, Preprocessing2d
from trainer.data.cache import Case, VolumeCache
from trainer.data.images2d import ImageCache, ResidentImages
from trainer.data.resident import Resident, Size
from trainer.data.scan_set import ScanFile, ScanSet
from trainer.errors import DataError
from trainer.probes import examples
from trainer.probes.crops import lively_crops
from trainer.probes.encoders import features_of, load_encoder, random_encoder
from trainer.probes.linear import Accuracy, accuracy, fit, is_right
from trainer.randomness import generator
from trainer.report import Report

Probe = Literal["rotation", "position"]
NUM_CLASSES: Mapping[Probe, int] = {
    "rotation": examples.NUM_TURNS, "position": len(examples.NEIGHBOURS),
}  # fmt: skip
CROPS_PER_SCAN = 8
ROTATED_3D: Size = (32, 32, 32)
"""Voxels of a turned crop, along I and J alike."""


def run(
    probe: Probe,
    model: Path,
    scans: ScanSet,
    cache: Path,
    report: Report,
    *,
    device: torch.device,
    seed: int = 0,
) -> dict[str, object]:
    """Probe an encoder.

    Args:
        probe: What is asked.
        model: Checkpoint or bundle.
        scans: Those of `train` fit the layer, all others test it.
        cache: Folder of preprocessed scans.
        report: Where progress goes.
        device: Where the encoder runs.
        seed: Of crops, patches, the random encoder and the shuffling.

    Returns:
        Accuracy with its interval, JSON-able, and the controls.

    Raises:
        DataError: `bad_encoder`, `no_scans`, `unusable_scan`.
    """
    encoder, recipe, name = load_encoder(model)
    if len(getattr(recipe, "channels", ("image",))) > 1:
        raise DataError("bad_encoder", "an encoder of several channels has no probe")
    parts = [scans.of("train"), scans.of("val") + scans.of("test")]
    if not all(parts):
        raise DataError("no_scans", "a probe needs patients to fit on, and others to test on")
    size = ROTATED_3D if probe == "rotation" else examples.area_3d()
    read = []
    for done, part in enumerate(parts, start=1):
        read.append(_images(part, recipe.preprocessing, size, cache, seed))
        report.progress("probe", done, len(parts))
    encoders = {"": encoder, "random_encoder": random_encoder(recipe, seed=seed)}
    embedded = {
        of: [answered(probe, net.to(device), images, device, seed) for images, _ in read]
        for of, net in encoders.items()
    }
    patients = [owners(probe, who) for _, who in read]
    found = {of: _judge(pair[0], pair[1], patients[1]) for of, pair in embedded.items()}
    (seen, answers), asked = embedded[""]
    shuffled = answers[torch.randperm(len(answers), generator=generator(seed, 0, "shuffle"))]
    found["shuffled_labels"] = _judge((seen, shuffled), asked, patients[1])
    return {
        "probe": probe,
        "encoder": name,
        "num_classes": NUM_CLASSES[probe],
        "chance": 1 / NUM_CLASSES[probe],
        **_shown(found.pop("")),
        "num_patients": {"fit": len(set(patients[0])), "test": len(set(patients[1]))},
        "num_examples": {"fit": len(answers), "test": len(asked[1])},
        "controls": {of: _shown(one) for of, one in found.items()},
        "seed": seed,
    }


def answered(
    probe: Probe, encoder: nn.Module, images: Tensor, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Features of the questions about images, and the right answers; see `trainer.probes.examples`.

    Args:
        probe: What is asked.
        encoder: Frozen.
        images: (B, C, S, S) or (B, C, S, S, K).
        device: Where the encoder is.
        seed: Of patches.

    Returns:
        (N, F) and (N,); of image b come the examples b, b + B, ... (rotation), or 8b, 8b + 1, ...
    """
    if probe == "rotation":
        turned, classes = examples.turned(images)
        return features_of(encoder, turned, device), classes
    first, second, classes = examples.neighbours(images, generator(seed, 0, "patches"))
    pair = [features_of(encoder, patches, device) for patches in (first, second)]
    return torch.cat(pair, dim=1), classes


def owners(probe: Probe, patients: Sequence[str]) -> list[str]:
    """The patient of each example that `answered` makes."""
    if probe == "rotation":
        return list(patients) * NUM_CLASSES[probe]
    return [patient for patient in patients for _ in range(NUM_CLASSES[probe])]


def _judge(
    seen: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], patients: Sequence[str]
) -> Accuracy:
    num_classes = int(seen[1].max()) + 1
    return accuracy(is_right(*asked, fit(*seen, num_classes)), patients)


def _images(
    scans: Sequence[ScanFile],
    spec: Preprocessing | Preprocessing2d,
    size: Size,
    cache: Path,
    seed: int,
) -> tuple[Tensor, list[str]]:
    """Network input of all scans, and the patient of each image."""
    if isinstance(spec, Preprocessing2d):
        images = ImageCache(cache)
        squares = ResidentImages.of(
            [images.image(scan, spec) for scan in scans], device=torch.device("cpu")
        )
        return squares.inputs(torch.arange(len(scans)), spec), [scan.subject for scan in scans]
    store = VolumeCache(cache)
    crops = torch.cat([_crops(scan, store.image(scan, spec), size, seed) for scan in scans])
    return crops, [scan.subject for scan in scans for _ in range(CROPS_PER_SCAN)]


def _crops(scan: ScanFile, case: Case, size: Size, seed: int) -> Tensor:
    volume = Resident.of(
        [np.asarray(case.image)], fill=[case.background], at_least=size, device=torch.device("cpu")
    )
    which = torch.zeros(CROPS_PER_SCAN, dtype=torch.long)
    return lively_crops(volume, which, size, generator(seed, 0, f"crops of {scan.id}"))


def _shown(found: Accuracy) -> dict[str, object]:
    facts = asdict(found)
    return {"accuracy": facts["value"], "interval_95": [facts["low"], facts["high"]]}
