"""A picture of what a decoder makes of crops: above what went in, below what came out.

Of a volume the middle slice along K is shown, the patient's right on the left and anterior up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_GAP = 2
_LEAST_SIDE = 96
"""Pixels of a tile; smaller ones are enlarged by a whole factor."""


def draw(inputs: Tensor, outputs: Tensor, path: Path) -> None:
    """Write the picture, published by rename.

    Each pair is shown in the grey scale of its input.

    Args:
        inputs: (B, C, R, S) or (B, C, I, J, K).
        outputs: The same.
        path: A PNG; its folder is made.
    """
    columns = []
    for before, after in zip(_planes(inputs), _planes(outputs), strict=True):
        low, high = float(before.min()), float(before.max())
        columns.append(np.concatenate([_tile(plane, low, high) for plane in (before, after)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".draft-{path.name}")
    Image.fromarray(np.concatenate(columns, axis=1)).save(draft, format="png")
    draft.rename(path)


def _planes(images: Tensor) -> NDArray[np.float32]:
    """(B, rows, columns)."""
    planes = images[:, 0].float().numpy()
    if planes.ndim == 3:
        return planes
    middle = planes[..., planes.shape[-1] // 2]  # (B, I, J)
    return middle.transpose(0, 2, 1)[:, ::-1, ::-1]  # J is anterior, I the patient's right


def _tile(plane: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    scaled = (plane - low) / max(high - low, 1e-6)
    grey = (scaled.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    factor = max(1, -(-_LEAST_SIDE // grey.shape[0]))
    large = grey.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.pad(large, _GAP)
