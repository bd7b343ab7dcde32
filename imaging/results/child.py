"""Results of a DICOM source in a child process with limits: its headers are hostile bytes.

The child is forked by `imaging.forkserver`. It gets a bare environment, no standard input, and the
walls of `imaging.confine`.
Whatever it cannot write is named; only a file that differs from what was computed is an error.
"""

from __future__ import annotations

import json
import math
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from imaging.forkserver import ForkServer
from imaging.geometry import GeometryError
from imaging.results.facts import Facts
from imaging.sandbox import Limits
from imaging.volume import Grid

Format = Literal["dicom-seg", "dicom-sr", "rtstruct"]
FORMATS: tuple[Format, ...] = ("dicom-seg", "dicom-sr", "rtstruct")

_server = ForkServer("imaging.results.__main__")
_EXIT_NOT_CERTIFIED = 66
_MAX_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """A result that was written, and certified where it holds a mask."""

    format: Format
    path: Path
    certificate: dict[str, Any] | None
    notes: tuple[str, ...]
    """What it states otherwise than the source, and why."""


@dataclass(frozen=True, slots=True)
class NotMade:
    """A result that there is not, and why."""

    format: Format
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Results:
    """What came of it: each format that was asked for is in one of the two."""

    written: tuple[Written, ...]
    not_made: tuple[NotMade, ...]


def write_results(
    source_path: Path,
    mask_path: Path,
    out_dir: Path,
    *,
    series_uid: str,
    sop_uids: Sequence[str],
    grid: Grid,
    facts: Facts,
    formats: Sequence[Format],
    limits: Limits | None = None,
) -> Results:
    """Write the mask in the formats asked for; blocks until the child ends.

    Args:
        source_path: The DICOM that was sent, as it is stored.
        mask_path: The mask (NIfTI) on the source's grid.
        out_dir: Existing folder for the files and for scratch.
        series_uid: The series that the volume was made of.
        sop_uids: Of each file that it was made of.
        grid: The source's grid.
        facts: What results state of themselves.
        formats: Which.
        limits: What the child may take; `limits_for` the grid if absent.

    Raises:
        GeometryError: A result is not what was computed: nothing may leave.
        OSError: The child could not be started.
    """
    limits = limits or limits_for(grid)
    job = {
        "series_uid": series_uid,
        "sop_uids": list(sop_uids),
        "shape": list(grid.shape),
        "affine": grid.affine.tolist(),
        "facts": asdict(facts),
    }
    written: tuple[Written, ...] = ()
    not_made: tuple[NotMade, ...] = ()
    outlines: list[Format] = [form for form in formats if form == "rtstruct"]
    for some in ([form for form in formats if form not in outlines], outlines):
        if some:  # outlines take longest: a limit that ends them shall not cost the rest
            made = _write_some(job, some, source_path, mask_path, out_dir=out_dir, limits=limits)
            written, not_made = written + made.written, not_made + made.not_made
    return Results(written, not_made)


def limits_for(grid: Grid) -> Limits:
    """What writing results of a grid may take: measured for two labels, doubled."""
    num_voxels = math.prod(grid.shape)
    cpu_s = 120 + num_voxels // 1_000_000
    return Limits(memory_bytes=(2 << 30) + 24 * num_voxels, cpu_s=cpu_s, wall_s=2.0 * cpu_s)


def _write_some(
    job: dict[str, Any],
    formats: list[Format],
    source_path: Path,
    mask_path: Path,
    *,
    out_dir: Path,
    limits: Limits,
) -> Results:
    job_path = out_dir / "job.json"
    job_path.write_text(json.dumps({**job, "formats": formats}), encoding="utf-8")
    status, output = _run(
        [str(job_path), str(source_path.resolve()), str(mask_path.resolve())],
        out_dir.resolve(),
        limits,
    )
    if status == _EXIT_NOT_CERTIFIED:
        raise GeometryError(str(json.loads(output)["detail"]))
    if status != 0:
        why = f"the writer ended with status {status}, by a limit or by a crash"
        return Results((), tuple(NotMade(form, "result_not_written", why) for form in formats))
    try:
        answer = json.loads(output)
    except ValueError:
        why = "the writer's answer cannot be read"
        return Results((), tuple(NotMade(form, "result_not_written", why) for form in formats))
    return Results(
        tuple(
            Written(one["format"], out_dir / one["name"], one["certificate"], tuple(one["notes"]))
            for one in answer["files"]
        ),
        tuple(NotMade(**one) for one in answer["not_made"]),
    )


def _run(paths: list[str], out_dir: Path, limits: Limits) -> tuple[int, bytes]:
    arguments = [
        f"--out={out_dir}",
        f"--memory-bytes={limits.memory_bytes}",
        f"--cpu-s={limits.cpu_s}",
        f"--file-bytes={limits.file_bytes}",
        f"--open-files={limits.open_files}",
        "--",
        *paths,
    ]
    with tempfile.TemporaryFile(dir=out_dir) as told:
        try:
            status = _server.run(
                arguments, folder=out_dir, stdin=b"", stdout=told.fileno(), wall_s=limits.wall_s
            )
        except TimeoutError:
            return -signal.SIGKILL, b""
        told.seek(0)
        return status, told.read(_MAX_ANSWER_BYTES)
