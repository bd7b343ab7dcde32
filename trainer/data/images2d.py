"""2D images of a run: decoded once, kept as files, then as one tensor on the device.

A file is named by what it was made from, as in `trainer.data.cache`. 100,000 squares of 224 take
5 GB as uint8, which holds [0, 1] to 1/510; float16 takes twice that.

N images, B batch, C channels, S rows and columns of the stored square.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaging.errors import ScanError
from models.recipe import Normalisation, Preprocessing2d
from trainer.data.scan_set import ScanFile, digest_of
from trainer.data.to_device import to_device
from trainer.errors import DataError
from trainer.randomness import generator
from trainer.report import Report

Stored = Literal["uint8", "float16"]
Square = NDArray[np.uint8 | np.float16]

_VERSION = "2d-1"
"""Raised when `models.preprocess2d` changes what it makes."""


class ImageCache:
    """Prepared squares in a folder, made when first asked for.

    Args:
        folder: Where they lie.
        stored: How a square is kept.
    """

    def __init__(self, folder: Path, stored: Stored = "uint8") -> None:
        self._folder = folder
        self._stored = stored
        folder.mkdir(parents=True, exist_ok=True)

    def image(self, scan: ScanFile, spec: Preprocessing2d) -> Square:
        """The image as a square (S, S), [0, 1] in float16 or 0 to 255 in uint8.

        Raises:
            DataError: `unusable_scan`, with the scan's id and the reason.
        """
        # What happens after the square is made does not change it.
        shape = spec.model_copy(update={"normalisation": None}).digest()
        parts = "/".join([_VERSION, self._stored, digest_of(scan.image), shape])
        path = self._folder / f"{hashlib.sha256(parts.encode()).hexdigest()}.npy"
        if not path.is_file():
            from trainer.data.cache import publish_array  # reads files, as in `_make`

            publish_array(path, self._make(scan, spec))
        # Read whole: a memory map would hold a file open for each of 100,000 images.
        square: Square = np.load(path)
        return square

    def _make(self, scan: ScanFile, spec: Preprocessing2d) -> Square:
        # Here, so that training on what is in memory wants no reader of files: `benchmarks/gpu.sh`
        # runs where there is none.
        from imaging.image2d import read_image
        from models.preprocess2d import prepare_image

        if len(scan.images) != 1 or scan.image.is_dir():
            raise DataError("unusable_scan", f"scan {scan.id} is not one file with one 2D image")
        try:
            pixels = read_image(scan.image).pixels
        except ScanError as error:
            detail = f"scan {scan.id}: {error.code}: {error.detail}"
            raise DataError("unusable_scan", detail) from error
        prepared = prepare_image(pixels, spec)
        if self._stored == "float16":
            return prepared.astype(np.float16)
        return (prepared * 255.0 + 0.5).astype(np.uint8)  # [0, 1], so this rounds


@dataclass(frozen=True, slots=True)
class ResidentImages:
    """All images of a run on the device.

    Attributes:
        pixels: (N, C, S, S); uint8 for 0 to 255, or float16 for [0, 1].
    """

    pixels: Tensor

    @classmethod
    def of(
        cls, squares: Iterable[Square], *, device: torch.device, count: int | None = None
    ) -> ResidentImages:
        """Lay out grey squares (S, S) of one size and type, one after another.

        Args:
            squares: At least one; of an iterator, one at a time is in memory.
            device: Where they will lie.
            count: How many they are, if that cannot be asked.
        """
        if count is None:
            squares = list(squares)
            count = len(squares)
        pixels = torch.empty(0)
        for at, square in enumerate(squares):
            stored = torch.from_numpy(square)
            if at == 0:
                pixels = torch.empty(count, 1, *stored.shape, dtype=stored.dtype, device=device)
            pixels[at, 0] = stored
        return cls(pixels)

    def take(self, index: Tensor) -> Tensor:
        """Images (B, C, S, S) in [0, 1], float32, by their places (B,)."""
        chosen = self.pixels[to_device(index, self.pixels.device)].float()
        return chosen / 255.0 if self.pixels.dtype == torch.uint8 else chosen

    def inputs(self, index: Tensor, spec: Preprocessing2d) -> Tensor:
        """Network input (B, 3, S, S) of whole images, as serving makes it."""
        return as_channels(self.take(index), spec.normalisation)


def as_channels(x: Tensor, normalisation: Normalisation | None) -> Tensor:
    """Network input (B, 3, n, n) from images in [0, 1]; a grey one is repeated."""
    x = x.expand(-1, 3, -1, -1)
    if normalisation is None:
        return x
    moments = torch.tensor([normalisation.mean, normalisation.std], dtype=x.dtype)
    mean, std = to_device(moments[:, :, None, None], x.device).unbind()
    return (x - mean) / std


def load_images(
    scans: Sequence[ScanFile],
    spec: Preprocessing2d,
    cache: Path,
    report: Report,
    device: torch.device,
) -> ResidentImages:
    """Decode the images that the cache does not have yet, and lay out all.

    Raises:
        DataError: `unusable_scan`, with the scan's id and the reason.
    """
    store = ImageCache(cache)

    def squares() -> Iterator[Square]:
        for done, scan in enumerate(scans, start=1):
            yield store.image(scan, spec)
            report.progress("prepare", done, len(scans))

    return ResidentImages.of(squares(), device=device, count=len(scans))


def draw_batch(num_images: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Which images a step takes, (B,): every image once an epoch, in an order of its own.

    Args:
        num_images: N.
        batch_size: B; the end of one epoch and the start of the next may share a batch.
        seed: Of the run.
        step: From 1.
    """
    place = (step - 1) * batch_size + torch.arange(batch_size)
    epochs, within = place // num_images, place % num_images
    chosen = torch.empty(batch_size, dtype=torch.long)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        order = torch.randperm(num_images, generator=generator(seed, epoch, "epoch"))
        at = epochs == epoch
        chosen[at] = order[within[at]]
    return chosen
