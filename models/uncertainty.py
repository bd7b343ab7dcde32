"""How sure a segmenter is: the entropy of its probabilities, and the flag that follows from it.

    entropy = -sum over classes of p log p / log(number of classes)      0 sure, 1 knows nothing

Computed on the network's grid from the blended logits, slab by slab as they come. The mean is
taken where a label wins: over a whole scan the air around the patient would drown it.

C classes, I J K voxels; a prime (I' J' K') is the network's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imaging.resample import resample
from imaging.volume import Grid, Shape
from models.box import Box, grid_of, needed
from models.bundle import Quality

Float32Array = NDArray[np.float32]
Flag = Literal["ok", "review", "unknown"]

_CHUNK_VOXELS = 1 << 18
"""Voxels whose entropy is computed at a time."""
_SLAB_VOXELS = 1 << 22
"""Voxels of a target whose entropy is resampled at a time."""


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """What the entropies of a scan amount to."""

    mean_foreground_entropy: float | None
    """Mean where any label wins; None where none does."""
    label_entropies: dict[str, float]
    """Mean where the label wins; a label without voxels is left out."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether somebody should look at a result."""

    flag: Flag
    reasons: tuple[str, ...] = ()
    """`uncertain`, `nothing_found`, `box_reaches_edge` or `stages_disagree`; of `review` alone."""


class EntropyMeter:
    """Takes blended logits in slabs; keeps sums, and a map where one is wanted.

    Args:
        names: Of the labels, in the order of the classes 1 to C - 1.
        shape: Of the network's grid; with it a map is kept, one byte a voxel.
    """

    def __init__(self, names: Sequence[str], shape: Shape | None = None) -> None:
        self._names = tuple(names)
        self._sums = np.zeros(len(self._names) + 1)
        self._counts = np.zeros(len(self._names) + 1, dtype=np.int64)
        self._map = np.zeros(shape, dtype=np.uint8) if shape is not None else None

    def add(self, logits: Float32Array, column: int = 0, plane: int = 0) -> None:
        """Take logits (C, I', columns, planes) that begin at a column of J' and a plane of K'."""
        columns = slice(column, column + logits.shape[2])
        planes = slice(plane, plane + logits.shape[3])
        num = len(self._sums)
        rows = max(1, _CHUNK_VOXELS // (logits.shape[2] * logits.shape[3]))
        for i in range(0, logits.shape[1], rows):
            here = logits[:, i : i + rows]  # (C, rows, columns, planes)
            classes = here.argmax(axis=0)
            found = classes > 0
            if self._map is not None:
                values = entropy(here)
                self._map[i : i + rows, columns, planes] = np.rint(255 * values)
                values = values[found]
            else:  # background is most of a scan, and nobody asks how sure it is
                values = entropy(here[:, found])
            self._sums += np.bincount(classes[found], weights=values, minlength=num)
            self._counts += np.bincount(classes[found], minlength=num)

    def result(self) -> Uncertainty:
        """Means over what came so far."""
        count = int(self._counts[1:].sum())
        means = {
            name: float(self._sums[value] / self._counts[value])
            for value, name in enumerate(self._names, start=1)
            if self._counts[value]
        }
        return Uncertainty(float(self._sums[1:].sum() / count) if count else None, means)

    def map_on(self, source: Grid, target: Grid) -> NDArray[np.uint8]:
        """The map, resampled linearly to another grid in slabs: 255 where the entropy is 1.

        Args:
            source: The network's grid, on which the planes lie.
            target: Its axes are parallel to those of `source`.
        """
        assert self._map is not None  # asked for when it was made
        out = np.zeros(target.shape, dtype=np.uint8)
        thickness = max(1, _SLAB_VOXELS // (target.shape[0] * target.shape[1]))
        for first in range(0, target.shape[2], thickness):
            stop = min(first + thickness, target.shape[2])
            planes = grid_of(target, Box((0, 0, first), (*target.shape[:2], stop)))
            seen = needed(source, planes)
            values = resample(self._map[seen.slices], grid_of(source, seen), planes, order=1)
            out[:, :, first:stop] = np.rint(values)
        return out


def entropy(logits: Float32Array) -> Float32Array:
    """Normalised entropy of softmax over the first axis, in [0, 1]: (C, ...) to (...).

    With z = logits - max: H = log sum exp z - sum z exp z / sum exp z, then over log C.
    """
    shifted = logits - logits.max(axis=0)
    weights = np.exp(shifted)
    total = weights.sum(axis=0)
    shifted *= weights
    found = np.log(total) - shifted.sum(axis=0) / total
    return np.asarray(np.clip(found / np.log(len(logits)), 0.0, 1.0), dtype=np.float32)


def calibrated(
    cases: Sequence[tuple[float | None, float]], *, min_dice: float, split: Literal["train", "val"]
) -> Quality:
    """The threshold of a bundle: the highest entropy at which a scan still came out well.

    So a scan is flagged if the network is less sure of it than of every scan that it is known to
    have segmented well. Where none came out well the threshold is 0: every scan is to be reviewed.

    Args:
        cases: Mean foreground entropy (None where nothing was found) and mean Dice of each scan.
        min_dice: What counts as well.
        split: Which scans they are.
    """
    good = [found for found, dice in cases if found is not None and dice >= min_dice]
    return Quality(
        max_foreground_entropy=max(good, default=0.0),
        min_dice=min_dice,
        num_cases=len(cases),
        num_good=len(good),
        split=split,
    )


def judged(found: Uncertainty, quality: Quality | None, concerns: Sequence[str] = ()) -> Judgement:
    """The flag of a scan.

    Args:
        found: How sure the network was.
        quality: The bundle's threshold; None where it has none.
        concerns: What else speaks for a look, whatever the threshold says.
    """
    reasons = list(concerns)
    if quality is not None:
        if found.mean_foreground_entropy is None:
            reasons.append("nothing_found")
        elif found.mean_foreground_entropy > quality.max_foreground_entropy:
            reasons.append("uncertain")
    if reasons:
        return Judgement("review", tuple(reasons))
    return Judgement("unknown" if quality is None else "ok")
