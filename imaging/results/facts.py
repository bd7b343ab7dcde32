"""What every result states of itself: the model, the labels, and who made it for what use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pydicom.uid import UID

RESEARCH_USE_ONLY = "Research use only; not a medical device"
MANUFACTURER = "PCRL"


_COLOURS = ((220, 120, 60), (60, 170, 220), (120, 200, 80), (210, 90, 190), (230, 210, 70))


def colour_of(number: int) -> tuple[int, int, int]:
    """Red, green and blue of the n-th label that is shown."""
    return _COLOURS[(number - 1) % len(_COLOURS)]


_LO_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Label:
    """A label of the mask."""

    name: str
    value: int
    """In the mask."""
    volume_ml: float
    num_voxels: int

    @property
    def shown(self) -> str:
        """The name where it is valid as LO (PS3.5, 6.2); else one that is, of this label alone."""
        text = "".join(c if c.isprintable() and c != "\\" else " " for c in self.name).strip()
        if text == self.name and 0 < len(text) <= _LO_CHARACTERS:
            return text
        mark = f"#{self.value}"
        return f"{text[: _LO_CHARACTERS - 1 - len(mark)].strip()} {mark}".strip()


@dataclass(frozen=True, slots=True)
class Facts:
    """What is written into every result."""

    result_id: str
    """The segmentation's id; UIDs follow from it."""
    model_name: str
    model_version: str
    model_digest: str
    """SHA-256 of the bundle."""
    software_version: str
    labels: tuple[Label, ...]

    @property
    def found(self) -> tuple[Label, ...]:
        """Labels with voxels, in the order of their values; segment n is the n-th of them."""
        return tuple(label for label in self.labels if label.num_voxels)

    @property
    def series_description(self) -> str:
        """At most 64 characters (LO)."""
        return f"{self.model_name}/{self.model_version} research use only"[:64]

    def uid(self, what: str) -> UID:
        """A UID of the UUID-derived root (PS3.5, B.2) that follows from the result's id."""
        digest = hashlib.sha256(f"pcrl result {self.result_id} {what}".encode()).digest()
        return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")
