"""The live health of a pretraining: whether its features still tell one crop from another.

Measured on the same crops each time, by the encoder as it would be served. Nothing of it touches
the training: no weight, no statistic, no random number.

B crops, E features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from models.recipe import PretrainRecipe, PretrainRecipe2d
from trainer.data.images2d import ResidentImages
from trainer.data.resident import Resident, Size
from trainer.methods.intensities import restore
from trainer.methods.method import Method
from trainer.previews import draw
from trainer.probes import examples
from trainer.probes.crops import lively_crops
from trainer.probes.encoders import features_of
from trainer.probes.linear import fit, is_right
from trainer.randomness import generator
from trainer.report import Report

PREVIEWS = "previews"
WARM_STEPS = 100
"""Before, nothing is called a collapse: the running statistics of batch norm are still those of
the start, and healthy encoders look constant (docs/probes.md has the numbers)."""
_NUM_DRAWN = 6


def feature_std(features: Tensor) -> float:
    """Mean standard deviation of each dimension of unit-length features, times sqrt(E).

    1 for directions that are spread evenly, 0 for a constant (Chen and He, SimSiam, 2021, section
    4.1). Features after a ReLU are all positive, and healthy ones lie well below 1.

    Args:
        features: (B, E).
    """
    units = F.normalize(features.double(), dim=1)
    spread = units.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5
    return float(spread)


def effective_rank(features: Tensor) -> float:
    """Exp of the entropy of the singular values' shares (Roy and Vetterli, 2007, Eq. 3).

    Departs from it in that the mean over the crops is taken off before: what is common to all
    tells none apart. A constant has rank 0.

    Args:
        features: (B, E).
    """
    centred = features.double() - features.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    # A constant differs from its mean by rounding, whose directions are many.
    if values[0] <= 1e-6 * features.double().norm():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


class Watch:
    """Looks at a method every so many steps.

    Args:
        volumes: Of the training.
        recipe: Of the training; `recipe.health` says what is asked for.
        out: The run's folder; pictures go into `out/previews`.
        report: Gets metrics, and a warning when a collapse begins.
        device: Where the method is.
    """

    def __init__(
        self,
        volumes: Resident | ResidentImages,
        recipe: PretrainRecipe | PretrainRecipe2d,
        out: Path,
        report: Report,
        device: torch.device,
    ) -> None:
        self._recipe, self._out, self._report, self._device = recipe, out, report, device
        self._crops = _fixed_crops(volumes, recipe)
        self._was_collapsed = False

    def look(self, method: Method[Any, Any], step: int) -> bool:
        """Measure after `step`; returns whether the features have collapsed."""
        values = self._measure(method.student.encoder, step)
        is_collapsed = bool(values["is_collapsed"])
        self._report.metric(step, values)
        if is_collapsed and not self._was_collapsed:
            found = f"deviation {values['feature_std']:.2g}, rank {values['effective_rank']:.3g}"
            self._report.log("warning", f"the features collapsed by step {step}: {found}")
        if self._was_collapsed and not is_collapsed:
            self._report.log("info", f"the features are apart again at step {step}")
        self._was_collapsed = is_collapsed
        if self._recipe.health.previews and self._recipe.method.trains_decoder:
            crops = self._crops[:_NUM_DRAWN]
            path = self._out / PREVIEWS / f"step-{step:09d}.png"
            draw(crops, reconstructed(method, crops, self._device), path)
        return is_collapsed

    def _measure(self, encoder: torch.nn.Module, step: int) -> Mapping[str, float]:
        turned, classes = examples.turned(self._crops)
        features = features_of(encoder, turned, self._device)
        if not features.isfinite().all():  # the loss says so, too
            return {"feature_std": 0.0, "effective_rank": 0.0, "is_collapsed": 1.0}
        upright = features[: len(self._crops)]
        std, rank = feature_std(upright), effective_rank(upright)
        asked = self._recipe.health
        is_low = std < asked.min_std or rank < asked.min_rank
        return {
            "feature_std": std,
            "effective_rank": rank,
            "probe_rotation": _rotation(features, classes),
            "is_collapsed": float(is_low and step >= WARM_STEPS),
        }


@torch.no_grad()
def reconstructed(method: Method[Any, Any], crops: Tensor, device: torch.device) -> Tensor:
    """What encoder and decoder make of crops (B, C, ...), as intensities, on the host."""
    student = method.student
    was_training = student.training
    student.eval()
    out = restore(student(crops.to(device).float()), method.recipe).cpu()
    student.train(was_training)
    return out


def _rotation(features: Tensor, classes: Tensor) -> float:
    """Accuracy of the rotation probe: fitted on the first half of the crops, asked of the others.

    Crops come volume by volume, so with several volumes the halves share one at most.
    """
    num_crops = len(features) // examples.NUM_TURNS
    is_seen = (torch.arange(len(features)) % num_crops) < num_crops // 2
    layer = fit(features[is_seen], classes[is_seen], examples.NUM_TURNS)
    right = is_right(features[~is_seen], classes[~is_seen], layer)
    return float(right.float().mean())


def _fixed_crops(
    volumes: Resident | ResidentImages, recipe: PretrainRecipe | PretrainRecipe2d
) -> Tensor:
    """Network input at even distances through the scans, square in the first two axes, (B, ...)."""
    num = recipe.health.num_crops
    if isinstance(recipe, PretrainRecipe2d):
        assert isinstance(volumes, ResidentImages)
        total = len(volumes.pixels)
        which = torch.arange(min(num, total)) * total // min(num, total)
        return volumes.inputs(which, recipe.preprocessing).cpu()
    assert isinstance(volumes, Resident)
    i, j, k = recipe.crops.input_size
    size: Size = (min(i, j), min(i, j), k)
    which = torch.arange(num) * len(volumes.shapes) // num
    return lively_crops(volumes, which, size, generator(recipe.seed, 0, "health"))
