"""How patients' identities are hidden: what a site wants, and the names its secret key gives.

Names are keyed (HMAC-SHA256), because ids and UIDs can be guessed and hashed again. The same
input gives the same name in every process, so a series stays together and an upload sent twice maps
alike.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Literal

Dates = Literal["remove", "shift"]

MAX_SHIFT_DAYS = 3650


@dataclass(frozen=True, slots=True)
class Policy:
    """What a site wants of de-identification; the defaults keep the least."""

    dates: Dates = "remove"
    """Remove dates and times, or move the dates of a patient back by the same number of days."""
    accept_burned_in: bool = False
    """Whether images are taken in whose pixels may show who the patient is."""


DEFAULT = Policy()


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Names that nobody can turn back who lacks the key."""

    key: bytes = field(repr=False)

    def patient(self, patient_key: str) -> str:
        """A patient's name, `sub_` and 16 hexadecimal digits; of `dicom_header.patient_key`."""
        return f"sub_{self._digest(patient_key).hex()[:16]}"

    def uid(self, uid: str) -> str:
        """Another UID under the root for UUIDs (PS3.5 B.2); what DICOM itself registers stays."""
        from pydicom import config  # only here: settings import this module
        from pydicom.uid import UID

        # Registered UIDs are looked up; no warning shows one that breaks the rules (04 for 4).
        if not uid or UID(uid, config.IGNORE).name != uid:
            return uid
        return f"2.25.{int.from_bytes(self._digest(f'uid {uid}')[:16], 'big')}"

    def shift_days(self, patient: str) -> int:
        """How far a patient's dates move: -1 to -`MAX_SHIFT_DAYS`, the same for all of them."""
        drawn = int.from_bytes(self._digest(f"days {patient}")[:8], "big")
        return -1 - drawn % MAX_SHIFT_DAYS

    def text(self, text: str) -> str:
        """What may be kept of a text of somebody's choosing: 64 hexadecimal digits."""
        return self._digest(f"text {text}").hex()

    def _digest(self, text: str) -> bytes:
        return hmac.new(self.key, text.encode(errors="replace"), hashlib.sha256).digest()
