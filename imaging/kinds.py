"""What a scan is meant to be, and how the intake's process says that one is bad.

Apart from `imaging.intake`, so that who only starts the intake loads none of its readers.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["image", "labels"]

EXIT_BAD_SCAN = 65
EXIT_CANNOT_WRITE = 74
