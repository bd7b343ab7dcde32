"""Each volume preprocessed once: a folder of `.npy` files named by what they were made from.

The name is the SHA-256 of (file digest, preprocessing digest), so another spacing or window makes
another file and nothing is ever stale. Files are published by rename; float16 holds a window of
2000 HU to half a unit.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import ScanError
from imaging.intake import read_scan
from imaging.volume import Grid, Volume
from models.preprocess import prepare, prepare_labels
from models.recipe import FinetuneRecipe, Preprocessing
from trainer.data.scans import ScanFile, digest_of
from trainer.errors import DataError

_VERSION = "1"
"""Raised when `models.preprocess` changes what it makes."""

_GRID_TOLERANCE_MM = 0.01


@dataclass(frozen=True, slots=True)
class Case:
    """A preprocessed scan; arrays are read-only memory maps in (I, J, K)."""

    id: str
    image: NDArray[np.float16]
    labels: NDArray[np.uint8] | None
    """Classes, 0 for background."""
    background: float
    """Intensity of air, to pad with."""


class VolumeCache:
    """Preprocessed volumes in a folder, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def image(self, scan: ScanFile, spec: Preprocessing) -> Case:
        """The scan's image as network input.

        Raises:
            DataError: `unusable_scan`, with the scan's id and the reason.
        """
        key = _key(digest_of(scan.image), spec.digest())
        return Case(scan.id, *self._image(scan, spec, key))

    def labelled(self, scan: ScanFile, recipe: FinetuneRecipe) -> Case:
        """The scan's image with its labels as classes on the same grid.

        Raises:
            DataError: `unusable_scan`, `unusable_labels`, with the scan's id and the reason.
        """
        if scan.labels is None:
            raise DataError("unusable_labels", f"scan {scan.id} has no labels")
        spec = recipe.preprocessing
        image_key = _key(digest_of(scan.image), spec.digest())
        rule = json.dumps([recipe.labels, recipe.unlisted_labels])
        key = _key(digest_of(scan.labels), image_key, rule)
        image, _, background = self._image(scan, spec, image_key)
        if not self._path(key).is_file():
            labels = _make_labels(scan, recipe, self._grid(image_key))
            self._publish(key, labels)
        return Case(scan.id, image, np.load(self._path(key), mmap_mode="r"), background)

    def _image(
        self, scan: ScanFile, spec: Preprocessing, key: str
    ) -> tuple[NDArray[np.float16], None, float]:
        if not self._path(key).is_file():
            prepared = prepare(_read(scan, "image"), spec)
            if not np.isfinite(prepared.array).all():
                raise DataError("unusable_scan", f"scan {scan.id} has voxels that are not finite")
            if float(prepared.array.min()) == float(prepared.array.max()):
                raise DataError(
                    "unusable_scan", f"scan {scan.id} is constant in this intensity range"
                )
            facts = {
                "shape": prepared.grid.shape,
                "affine": np.asarray(prepared.grid.affine).tolist(),
                "background": prepared.background,
            }
            self._publish(key, prepared.array.astype(np.float16), facts)
        background = float(json.loads(self._facts(key).read_bytes())["background"])
        return np.load(self._path(key), mmap_mode="r"), None, background

    def _grid(self, key: str) -> Grid:
        facts = json.loads(self._facts(key).read_bytes())
        i, j, k = facts["shape"]
        return Grid((i, j, k), np.asarray(facts["affine"], dtype=np.float64))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.npy"

    def _facts(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _publish(
        self, key: str, array: NDArray[Any], facts: Mapping[str, object] | None = None
    ) -> None:
        """Facts first: the presence of the array says that both are whole."""
        if facts is not None:
            _write_by_rename(self._facts(key), json.dumps(facts).encode())
        publish_array(self._path(key), array)


def publish_array(path: Path, array: NDArray[Any]) -> None:
    """Write a `.npy` file that is either whole or not there."""
    descriptor, name = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, np.ascontiguousarray(array))
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _key(*parts: str) -> str:
    return hashlib.sha256("/".join([_VERSION, *parts]).encode()).hexdigest()


def _read(scan: ScanFile, kind: str) -> Volume:
    path = scan.image if kind == "image" else scan.labels
    assert path is not None
    code = "unusable_scan" if kind == "image" else "unusable_labels"
    try:
        return read_scan(path, kind="image" if kind == "image" else "labels").volume
    except ScanError as error:
        raise DataError(code, f"scan {scan.id}: {error.code}: {error.detail}") from error


def _make_labels(scan: ScanFile, recipe: FinetuneRecipe, target: Grid) -> NDArray[np.uint8]:
    labels = _read(scan, "labels")
    image = _read(scan, "image")
    if labels.shape != image.shape:
        raise DataError(
            "unusable_labels",
            f"scan {scan.id}: labels are {labels.shape}, the image {image.shape}",
        )
    if not np.allclose(labels.affine, image.affine, atol=_GRID_TOLERANCE_MM):
        raise DataError("unusable_labels", f"scan {scan.id}: labels lie elsewhere than the image")
    try:
        return prepare_labels(
            labels.voxels, labels.grid, target, recipe.labels, recipe.unlisted_labels
        )
    except ValueError as error:
        raise DataError("unusable_labels", f"scan {scan.id}: {error}") from error


def _write_by_rename(path: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    Path(name).rename(path)
