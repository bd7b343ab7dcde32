"""Whole-volume segmentation against MONAI's sliding window, and what it takes of memory.

    python -m benchmarks.bench_inference --json

All contenders read the same CT, already at the network's spacing, and run the same weights, in
turn in one process. MONAI runs as a user would write it: `SlidingWindowInferer` with the plain
network in PyTorch eager, 96x96x64 windows, Gaussian, overlap 0.5, then argmax. Ours is
`predict.segment` on the exported bundle: with the same windows, and with our defaults.

The CT is one of ../shared/data that the networks never saw, else a phantom. One network segments it
at 2 mm, in one pass and in a cascade, in which another one finds the liver at 4 mm first; they
are trained if they are not there yet (`benchmarks.bundles`), or come as `--fine` and `--coarse`.
`--only` measures one of the two, `--bundle` names another network for the single pass. `--memory`
measures the peak of a process that segments 512x512x1000 voxels, `--growth` that of 1, 2, 4 and 8
times as many voxels, more windows and more classes; `--study` compares windows and overlaps, which
is where our defaults come from.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import bundles, common, peak
from benchmarks import cascade as two_pass
from imaging import nifti, phantom
from imaging.resample import resample, resampled_grid
from imaging.volume import Shape, Volume
from models import bundle as bundle_files
from models import predict
from models.bundle import Manifest, volume_input
from models.networks.unet3d import UNet3d
from models.postprocess import keep_largest
from models.preprocess import prepare
from models.session import OnnxSession, open_session
from models.tiling import Windows
from models.windows import serving_windows

CACHE = Path(__file__).parents[1] / "data" / "bench_inference"
MONAI_OVERLAP = 0.5
GOALS = {
    "vs_monai_same_windows": 1.8,
    "equal_voxels": 0.9999,
    "vs_monai_defaults": 3.0,
    "defaults_liver_dice": 0.99,
    "vs_monai_cascade": 8.0,
    "cascade_liver_dice": 0.99,
    "peak_gib": 2.5,
}
STUDY = (
    ((96, 96, 64), 0.5),
    ((96, 96, 64), 0.375),
    ((96, 96, 64), 0.25),
    ((96, 96, 64), 0.125),
    ((128, 128, 96), 0.25),
    ((168, 168, 64), 0.25),
    ((168, 168, 104), 0.125),
)
Labels = NDArray[np.uint8]
Result = dict[str, object]


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    device = torch.device(asked.device)
    result: Result = {"benchmark": "inference", "goals": GOALS}
    result["environment"] = common.environment(device) | {"threads": asked.threads}
    with tempfile.TemporaryDirectory() as scratch:
        if asked.smoke:
            asked.bundle = asked.fine = asked.coarse = bundles.untrained(
                Path(scratch) / "bundle", width=2, labels=("liver",), patch=(32, 32, 16)
            )
        if asked.memory:
            result |= peak.of_large(Path(scratch), (64, 64, 80) if asked.smoke else peak.LARGE)
        if asked.growth:
            result |= peak.growth(Path(scratch), (48, 48, 40) if asked.smoke else (160, 160, 128))
        if not (asked.memory or asked.growth):
            torch.set_num_threads(asked.threads)
            if asked.only != "cascade":
                result |= speed(asked, device)
            if asked.only != "one_pass" and not asked.study:
                result |= cascade(asked, device, Path(scratch))
    common.show_table("Whole-volume segmentation", result.items())
    if asked.json:
        common.show_json(result)


def speed(asked: argparse.Namespace, device: torch.device) -> Result:
    """The contenders in turn, and how far their masks agree."""
    folder = asked.bundle or _fine(asked)
    session = open_session(folder, device=asked.device, num_threads=asked.threads)
    name, volume, truth = _scan(session.manifest, is_tiny=asked.smoke)
    patch = volume_input(session.manifest)[1] if asked.smoke else bundles.PATCH
    monai = _Monai(folder, session.manifest, patch, device)
    work: dict[str, Callable[[], Labels]] = {"monai": lambda: monai.segment(volume)}
    if asked.study:
        for size, overlap in STUDY:
            windows = Windows(size, overlap)
            work[f"{size} {overlap}"] = _segmenting(session, volume, windows)
    else:
        work["same_windows"] = _segmenting(session, volume, Windows(patch, MONAI_OVERLAP))
        work["defaults"] = _segmenting(session, volume, None)
    monai.warm_up(patch)
    by_clock, by_processor, masks = _in_turn(work, asked.rounds)
    defaults = serving_windows(session.manifest)
    result: Result = {
        "scan": name,
        "shape": volume.shape,
        "width": _width(session.manifest),
        "default_window": defaults.size,
        "default_overlap": defaults.overlap,
        "rounds": asked.rounds,
    }
    reference = masks["monai"]
    if truth is not None:
        result |= {f"{one}_truth_dice": _dice(mask, truth) for one, mask in masks.items()}
    for one in masks:
        if one == "monai":
            continue
        result[f"vs_monai_{one}"] = _ratio(by_clock, one)
        result[f"vs_monai_{one}_by_round"] = [
            round(a / b, 2) for a, b in zip(by_clock["monai"], by_clock[one], strict=True)
        ]
        result[f"vs_monai_{one}_by_processor_time"] = _ratio(by_processor, one)
        result[f"{one}_liver_dice"] = _dice(masks[one], reference)
    if "same_windows" in masks:
        result["equal_voxels"] = float((masks["same_windows"] == reference).mean())
    result["seconds"] = {one: statistics.median(taken) for one, taken in by_clock.items()}
    return result


def cascade(asked: argparse.Namespace, device: torch.device, scratch: Path) -> Result:
    """Two passes against MONAI's one with the same fine network, at the fine network's spacing.

    The Dice is that of both masks over the whole scan: what MONAI's pass finds far from the liver
    counts against the cascade. `cascade_largest_dice` is that of the largest component of each.
    """
    coarse, fine = _coarse(asked), _fine(asked)
    manifest = bundle_files.load(fine)
    name, volume, truth = _scan(manifest, is_tiny=asked.smoke)
    patch = volume_input(manifest)[1] if asked.smoke else bundles.PATCH
    rival = _Monai(fine, manifest, patch, device)
    ours = two_pass.Contender(
        fine, scratch, volume, coarse=coarse, device=asked.device, threads=asked.threads
    )
    rival.warm_up(patch)
    work = {"monai": lambda: rival.segment(volume), "cascade": ours.segment}
    by_clock, by_processor, masks = _in_turn(work, asked.rounds)
    reference, found = masks["monai"], masks["cascade"]
    liver: dict[int, list[int]] = {1: []}
    return {
        "cascade_scan": name,
        "cascade_shape": volume.shape,
        "cascade_passes": ours.passes(),
        "vs_monai_cascade": _ratio(by_clock, "cascade"),
        "vs_monai_cascade_by_processor_time": _ratio(by_processor, "cascade"),
        "cascade_liver_dice": _dice(found, reference),
        "cascade_largest_dice": _dice(keep_largest(found, liver), keep_largest(reference, liver)),
        "cascade_truth_dice": None if truth is None else _dice(found, truth),
        "cascade_monai_truth_dice": None if truth is None else _dice(reference, truth),
        "cascade_seconds": {one: statistics.median(taken) for one, taken in by_clock.items()},
    }


def _fine(asked: argparse.Namespace) -> Path:
    """What makes the masks, at 2 mm, with the windows of the comparison."""
    given: Path | None = asked.fine
    return given or bundles.trained(
        asked.cache,
        width=asked.width,
        num_steps=asked.fine_steps,
        threads=asked.threads,
        spacing_mm=two_pass.FINE_MM,
        patch=bundles.PATCH,
        parent=_coarse(asked),
        device=asked.device,
    )


def _coarse(asked: argparse.Namespace) -> Path:
    """What finds the liver at 4 mm; the fine network begins with its weights."""
    given: Path | None = asked.coarse
    return given or bundles.trained(
        asked.cache,
        width=asked.width,
        num_steps=asked.steps,
        threads=asked.threads,
        spacing_mm=two_pass.COARSE_MM,
        device=asked.device,
    )


class _Monai:
    """The plain network in PyTorch eager, in MONAI's sliding window."""

    def __init__(
        self, folder: Path, manifest: Manifest, patch: Shape, device: torch.device
    ) -> None:
        from monai.inferers.inferer import SlidingWindowInferer

        self._manifest, self._device = manifest, device
        self._network = _plain_network(folder, manifest).to(device)
        self._inferer = SlidingWindowInferer(
            patch, sw_batch_size=1, overlap=MONAI_OVERLAP, mode="gaussian"
        )

    @torch.inference_mode()
    def warm_up(self, patch: Shape) -> None:
        """The first window costs what no later one does."""
        self._network(torch.zeros(1, 1, *patch, device=self._device))

    @torch.inference_mode()
    def segment(self, volume: Volume) -> Labels:
        spec, _ = volume_input(self._manifest)
        image = torch.from_numpy(prepare(volume, spec).array)[None, None].to(self._device)
        logits = self._inferer(image, self._network)
        assert isinstance(logits, torch.Tensor)
        labels: Labels = logits[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        return labels


def _plain_network(folder: Path, manifest: Manifest) -> UNet3d:
    """The network as it was trained, from the bundle's weights; random without any."""
    network = bundles.random_network(_width(manifest), len(manifest.labels), fused=False)
    weights = folder / bundle_files.WEIGHTS
    if weights.is_file():
        from safetensors.torch import load_file

        network.load_state_dict(load_file(weights))
    return network


def _width(manifest: Manifest) -> int:
    return int(getattr(manifest.recipe.network, "base_width", 0))


def _segmenting(
    session: OnnxSession, volume: Volume, windows: Windows | None
) -> Callable[[], Labels]:
    return lambda: predict.segment(session, volume, windows=windows).labels


def _in_turn(
    work: dict[str, Callable[[], Labels]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Labels]]:
    """Seconds by the clock and of processor time of each round, and the masks."""
    by_clock: dict[str, list[float]] = {name: [] for name in work}
    by_processor: dict[str, list[float]] = {name: [] for name in work}
    masks: dict[str, Labels] = {}
    for _ in range(rounds):
        for name, segment in work.items():
            clock, processor = time.perf_counter(), time.process_time()
            masks[name] = segment()
            by_clock[name].append(time.perf_counter() - clock)
            by_processor[name].append(time.process_time() - processor)
            print(f"{name}: {by_clock[name][-1]:.1f} s", file=sys.stderr)
    return by_clock, by_processor, masks


def _ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(
        rival / ours for rival, ours in zip(seconds["monai"], seconds[name], strict=True)
    )


def _dice(one: Labels, other: Labels) -> float:
    """Of what is not background."""
    total = int((one > 0).sum()) + int((other > 0).sum())
    return 2 * int(((one > 0) & (other > 0)).sum()) / total if total else 1.0


def _scan(manifest: Manifest, *, is_tiny: bool) -> tuple[str, Volume, Labels | None]:
    """A CT at the network's spacing, and its liver."""
    spec, _ = volume_input(manifest)
    image = bundles.SHARED / f"{bundles.HELD_OUT}_image.nii.gz"
    if is_tiny or not image.is_file():
        shape = (24, 24, 20) if is_tiny else (128, 128, 64)
        made = phantom.make(0, shape=shape)
        name, volume, liver = "phantom", made.volume, made.labels == phantom.LIVER
    else:
        name, (volume, _) = bundles.HELD_OUT, nifti.read(image)
        labels, _ = nifti.read(image.with_name(f"{bundles.HELD_OUT}_label.nii.gz"))
        liver = labels.voxels == bundles.LIVER_IN_BTCV
    grid = resampled_grid(volume.grid, spec.spacing_mm)
    voxels = resample(volume.voxels, volume.grid, grid, order=1)
    truth: Labels = (resample(liver, volume.grid, grid, order=1) > 0.5).astype(np.uint8)
    return name, Volume(voxels, grid.affine), truth


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--smoke", action="store_true", help="tiny, to see whether it runs")
    parser.add_argument("--bundle", type=Path, help="a segmenter with its weights")
    parser.add_argument("--fine", type=Path, help="the cascade's fine network, at 2 mm")
    parser.add_argument("--coarse", type=Path, help="the network that finds the liver, at 4 mm")
    parser.add_argument("--only", choices=("one_pass", "cascade"), help="leave out the other")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the trained one is kept")
    parser.add_argument("--width", type=int, default=8, help="base width of the network")
    parser.add_argument("--steps", type=int, default=900, help="of the coarse network's training")
    parser.add_argument("--fine-steps", type=int, default=700, help="of the fine network's")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--study", action="store_true", help="compare windows and overlaps")
    parser.add_argument("--memory", action="store_true", help="the peak of a large scan, instead")
    parser.add_argument("--growth", action="store_true", help="over voxels and more, instead")
    return parser.parse_args()


if __name__ == "__main__":
    main()
