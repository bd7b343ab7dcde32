"""The cascade as a contender of `benchmarks.bench_inference`, and how many windows it saves.

    python -m benchmarks.cascade --json      # windows alone, on CT of ../shared/data; no network

The windows are counted for the true liver's box with 15 mm on each side at 1.5 mm and a coarse pass
at 4 mm, as `models.cascade` lays them, against windows of 96x96x64 with half an overlap over the
whole scan, which is what MONAI's user writes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import bundles, common
from imaging import nifti
from imaging.resample import resampled_grid
from imaging.volume import Shape, Volume
from models import box, compose
from models.box import Box
from models.cascade import Passes, segment_case
from models.session import open_session
from models.tiling import window_starts

MARGIN_MM = 15.0
COARSE_MM, FINE_MM = 4.0, 2.0
COUNTED_MM = 1.5
"""Of the fine pass where windows are counted alone."""
NUM_SCANS = 5
Labels = NDArray[np.uint8]
Result = dict[str, object]


class Contender:
    """Segments a volume by a cascade of bundles.

    Args:
        fine: The bundle that makes the mask.
        scratch: Where the composed bundle goes.
        volume: The CT.
        coarse: The bundle that finds the organ; `fine` at 4 mm if None.
        organ: What is looked for.
        device: `cpu` or `cuda`.
        threads: Of onnxruntime.
    """

    def __init__(
        self,
        fine: Path,
        scratch: Path,
        volume: Volume,
        *,
        coarse: Path | None = None,
        organ: str = "liver",
        device: str = "cpu",
        threads: int = 2,
    ) -> None:
        out = scratch / "cascade"
        compose.compose(
            out,
            fine,
            coarse,
            organ=organ,
            margin_mm=MARGIN_MM,
            coarse_spacing_mm=COARSE_MM if coarse is None else None,
        )
        self._volume = volume
        self._session = open_session(out, device=device, num_threads=threads)
        self._finder = (
            open_session(out, device=device, num_threads=threads, part="coarse")
            if coarse is not None
            else None
        )
        self._last: Passes | None = None

    def segment(self) -> Labels:
        """The mask, (I, J, K) on the volume's grid."""
        case = segment_case(self._session, self._volume, coarse=self._finder)
        self._last = case.cascade
        return case.segmentation.labels

    def passes(self) -> Result:
        """What the two passes of the last segmentation did."""
        assert self._last is not None
        return asdict(self._last)


def windows_saved(
    volume: Volume, organ: NDArray[np.bool_], *, patch: Shape = bundles.PATCH, overlap: float = 0.5
) -> Result:
    """Windows of one pass and of two over a scan, if the coarse pass finds the organ as it is.

    Args:
        volume: The CT.
        organ: Where the organ is, (I, J, K).
        patch: Of both passes.
        overlap: Of both passes.
    """
    fine = resampled_grid(volume.grid, (COUNTED_MM,) * 3)
    coarse = resampled_grid(volume.grid, (COARSE_MM,) * 3)
    found = box.around(organ)
    assert found is not None
    part: Box = box.carried(found, volume.grid, fine, MARGIN_MM)
    part = box.at_least(part, patch, fine.shape)
    single, first, second = (
        len(window_starts(shape, patch, overlap))
        for shape in (fine.shape, coarse.shape, part.shape)
    )
    return {
        "single": single,
        "coarse": first,
        "fine": second,
        "times_fewer": single / (first + second),
        "box_share": math.prod(part.shape) / math.prod(fine.shape),
    }


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    asked = parser.parse_args()
    paths = sorted(bundles.SHARED.glob("*_image.nii.gz"))[:NUM_SCANS]
    if not paths:
        parser.error(f"no CT below {bundles.SHARED}")
    result: Result = {"benchmark": "cascade_windows"}
    times: list[float] = []
    for path in paths:
        volume, _ = nifti.read(path)
        labels, _ = nifti.read(path.with_name(path.name.replace("_image", "_label")))
        counted = windows_saved(volume, labels.voxels == bundles.LIVER_IN_BTCV)
        result[path.name.partition("_image")[0]] = counted
        times.append(float(str(counted["times_fewer"])))
    result["times_fewer_least"], result["times_fewer_most"] = min(times), max(times)
    result["times_fewer_median"] = statistics.median(times)
    common.show_table("Windows of a cascade", result.items())
    if asked.json:
        common.show_json(result)


if __name__ == "__main__":
    main()
