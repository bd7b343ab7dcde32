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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaging.errors import ScanError
from imaging.intake import read_scan
from imaging.kinds import VolumeKind
from imaging.volume import Grid, Volume
from models.preprocess import prepare, prepare_labels
from models.recipe import FinetuneRecipe, Preprocessing
from trainer.data.scan_set import ScanFile, digest_of, voxels_beside
from trainer.errors import DataError

_VERSION = "1"
"""Raised when `models.preprocess` changes what it makes."""

_GRID_TOLERANCE_MM = 0.01


@dataclass(frozen=True, slots=True)
class Case:
    """One image of a preprocessed scan."""

    id: str
    image: NDArray[np.float16]
    """(I, J, K); a read-only memory map."""
    background: float
    """Intensity of air, to pad with."""
    grid: Grid
    """Where the voxels lie."""


@dataclass(frozen=True, slots=True)
class LabelledCase:
    """A preprocessed scan with its classes."""

    id: str
    channels: tuple[Case, ...]
    """Its images, on one grid."""
    labels: NDArray[np.uint8]
    """(I, J, K), 0 for background; a read-only memory map."""


class VolumeCache:
    """Preprocessed volumes in a folder, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def image(self, scan: ScanFile, spec: Preprocessing) -> Case:
        """The scan's only image as network input.

        Raises:
            DataError: `unusable_scan`, with the scan's id and the reason.
        """
        return self.channels(scan, spec, ("image",))[0]

    def channels(
        self, scan: ScanFile, spec: Preprocessing, names: Sequence[str]
    ) -> tuple[Case, ...]:
        """The scan's images as network input, each with its own intensities, on one grid.

        Raises:
            DataError: `unusable_scan`, with the scan's id, the channel and the reason.
        """
        if len(scan.images) != len(names):
            raise DataError(
                "unusable_scan",
                f"scan {scan.id} has {len(scan.images)} images; the recipe reads {len(names)} "
                f"({', '.join(names)})",
            )
        cases = []
        for path, name in zip(scan.images, names, strict=True):
            called = scan.id if len(names) == 1 else f"{scan.id}, channel {name}"
            cases.append(self._image(path, called, spec))
        for case, name in zip(cases, names, strict=True):
            _refuse_another_grid(scan.id, name, case.grid, cases[0].grid)
        return tuple(cases)

    def labelled(self, scan: ScanFile, recipe: FinetuneRecipe) -> LabelledCase:
        """The scan's images with its labels as classes on the same grid.

        Raises:
            DataError: `unusable_scan`, `unusable_labels`, with the scan's id and the reason.
        """
        if scan.labels is None:
            raise DataError("unusable_labels", f"scan {scan.id} has no labels")
        channels = self.channels(scan, recipe.preprocessing, recipe.channels)
        rule = json.dumps([recipe.values, recipe.unlisted_labels])
        image_key = _key(digest_of(scan.image), recipe.preprocessing.digest())
        key = _key(digest_of(scan.labels), image_key, rule)
        if not self._path(key).is_file():
            self._publish(key, _make_labels(scan, recipe, channels[0].grid))
        return LabelledCase(scan.id, channels, np.load(self._path(key), mmap_mode="r"))

    def _image(self, path: Path, called: str, spec: Preprocessing) -> Case:
        key = _key(digest_of(path), spec.digest())
        if not self._path(key).is_file():
            prepared = prepare(_read(path, called, "image"), spec)
            if not np.isfinite(prepared.array).all():
                raise DataError("unusable_scan", f"scan {called} has voxels that are not finite")
            if float(prepared.array.min()) == float(prepared.array.max()):
                raise DataError(
                    "unusable_scan", f"scan {called} is constant in this intensity range"
                )
            facts = {
                "shape": prepared.grid.shape,
                "affine": np.asarray(prepared.grid.affine).tolist(),
                "background": prepared.background,
            }
            self._publish(key, prepared.array.astype(np.float16), facts)
        background = float(json.loads(self._facts(key).read_bytes())["background"])
        image = np.load(self._path(key), mmap_mode="r")
        return Case(called, image, background, self._grid(key))

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


def _read(path: Path, called: str, kind: VolumeKind) -> Volume:
    code = "unusable_scan" if kind == "image" else "unusable_labels"
    try:
        return read_scan(path, kind=kind, beside=voxels_beside(path)).volume
    except ScanError as error:
        raise DataError(code, f"scan {called}: {error.code}: {error.detail}") from error


def _refuse_another_grid(scan: str, channel: str, found: Grid, expected: Grid) -> None:
    """Channels are voxels of one place; there is no guessing how to bring them together."""
    if found.shape != expected.shape:
        raise DataError(
            "unusable_scan",
            f"scan {scan}: channel {channel} is {found.shape} voxels of the recipe's spacing, "
            f"the first channel {expected.shape}",
        )
    if not np.allclose(found.affine, expected.affine, atol=_GRID_TOLERANCE_MM):
        raise DataError(
            "unusable_scan", f"scan {scan}: channel {channel} lies elsewhere than the first"
        )


def _make_labels(scan: ScanFile, recipe: FinetuneRecipe, target: Grid) -> NDArray[np.uint8]:
    assert scan.labels is not None
    labels = _read(scan.labels, scan.id, "labels")
    image = _read(scan.image, scan.id, "image")
    if labels.shape != image.shape:
        raise DataError(
            "unusable_labels",
            f"scan {scan.id}: labels are {labels.shape}, the image {image.shape}",
        )
    if not np.allclose(labels.affine, image.affine, atol=_GRID_TOLERANCE_MM):
        raise DataError("unusable_labels", f"scan {scan.id}: labels lie elsewhere than the image")
    try:
        return prepare_labels(
            labels.voxels, labels.grid, target, recipe.values, recipe.unlisted_labels
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
