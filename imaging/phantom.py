"""Synthetic abdominal CT in portal venous phase: what the demo and the tests segment.

Organs are ellipsoids and tubes in a body frame (mm, RAS+, origin in the middle of the abdomen);
a random pose places the body on the scanner's grid. Everything follows from the seed.

Axes: I J K voxels in RAS+, so the liver (the patient's right) lies at large I.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from imaging import nifti
from imaging.phantom_dicom import write_dicom_series, write_dicom_zip
from imaging.volume import Shape, Spacing, Volume

__all__ = [
    "LIVER",
    "TUMOUR",
    "Phantom",
    "make",
    "write_dicom_series",
    "write_dicom_zip",
    "write_pair",
]

LIVER = 1
TUMOUR = 2

_AIR_HU = -1000.0
_NOISE_HU = 12.0
_BODY_MM = (168.0, 118.0)  # half axes, right-left and front-back

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]
Point = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Phantom:
    """A synthetic scan: HU (int16) with labels (uint8) 1 liver, 2 tumour, both (I, J, K)."""

    volume: Volume
    labels: NDArray[np.uint8]


def make(
    seed: int, *, shape: Shape = (128, 128, 64), spacing_mm: Spacing = (3.0, 3.0, 5.0)
) -> Phantom:
    """Draw one phantom.

    A field of view smaller than the body gets a smaller body, so the outline is never cut in
    plane; along K the body runs through.

    Args:
        seed: The same seed, shape and spacing give the same phantom, bit for bit.
        shape: Voxels along I, J, K.
        spacing_mm: Spacing along I, J, K, mm.
    """
    rng = np.random.default_rng(seed)
    body = _Body.pose(rng, shape, spacing_mm)
    hu = np.full(shape, _AIR_HU, dtype=np.float32)
    if rng.random() < 0.5:
        _table(body, hu)
    _trunk(body, rng, hu)
    liver = _organs(body, rng, hu)
    tumour = _tumours(body, rng, hu, liver)

    blurred = gaussian_filter(hu, 0.5)
    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 0.6)
    blurred += noise * (_NOISE_HU / noise.std())
    voxels = np.clip(np.rint(blurred), -1024, 3071).astype(np.int16)

    labels = np.zeros(shape, dtype=np.uint8)
    labels[liver] = LIVER
    labels[tumour] = TUMOUR
    affine = np.diag([*spacing_mm, 1.0]).astype(np.float64)
    affine[:3, 3] = -(np.asarray(shape) - 1) / 2 * spacing_mm
    affine[2, 3] += round(rng.uniform(-300, 300), 1)
    return Phantom(Volume(voxels, affine), labels)


def write_pair(phantom: Phantom, folder: Path, stem: str) -> tuple[Path, Path]:
    """Write `<stem>_image.nii.gz` and `<stem>_label.nii.gz`.

    Returns:
        The two paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image, label = folder / f"{stem}_image.nii.gz", folder / f"{stem}_label.nii.gz"
    nifti.write(image, phantom.volume.voxels, phantom.volume.affine, description="phantom")
    nifti.write(label, phantom.labels, phantom.volume.affine, description="phantom labels")
    return image, label


@dataclass(frozen=True, slots=True)
class _Body:
    """Body coordinates (mm) of every voxel; fields of shape (I, J, K)."""

    x: Field
    y: Field
    z: Field

    @classmethod
    def pose(cls, rng: np.random.Generator, shape: Shape, spacing_mm: Spacing) -> _Body:
        """Tilt, shift and scale the body at random within the field of view."""
        extent = np.asarray(shape) * spacing_mm
        fit = min(1.0, extent[0] / 376, extent[1] / 276)
        scale = fit * rng.uniform(0.94, 1.06)
        angles = rng.uniform(-1, 1, 3) * (4, 4, 7)
        inverse = Rotation.from_euler("xyz", angles, degrees=True).as_matrix().T / scale
        shift = rng.uniform(-1, 1, 3) * (8, 8, 14) * fit
        steps = [
            ((np.arange(n) - (n - 1) / 2) * step - move).astype(np.float32)
            for n, step, move in zip(shape, spacing_mm, shift, strict=True)
        ]
        i, j, k = np.ix_(*steps)
        x, y, z = (np.float32(a) * i + np.float32(b) * j + np.float32(c) * k for a, b, c in inverse)
        return cls(x, y, z)

    def ellipsoid(self, centre: Point, radii: Point) -> Mask:
        """Voxels inside an ellipsoid along the body's axes."""
        return np.asarray(self.distance(centre, radii) < 1)

    def distance(self, centre: Point, radii: Point) -> Field:
        """Squared distance from a centre in units of the radii."""
        (x, y, z), (a, b, c) = centre, radii
        squared: Field = ((self.x - x) / a) ** 2
        squared += ((self.y - y) / b) ** 2
        squared += ((self.z - z) / c) ** 2
        return squared

    def tube(self, centre: tuple[float, float], radii: tuple[float, float]) -> Mask:
        """Voxels inside an elliptic cylinder along the body."""
        (x, y), (a, b) = centre, radii
        return np.asarray(((self.x - x) / a) ** 2 + ((self.y - y) / b) ** 2 < 1)


def _table(body: _Body, hu: Field) -> None:
    """A curved couch under the back."""
    curve = -132 + (body.x / 60) ** 2
    hu[(np.abs(body.x) < 170) & (body.y < curve) & (body.y > curve - 10)] = -450


def _trunk(body: _Body, rng: np.random.Generator, hu: Field) -> None:
    """Skin, fat, muscle wall, fat of the cavity, spine, ribs and the lung bases."""
    a, b = _BODY_MM
    fat = rng.uniform(12, 24)
    radius = np.sqrt((body.x / a) ** 2 + (body.y / b) ** 2)
    wall = np.sqrt((body.x / (a - fat)) ** 2 + (body.y / (b - fat)) ** 2)
    cavity = np.sqrt((body.x / (a - fat - 14)) ** 2 + ((body.y - 6) / (b - fat - 16)) ** 2)
    hu[radius < 1] = 20
    hu[radius < 0.985] = -100
    hu[wall < 1] = 52
    hu[cavity < 1] = -95
    hu[body.tube((38, -78), (26, 18)) | body.tube((-38, -78), (26, 18))] = 55  # back muscles

    rib = np.mod(body.z + 0.45 * body.y + 1000, 27) < 8
    hu[rib & (wall < 0.985) & (wall > 0.925) & (body.z > -45) & (np.abs(body.x) > 30)] = 330

    for side in (1, -1):
        hu[body.ellipsoid((side * 72, -6, 165), (58, 76, 92))] = -840
    for _ in range(9):  # bowel loops, some with gas
        centre = (rng.uniform(-85, 75), rng.uniform(5, 60), rng.uniform(-170, -75))
        radii = (rng.uniform(14, 26), rng.uniform(12, 22), rng.uniform(14, 26))
        loop = body.ellipsoid(centre, radii)
        hu[loop] = rng.uniform(25, 60)
        if rng.random() < 0.4:
            hu[loop & (body.y > centre[1] + 0.3 * radii[1])] = -900

    hu[body.tube((0, -56), (23, 20))] = 420
    disc = np.mod(body.z + rng.uniform(0, 34) + 1000, 34) < 6
    core = body.tube((0, -56), (20, 17))
    hu[core] = 300
    hu[core & disc] = 95
    hu[body.tube((0, -84), (9, 9))] = 25  # spinal canal
    hu[body.tube((0, -97), (5, 12)) & ~disc] = 380


def _organs(body: _Body, rng: np.random.Generator, hu: Field) -> Mask:
    """Spleen, kidneys, stomach, great vessels and the liver, which is returned."""

    def near(value: float, by: float) -> float:
        return value + rng.uniform(-by, by)

    liver_hu = near(110, 8)
    hu[body.ellipsoid((near(-98, 5), -28, near(38, 8)), (30, 42, near(46, 6)))] = near(122, 6)
    for side in (1, -1):
        centre = (side * near(58, 4), -42.0, near(-62, 8))
        hu[body.ellipsoid(centre, (25, 23, 50))] = near(175, 10)
        hu[body.ellipsoid((centre[0] - side * 8, -38, centre[2]), (10, 10, 24))] = -40
    stomach = (near(-62, 6), near(32, 5), near(36, 6))
    inside = body.ellipsoid(stomach, (40, 36, 44))
    hu[inside] = 45
    inside = body.ellipsoid(stomach, (36, 32, 40))
    hu[inside] = 15
    hu[inside & (body.y > stomach[1] + near(10, 6))] = -960
    hu[body.tube((-11, -24), (11, 11))] = near(160, 10)  # aorta
    hu[body.tube((20, -22), (13, 10))] = near(140, 10)  # vena cava

    right = body.distance((near(70, 4), near(4, 3), near(12, 6)), (near(66, 4), near(66, 4), 78))
    left = body.distance((near(8, 6), near(46, 4), near(42, 5)), (near(70, 7), 30, 33))
    liver = (np.minimum(right, left) < 1) & ~body.ellipsoid((30, 40, -62), (42, 60, 46))
    inner = ((body.x / 134) ** 2 + ((body.y - 6) / 90) ** 2) < 1
    liver &= inner & ~body.tube((20, -22), (15, 12)) & ~body.tube((0, -56), (27, 24))
    liver &= ~body.ellipsoid((58, -42, -62), (28, 26, 53))  # the kidney's bed
    hu[liver] = liver_hu
    hu[liver & body.tube((32, 8), (6, 6)) & (np.abs(body.z - 20) < 30)] = liver_hu + 40
    hu[body.ellipsoid((42, 38, -38), (14, 20, 22)) & ~liver] = 8  # gallbladder
    return np.asarray(liver)


def _tumours(body: _Body, rng: np.random.Generator, hu: Field, liver: Mask) -> Mask:
    """One to four hypodense spots inside the liver."""
    tumour = np.zeros_like(liver)
    inside = np.flatnonzero(liver)
    if inside.size == 0:
        return tumour
    wanted = int(rng.integers(1, 5))
    for attempt in range(60):
        at = inside[rng.integers(inside.size)]
        centre = (float(body.x.flat[at]), float(body.y.flat[at]), float(body.z.flat[at]))
        size = rng.uniform(10, 22) if attempt < 40 else 9.0
        radii = tuple(float(size * stretch) for stretch in rng.uniform(0.85, 1.2, 3))
        spot = body.ellipsoid(centre, (radii[0], radii[1], radii[2]))
        is_free = not (spot & tumour).any() and (spot & liver).sum() >= 0.93 * spot.sum()
        if is_free or (attempt == 59 and not tumour.any()):
            spot &= liver
            tumour |= spot
            hu[spot] = 60 + rng.uniform(-8, 8)
            wanted -= 1
        if wanted == 0:
            break
    return tumour
