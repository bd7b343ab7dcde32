"""A folder of 300 DICOM slices to a RAS+ volume, against SimpleITK and dicom2nifti.

All three read the same files, which are written for the run. Ours groups, sorts and checks every
header, explains what it leaves out, rescales, and ends in RAS+; SimpleITK's series reader sorts
and rescales; dicom2nifti checks and rescales, and is spared the reorientation and the writing of
its file. Rounds of all of them take turns in one process with one thread; a round's time is the
processor time of the process, so that neighbours on a shared machine count as little as they can.
The ratio by the clock is there too. Peak memory is that of a fresh process, interpreter and
libraries included, over the bytes of the voxels.

    python -m benchmarks.bench_intake --json

Needs SimpleITK and dicom2nifti, of the extra `test`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from imaging.dicom_file import quiet
from imaging.intake import read_scan

GOALS = {"vs_simpleitk": 1.0, "vs_dicom2nifti": 3.0, "peak_over_volume": 2.5, "zip_overhead": 1.1}

Times = tuple[float, float]
"""Processor seconds and seconds by the clock."""


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    if asked.peak_of is not None:
        print(_peak_bytes(asked.peak_of))
        return
    _use_one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        folder, archive = _write(Path(scratch), asked.slices, asked.size)
        result = measure(folder, archive, asked.rounds)
        command = [sys.executable, "-m", "benchmarks.bench_intake", "--peak-of", str(folder)]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        result["peak_over_volume"] = peak / (asked.slices * asked.size**2 * 2)
    _show(result, asked)


def measure(folder: Path, archive: Path, rounds: int) -> dict[str, object]:
    """Medians over rounds in which everybody takes a turn."""
    work: dict[str, Callable[[Path, Path], object]] = {
        "ours": _ours,
        "simpleitk": _simpleitk,
        "dicom2nifti": _dicom2nifti,
        "zip": _zip,
        "unzip_and_folder": _unzip_and_folder,
    }
    taken: dict[str, list[Times]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, read in work.items():
            times = _timed(read, folder, archive)
            if number:  # the first round loads libraries and fills the page cache
                taken[name].append(times)
    result: dict[str, object] = {"benchmark": "intake", "rounds": rounds}
    for name, rivals in taken.items():
        result[f"{name}_s"] = statistics.median(cpu for cpu, _ in rivals)
    for ratio, above, below in (
        ("vs_simpleitk", "simpleitk", "ours"),
        ("vs_dicom2nifti", "dicom2nifti", "ours"),
        ("zip_overhead", "zip", "unzip_and_folder"),
    ):
        for place, ending in enumerate(("", "_by_the_clock")):
            each = [a[place] / b[place] for a, b in zip(taken[above], taken[below], strict=True)]
            result[ratio + ending] = statistics.median(each)
            result[f"{ratio}{ending}_by_round"] = [round(one, 2) for one in each]
    return result


def _ours(folder: Path, _archive: Path) -> object:
    scan = read_scan(folder, kind="image")
    assert len(scan.used) == scan.volume.shape[2] and not scan.members
    return scan


def _zip(_folder: Path, archive: Path) -> object:
    return read_scan(archive, kind="image")


def _unzip_and_folder(_folder: Path, archive: Path) -> object:
    with tempfile.TemporaryDirectory(dir=archive.parent) as unpacked:
        with zipfile.ZipFile(archive) as members:
            members.extractall(unpacked)
        return read_scan(Path(unpacked), kind="image")


def _simpleitk(folder: Path, _archive: Path) -> object:
    import SimpleITK as sitk  # noqa: N813  # its usual name

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def _dicom2nifti(folder: Path, _archive: Path) -> object:
    from dicom2nifti import common, convert_dicom

    slices = common.read_dicom_directory(str(folder))
    return convert_dicom.dicom_array_to_nifti(slices, None, reorient_nifti=False)


def _write(scratch: Path, num_slices: int, size: int) -> tuple[Path, Path]:
    """A series with the smoothness and the noise of a CT, as a folder and as a zip."""
    from imaging import phantom_dicom
    from imaging.volume import Volume

    random = np.random.default_rng(0)
    waves = [np.cumsum(random.normal(size=n)) for n in (size, size, num_slices)]
    voxels = np.empty((size, size, num_slices), dtype=np.int16, order="F")
    plane = 20 * (waves[0][:, None] + waves[1][None, :])
    for k in range(num_slices):
        noise = random.normal(scale=12, size=(size, size))
        voxels[:, :, k] = np.clip(plane + 20 * waves[2][k] + noise, -1024, 3000)
    folder, archive = scratch / "series", scratch / "series.zip"
    affine = np.diag([0.75, 0.75, 1.0, 1.0])
    files = phantom_dicom.write_dicom_series(Volume(voxels, affine), folder, seed=1)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as members:
        for file in sorted(files):
            members.write(file, file.name)
    return folder, archive


def _peak_bytes(folder: Path) -> int:
    """Highest resident set of this process after reading a folder."""
    read_scan(folder, kind="image")
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def _timed(read: Callable[[Path, Path], object], folder: Path, archive: Path) -> Times:
    with quiet():
        cpu, clock = time.process_time(), time.perf_counter()
        made = read(folder, archive)
        taken = time.process_time() - cpu, time.perf_counter() - clock
        del made
    return taken


def _use_one_thread() -> None:
    import SimpleITK as sitk  # noqa: N813  # its usual name

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _show(result: dict[str, object], asked: argparse.Namespace) -> None:
    from benchmarks import common  # here, as it loads torch, which would count as memory

    result |= {"slices": asked.slices, "size": asked.size, "goals": GOALS}
    result |= {"environment": common.environment(common.training_device())}
    common.show_table("Reading a series", result.items())
    if asked.json:
        common.show_json(result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--size", type=int, default=512, help="rows and columns of a slice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
