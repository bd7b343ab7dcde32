"""Peak memory of a worker's process that segments a scan: large ones, and how it grows.

    python -m benchmarks.peak BUNDLE SCAN

is the child: it loads what an inference worker loads, segments the scan, writes the mask and proves
it, and prints what the system says of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from imaging import nifti, preview
from imaging.results.certificate import certify_nifti
from imaging.volume import Shape

LARGE: Shape = (512, 512, 1000)
Found = dict[str, float]


def of_large(scratch: Path, shape: Shape = LARGE) -> dict[str, object]:
    """Of a large scan at the network's own spacing, 3 classes."""
    from benchmarks import bundles

    folder = bundles.untrained(scratch / "large", width=2, spacing_mm=(1.0,) * 3, overlap=0.25)
    found = measured(folder, write_noise(scratch, shape))
    return {"peak_shape": shape, "peak_gib": found["peak_bytes"] / 2**30, "peak": found}


def growth(scratch: Path, shape: Shape) -> dict[str, object]:
    """Over voxels, windows (overlap) and classes, each in a process of its own."""
    from benchmarks import bundles

    spacing_mm = (1.0, 1.0, 1.0)
    few = bundles.untrained(scratch / "few", width=2, spacing_mm=spacing_mm, overlap=0.0)
    half = bundles.untrained(scratch / "half", width=2, spacing_mm=spacing_mm, overlap=0.5)
    labels = tuple(f"organ{n}" for n in range(1, 20))
    many = bundles.untrained(
        scratch / "many", width=2, labels=labels, spacing_mm=spacing_mm, overlap=0.0
    )
    found: dict[str, object] = {}
    for times in (1, 2, 4, 8):
        scan = write_noise(scratch, (shape[0], shape[1], shape[2] * times))
        found[f"voxels_x{times}"] = measured(few, scan)
    scan = write_noise(scratch, (shape[0], shape[1], shape[2] * 2))
    found["voxels_x2_overlap_0.5"] = measured(half, scan)
    found["voxels_x2_20_classes"] = measured(many, scan)
    return {"growth_of": shape, "growth": found}


def write_noise(folder: Path, shape: Shape) -> Path:
    """A scan without air, in the form that the intake writes."""
    path = folder / f"noise_{'x'.join(map(str, shape))}.nii"
    if not path.exists():
        random = np.random.default_rng(0)
        voxels = np.empty(shape, dtype=np.int16, order="F")
        plane = random.integers(-100, 200, shape[:2], dtype=np.int16)
        for k in range(shape[2]):
            voxels[:, :, k] = np.roll(plane, k * 7, axis=0)
        nifti.write(path, voxels, np.eye(4))
    return path


def measured(folder: Path, scan: Path) -> Found:
    """What a process of its own says of itself after a segmentation."""
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak", str(folder), str(scan)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    found: Found = json.loads(ran.stdout.splitlines()[-1])
    return found


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def _main() -> None:
    import service.tasks  # noqa: F401  # what a worker has loaded counts
    from models import memory, predict, preflight
    from models.session import open_session
    from service import itk_reader

    session = open_session(Path(sys.argv[1]), num_threads=2)
    scan = nifti.open_canonical(Path(sys.argv[2]))
    plan = preflight.plan(session, scan, available_bytes=memory.available_bytes())
    loaded = _status("VmRSS:")
    began = time.perf_counter()
    found = predict.segment(session, scan, plan=plan)
    segmented_s, segmented = time.perf_counter() - began, _status("VmHWM:")
    names = {name: value for value, name in enumerate(session.manifest.labels, start=1)}
    with tempfile.TemporaryDirectory() as scratch:
        mask = Path(scratch) / "mask.nii.gz"
        nifti.write(mask, found.labels, scan.affine)
        certify_nifti(mask, scan.grid, found.labels, names, [itk_reader.read_mask])
        preview.overlay_png(scan, found.labels, Path(scratch) / "preview.png")
    result = {
        "loaded_bytes": loaded,
        "segment_peak_bytes": segmented,
        "predicted_peak_bytes": loaded + plan.predicted_bytes,
        "peak_bytes": _status("VmHWM:"),
        "num_windows": found.num_windows,
        "num_blocks": plan.num_blocks,
        "predicted_s": plan.predicted_s,
        "segment_s": round(segmented_s, 2),
        "total_s": round(time.perf_counter() - began, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    _main()
