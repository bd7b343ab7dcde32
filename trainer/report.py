"""What a run says while it works: JSON lines for a supervisor, a progress line for a human."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Protocol, TextIO


class Report(Protocol):
    """Where a run's events go."""

    def progress(self, stage: str, step: int, total: int) -> None:
        """`step` of `total` of a stage is done."""

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Measured values after a step."""

    def log(self, level: str, message: str) -> None:
        """Something a human may want to know; level is `info`, `warning` or `error`."""

    def result(self, bundle: str, digest: str) -> None:
        """The bundle is published."""

    def error(self, code: str, detail: str) -> None:
        """Why the run ends."""


class JsonLines:
    """One JSON object a line (docs/architecture.md, trainer)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._pace = _Pace()

    def progress(self, stage: str, step: int, total: int) -> None:
        """See `Report`; adds the fraction and the estimated time left, s."""
        self._write(
            event="progress",
            stage=stage,
            step=step,
            total=total,
            fraction=step / max(total, 1),
            eta_s=self._pace.eta_s(stage, step, total),
        )

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """See `Report`."""
        self._write(event="metric", step=step, values=dict(values))

    def log(self, level: str, message: str) -> None:
        """See `Report`."""
        self._write(event="log", level=level, message=message)

    def result(self, bundle: str, digest: str) -> None:
        """See `Report`."""
        self._write(event="result", bundle=bundle, digest=digest)

    def error(self, code: str, detail: str) -> None:
        """See `Report`."""
        self._write(event="error", code=code, detail=detail)

    def _write(self, **event: object) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


class Human:
    """A progress line that rewrites itself on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._pace = _Pace()
        self._values = ""

    def progress(self, stage: str, step: int, total: int) -> None:
        """See `Report`."""
        eta_s = self._pace.eta_s(stage, step, total)
        left = "" if eta_s is None else f"  {eta_s:.0f} s left"
        line = f"{stage} {step}/{total}{left}  {self._values}"
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if step == total else ""))
            self._stream.flush()
        else:
            self._line(line)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """See `Report`."""
        self._values = "  ".join(f"{name} {value:.4g}" for name, value in values.items())

    def log(self, level: str, message: str) -> None:
        """See `Report`."""
        self._line(f"{level}: {message}")

    def result(self, bundle: str, digest: str) -> None:
        """See `Report`."""
        self._line(f"{bundle} {digest}")

    def error(self, code: str, detail: str) -> None:
        """See `Report`."""
        self._line(f"error {code}: {detail}")

    def _line(self, text: str) -> None:
        start = "\r\x1b[K" if self._stream.isatty() else ""
        self._stream.write(f"{start}{text}\n")
        self._stream.flush()


class Follower:
    """What the other ranks of a run say: nothing but an error that the first may not know of."""

    TOGETHER = ("preempted", "non_finite_loss")
    """What all ranks end with at the same step."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def progress(self, stage: str, step: int, total: int) -> None:
        """Says nothing."""

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Says nothing."""

    def log(self, level: str, message: str) -> None:
        """Says nothing."""

    def result(self, bundle: str, digest: str) -> None:
        """Says nothing."""

    def error(self, code: str, detail: str) -> None:
        """See `Report`."""
        if code not in self.TOGETHER:
            self._report.error(code, detail)


class _Pace:
    """Time left, from the pace since this process entered the stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._first_step = 0
        self._since = 0.0

    def eta_s(self, stage: str, step: int, total: int) -> float | None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first_step, self._since = stage, step, now
        done = step - self._first_step
        if done <= 0:
            return None
        return round((now - self._since) / done * (total - step), 1)
