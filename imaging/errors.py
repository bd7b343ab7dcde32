"""What is wrong with a scan: the sender's error, with a stable code."""

from __future__ import annotations

from collections.abc import Mapping


class ScanError(Exception):
    """A scan that cannot be used as it is.

    Args:
        code: Stable slug for programs, for example ``truncated_file``.
        detail: What was found and what was expected; never a patient's name or id.
        extra: Facts a program may act on (for example the series to choose from), JSON-able.
    """

    def __init__(self, code: str, detail: str, extra: Mapping[str, object] | None = None) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.extra = dict(extra or {})
