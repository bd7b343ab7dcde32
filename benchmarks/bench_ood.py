"""Which distance from the training scans tells unusual scans best: rivals of `models.ood`.

    python -m benchmarks.bench_ood --json

A network learns the liver from CT of ../shared/data (`--steps`, or `--bundle`); each training scan
and each control gives the vector that serving compares. A rival's threshold is the largest distance
of a training scan from the others (of so few scans that is the 0.95 quantile too). Printed is the
distance of each scan as a part of its rival's threshold: above 1 it is called out. Scans like those
of training should stay below, all others above.

N scans, E embedding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import bundles, common
from imaging import nifti
from imaging.volume import Volume
from models.ood import Gaussian
from models.session import open_session
from trainer.reference import vector_of

CACHE = Path(__file__).parents[1] / "data" / "bench_inference"
SPACING_MM = 6.0
PATCH = (32, 32, 32)
NEIGHBOURS = 5
Vectors = NDArray[np.float64]
Distance = Callable[[Vectors, Vectors], float]
"""Of training vectors (N, E) and one vector (E,)."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--bundle", type=Path, help="a segmenter or encoder of CT")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the trained one is kept")
    parser.add_argument("--steps", type=int, nargs="+", default=[12], help="of the training")
    parser.add_argument("--width", type=int, default=4, help="base width of the network")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    if not bundles.SHARED.is_dir():
        parser.error("no CT: there is no ../shared/data")
    torch.set_num_threads(asked.threads)
    result: dict[str, object] = {"benchmark": "ood"}
    result["environment"] = common.environment(torch.device("cpu"))
    folders = [asked.bundle] if asked.bundle else [_trained(asked, steps) for steps in asked.steps]
    for folder in folders:
        found = measured(folder, asked.threads)
        for name, scans in found.items():
            common.show_table(f"{folder.parent.name}: {name}", scans.items())
        result[folder.parent.name] = found
    if asked.json:
        common.show_json(result)


def measured(folder: Path, threads: int) -> dict[str, dict[str, float]]:
    """Of each rival, the distance of each scan as a part of its threshold."""
    session = open_session(folder, num_threads=threads)

    def vector(volume: Volume) -> Vectors:
        found = vector_of(session, volume)
        assert found is not None, "nothing was seen of the scan"
        return found.astype(np.float64)

    train = np.stack([vector(volume) for _, volume in _training()])
    others = {name: vector(volume) for name, volume in _others()}
    return {name: _parts(distance, train, others) for name, distance in RIVALS.items()}


def _parts(distance: Distance, train: Vectors, others: dict[str, Vectors]) -> dict[str, float]:
    own = [distance(np.delete(train, n, axis=0), train[n]) for n in range(len(train))]
    parts = {name: round(distance(train, one) / max(own), 3) for name, one in others.items()}
    return {"median of training": round(float(np.median(own)) / max(own), 3), **parts}


def cosine(train: Vectors, one: Vectors) -> float:
    """One minus the mean cosine to the nearest: `models.ood` before it was centred."""
    return 1.0 - float(np.sort(train @ one)[-NEIGHBOURS:].mean())


def centred_cosine(train: Vectors, one: Vectors) -> float:
    """The same of what differs from the mean; the length of that is lost."""
    centre = train.mean(axis=0)
    return cosine(_units(train - centre), _units((one - centre)[None])[0])


def euclidean(train: Vectors, one: Vectors) -> float:
    """Mean distance to the nearest; of unit vectors it is a cosine's square root."""
    return float(np.sort(np.linalg.norm(train - one, axis=1))[:NEIGHBOURS].mean())


def standardised(train: Vectors, one: Vectors) -> float:
    """The same after each number is centred and divided by its deviation."""
    centre, scale = train.mean(axis=0), train.std(axis=0)
    scale = np.maximum(scale, 1e-3 * scale.max())
    return euclidean((train - centre) / scale, (one - centre) / scale)


def mahalanobis(train: Vectors, one: Vectors) -> float:
    """With the covariance of Ledoit and Wolf: what `models.ood` does."""
    return Gaussian.of(train).distance(one)


RIVALS: dict[str, Distance] = {
    "cosine": cosine,
    "centred cosine": centred_cosine,
    "euclidean": euclidean,
    "standardised euclidean": standardised,
    "mahalanobis (Ledoit-Wolf)": mahalanobis,
}


def _units(vectors: Vectors) -> Vectors:
    units: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units


def _trained(asked: argparse.Namespace, steps: int) -> Path:
    return bundles.trained(
        asked.cache,
        width=asked.width,
        num_steps=steps,
        threads=asked.threads,
        spacing_mm=SPACING_MM,
        patch=PATCH,
    )


def _training() -> Iterator[tuple[str, Volume]]:
    for path in sorted(bundles.SHARED.glob("*_image.nii.gz")):
        if not path.name.startswith(bundles.HELD_OUT):
            yield path.name, nifti.read(path)[0]


def _others() -> Iterator[tuple[str, Volume]]:
    """Scans that are like those of training, and scans that are not."""
    held_out, _ = nifti.read(bundles.SHARED / f"{bundles.HELD_OUT}_image.nii.gz")
    yield "like: abdominal CT, held out", held_out
    low, high = int(held_out.voxels.min()), int(held_out.voxels.max())
    noise = np.random.default_rng(0).integers(low, high, held_out.shape)
    made = {
        "inverted": low + high - held_out.voxels.astype(np.int32),
        "upside down (K flipped)": held_out.voxels[:, :, ::-1],
        "front to back (J flipped)": held_out.voxels[:, ::-1],
        "noise": noise,
    }
    for name, voxels in made.items():
        yield name, Volume(np.ascontiguousarray(voxels, dtype=np.int16), held_out.affine)
    for name, file in (
        ("chest CT", "ct_chest_lidc/lidc_0314_3x3x3.nii.gz"),
        ("MR T2 of the liver", "mr_liver_chaos_t2/chaos_t2_02_image.nii.gz"),
        ("MR T1 of a thigh", "ct_mr_sarcoma_sts/STS_002_MR_T1_image.nii.gz"),
        ("CT of a thigh", "ct_mr_sarcoma_sts/STS_002_CT_image.nii.gz"),
    ):
        yield name, nifti.read(bundles.SHARED.parent / file)[0]


if __name__ == "__main__":
    main()
