"""What an upload costs beside its reading: a forked child against a fresh interpreter.

Both read the same little scans behind the same walls, in turn: a NIfTI file, a zip of 40 slices.

    python -m benchmarks.bench_intake_start --json
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common
from imaging import phantom, phantom_dicom, sandbox


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), asked.rounds)
    result |= {"environment": common.environment(common.training_device())}
    common.show_table("The start of an intake", result.items())
    if asked.json:
        common.show_json(result)


def measure(folder: Path, rounds: int) -> dict[str, object]:
    """Medians in milliseconds, and how many times longer the fresh interpreter takes."""
    result: dict[str, object] = {}
    sandbox.start()
    for name, path in _scans(folder).items():
        forked, fresh = [], []
        _forked(path, folder)  # the server loads until then
        for _ in range(rounds):
            forked.append(_forked(path, folder))
            fresh.append(_fresh(path, folder))
        result[f"{name}_forked_ms"] = round(1000 * statistics.median(forked), 1)
        result[f"{name}_fresh_ms"] = round(1000 * statistics.median(fresh), 1)
        ratio = statistics.median(b / a for a, b in zip(forked, fresh, strict=True))
        result[f"{name}_ratio"] = round(ratio, 1)
    return result


def _scans(folder: Path) -> dict[str, Path]:
    made = phantom.make(0, shape=(64, 64, 40), spacing_mm=(4.0, 4.0, 5.0))
    image, _ = phantom.write_pair(made, folder, "case")
    phantom_dicom.write_dicom_series(made.volume, folder / "series", seed=0)
    archive = shutil.make_archive(str(folder / "series"), "zip", folder / "series")
    return {"nifti": image, "zip": Path(archive)}


def _forked(path: Path, folder: Path) -> float:
    begin = time.perf_counter()
    sandbox.run_intake(path, folder, kind="image")
    return time.perf_counter() - begin


def _fresh(path: Path, folder: Path) -> float:
    command = [
        sys.executable,
        "-s",
        "-P",
        "-m",
        "imaging.intake",
        f"--out={folder}",
        "--kind=image",
    ]
    begin = time.perf_counter()
    subprocess.run(
        [*command, f"--confine={os.getpid()}", "--", str(path)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
