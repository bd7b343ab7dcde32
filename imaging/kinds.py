"""What a scan is meant to be, and how the intake's process says that one is bad.

Apart from `imaging.intake`, so that who only starts the intake loads none of its readers.
"""

from __future__ import annotations

from typing import Literal

VolumeKind = Literal["image", "labels"]
Kind = Literal[VolumeKind, "image_2d"]
FILE_OF: dict[Kind, str] = {
    "image": "volume.nii",
    "labels": "volume.nii",
    "image_2d": "image.png",
}
"""What the intake writes."""

EXIT_BAD_SCAN = 65
EXIT_CANNOT_WRITE = 74
