"""An image of a plan as one file that a service takes.

The same image gives the same bytes at any time, so a service knows it again.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imaging.datasets.channels import extract
from imaging.datasets.plan import Image

_NO_TIME = (1980, 1, 1, 0, 0, 0)


@contextmanager
def as_one_file(image: Image) -> Iterator[Path]:
    """The image's file itself, or a temporary one: a zip of header and voxels, or one channel.

    Raises:
        ScanError: As `channels.extract`.
    """
    if image.voxels is None and image.channel is None:
        yield image.path
        return
    with tempfile.TemporaryDirectory() as folder:
        if image.channel is not None:
            made = Path(folder) / "channel.nii.gz"
            extract(image.path, image.channel, made)
        else:
            assert image.voxels is not None
            made = Path(folder) / "pair.zip"
            _zip(made, [image.path, image.voxels])
        yield made


def _zip(target: Path, files: list[Path]) -> None:
    """Stored, not packed: voxels as `.zraw` are packed already, and a LAN is faster than zlib."""
    with zipfile.ZipFile(target, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.name, _NO_TIME)
            with (
                file.open("rb") as source,
                archive.open(entry, "w", force_zip64=True) as member,
            ):
                while chunk := source.read(1 << 20):
                    member.write(chunk)
