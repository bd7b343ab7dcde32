"""A 2D image as it is kept: a grey PNG that was decoded once and holds nothing but pixels.

Training reads where a pixel lies between an image's least and greatest value, or its percentiles
(`models.preprocess2d`), and only that is kept: whole numbers as they are, moved up where some are
negative; anything else as 65,536 levels between the two ends, which is finer than any detector.

R rows, C columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imaging.image2d import Image2d

LEVELS = 1 << 16
SCALED = f"kept as {LEVELS} levels between the least and the greatest value"


def write_png(path: Path, pixels: NDArray[np.float32]) -> None:
    """Write the levels (R, C) of an image to a new file."""
    picture = Image.fromarray(levels_of(pixels))
    picture.save(path, "PNG", compress_level=1)  # 6 takes seconds for a mammogram


def levels_of(pixels: NDArray[np.float32]) -> NDArray[np.uint8 | np.uint16]:
    """The pixels (R, C) as whole numbers: uint8 where they fit, else uint16."""
    values = pixels.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if is_exact(pixels):
        values -= min(low, 0.0)
    else:
        values = (values - low) * ((LEVELS - 1) / (high - low))
    levels = np.rint(values)
    return levels.astype(np.uint8 if levels.max() < 1 << 8 else np.uint16)


def is_exact(pixels: NDArray[np.float32]) -> bool:
    """Whether the levels are the pixels themselves, but for a constant."""
    span = float(pixels.max()) - min(float(pixels.min()), 0.0)
    return span < LEVELS and bool((pixels == np.rint(pixels)).all())


def report_of(image: Image2d) -> dict[str, Any]:
    """What the intake says of a 2D image, JSON-able: a volume's report without a geometry."""
    return {
        "shape": image.pixels.shape,
        "spacing_mm": (),
        "affine": [],
        "source_shape": image.pixels.shape,
        "source_affine": [],
        "modality": image.modality,
        "format": image.format,
        "series_uid": "",
        "patient_key": image.patient_key,
        "affine_from": "",
        "dtype": levels_of(image.pixels).dtype.name,
        "members": [],
        "used": [{"member": 0, "sop_uid": ""}],
        "notes": [*image.notes, *([] if is_exact(image.pixels) else [SCALED])],
        "slices": None,
    }
