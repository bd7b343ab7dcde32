"""The intake in a child process with limits: hostile bytes never meet the parent.

The child is forked by `imaging.forkserver`. It gets a bare environment (no secrets), no standard
input, and the walls of `imaging.confine`: hard limits on memory, processor time, file size, open
files and core dumps, no network, no other program, no files but the scan; the parent adds a wall
clock.
"""

from __future__ import annotations

import json
import re
import signal
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imaging.errors import ScanError
from imaging.forkserver import ForkServer
from imaging.identity import Policy, Pseudonyms
from imaging.kinds import EXIT_BAD_SCAN, FILE_OF, Kind
from imaging.volume import Grid

_server = ForkServer("imaging.intake")
_UID = re.compile(r"[0-9.]{1,64}")


_MAX_REPORT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one intake may take."""

    memory_bytes: int = 4 << 30
    cpu_s: int = 120
    wall_s: float = 180.0
    file_bytes: int = 4 << 30
    open_files: int = 256


@dataclass(frozen=True, slots=True)
class IntakeReport:
    """What the intake found; what is kept of it lies at `volume_path` (`kinds.FILE_OF`).

    A 2D image has a shape (rows, columns) and no geometry: the spacing and the affines are empty.
    """

    volume_path: Path
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    affine: list[list[float]]
    source_shape: tuple[int, ...]
    source_affine: list[list[float]]
    modality: str
    format: str
    series_uid: str
    patient_key: str
    affine_from: str
    dtype: str
    members: list[dict[str, Any]]
    """Files not used: `{"member": place, "reason": text, "sop_uid": uid}`."""
    used: list[dict[str, Any]] = field(default_factory=list)
    """Files used: `{"member": place, "sop_uid": uid}`."""
    notes: list[str] = field(default_factory=list)
    """What was decided or done that a reader of the volume should know."""
    slices: dict[str, Any] | None = None
    """Of a resampled series: the way back to its slices (`imaging.slices.slices_of`)."""
    deidentified: dict[str, str] | None = None
    """What was done to the upload (`intake.read_without_identity`); None if it was left alone."""
    original_path: Path | None = None
    """The upload without identities."""

    @property
    def source(self) -> Grid:
        """The grid of the files of a volume."""
        i, j, k = self.source_shape
        return Grid((i, j, k), np.asarray(self.source_affine, dtype=np.float64))


def run_intake(
    path: Path,
    out_dir: Path,
    *,
    kind: Kind,
    series_uid: str | None = None,
    limits: Limits | None = None,
    identity: tuple[Pseudonyms, Policy] | None = None,
) -> IntakeReport:
    """Read a scan in a child process; blocks until it ends.

    Args:
        path: The file or folder that was sent in.
        out_dir: Existing folder for what is kept (`volume.nii`, canonical RAS+, uncompressed; of a
            2D image `image.png`) and for scratch.
        kind: What the scan is meant to be.
        series_uid: Which DICOM series, where there are several.
        limits: What the child may take.
        identity: How identities are hidden before anything else is read; the key reaches the child
            through its standard input, where no other process sees it. None leaves all as it is.

    Raises:
        ScanError: The scan cannot be used; `too_large` when a limit ended the child.
        OSError: The child could not write to `out_dir`, or its server ended.
    """
    limits = limits or Limits()
    if series_uid is not None and not _UID.fullmatch(series_uid):
        raise ScanError("no_such_series", "series_uid is not a UID (digits and dots)")
    arguments = _arguments(path.resolve(), out_dir.resolve(), kind, series_uid, limits)
    if identity is not None:
        arguments.insert(0, "--deidentify")
    with tempfile.TemporaryFile(dir=out_dir) as told:  # a file, which a limit bounds; not a pipe
        try:
            status = _server.run(
                arguments,
                folder=out_dir.resolve(),
                stdin=_wish(identity),
                stdout=told.fileno(),
                wall_s=limits.wall_s,
            )
        except TimeoutError:
            raise ScanError("too_large", f"reading it took more than {limits.wall_s:g} s") from None
        told.seek(0)
        output = told.read(_MAX_REPORT_BYTES + 1)
    if len(output) > _MAX_REPORT_BYTES:
        raise ScanError("too_large", f"its report has more than {_MAX_REPORT_BYTES} bytes")
    try:
        return _report(status, output, out_dir, FILE_OF[kind])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ScanError("not_a_scan", "the reader's report cannot be read") from error


def start() -> None:
    """Have the readers loaded, in the background, before the first scan comes."""
    _server.start()


def _arguments(
    path: Path,
    out_dir: Path,
    kind: Kind,
    series_uid: str | None,
    limits: Limits,
) -> list[str]:
    arguments = [
        f"--out={out_dir}",
        f"--kind={kind}",
        f"--memory-bytes={limits.memory_bytes}",
        f"--cpu-s={limits.cpu_s}",
        f"--file-bytes={limits.file_bytes}",
        f"--open-files={limits.open_files}",
    ]
    if series_uid is not None:
        arguments.append(f"--series={series_uid}")
    return [*arguments, "--", str(path)]


def _wish(identity: tuple[Pseudonyms, Policy] | None) -> bytes:
    if identity is None:
        return b""
    names, policy = identity
    return json.dumps({"key": names.key.hex(), "policy": asdict(policy)}).encode()


def _report(status: int, output: bytes, out_dir: Path, file: str) -> IntakeReport:
    if status == EXIT_BAD_SCAN:
        error = json.loads(output)["error"]
        raise ScanError(error["code"], error["detail"], error["extra"])
    if status in (-signal.SIGKILL, -signal.SIGXCPU):
        raise ScanError("too_large", "reading it takes more time or memory than allowed")
    if status < 0:
        raise ScanError("not_a_scan", f"the reader crashed on it (signal {-status})")
    if status != 0:
        raise OSError(f"the intake ended with status {status}")
    report = json.loads(output)
    for name in ("shape", "spacing_mm", "source_shape"):
        report[name] = tuple(report[name])
    original = out_dir / "original" if report.get("deidentified") else None
    return IntakeReport(volume_path=out_dir / file, original_path=original, **report)
