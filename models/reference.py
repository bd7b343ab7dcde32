"""The training scans' embeddings in a bundle, and what a scan's distance from them says.

`reference.npy` is one float32 array (N, E), a training scan a row, each of unit length; it is read
without pickle, after its digest.

N scans, E embedding.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from models import bundle, ood
from models.bundle import BundleError, Manifest
from models.ood import OutOfDistribution

Float32Array = NDArray[np.float32]
STORED = np.dtype("<f4")
UNIT_TOLERANCE = 1e-3


def write(
    path: Path, vectors: Sequence[Float32Array], space: Literal["embedding", "features"]
) -> bundle.Reference:
    """Keep the embeddings of the training scans, and find the threshold.

    Args:
        path: The file to write; not written where there are too few scans for a threshold.
        vectors: One of unit length for each scan, (E,).
        space: Where they come from.

    Returns:
        For the manifest.

    Raises:
        ValueError: A vector that is zero or not finite.
    """
    num_scans = len(vectors)
    dims = len(vectors[0]) if vectors else 0
    if num_scans < ood.MIN_SCANS:
        return bundle.Reference(
            num_scans=num_scans,
            dims=dims,
            num_neighbours=0,
            threshold=None,
            quantile=ood.QUANTILE,
            space=space,
        )
    array = np.stack(vectors).astype(STORED)  # (N, E)
    found = ood.reference_of(array)
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    return bundle.Reference(
        num_scans=num_scans,
        dims=dims,
        method=found.method,
        num_neighbours=found.num_neighbours,
        threshold=found.threshold,
        quantile=ood.QUANTILE,
        space=space,
    )


def load(folder: Path, manifest: Manifest) -> ood.Reference | None:
    """The reference of a bundle; None where it has none, or too few scans for one.

    Raises:
        BundleError: `bundle_corrupt`, or `bundle_invalid` for a file that is not what the manifest
            says.
    """
    spec = manifest.reference
    if spec is None or spec.threshold is None:
        return None
    data = (folder / bundle.REFERENCE).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.files.get(bundle.REFERENCE):
        raise BundleError("bundle_corrupt", f"{bundle.REFERENCE} is not what was saved")
    try:
        array = _array(data, (spec.num_scans, spec.dims))
        return ood.restored(
            array,
            num_neighbours=spec.num_neighbours,
            threshold=spec.threshold,
            method=spec.method,
        )
    except ValueError as error:
        raise BundleError("bundle_invalid", f"{bundle.REFERENCE}: {error}") from error


def _array(data: bytes, expected: tuple[int, int]) -> Float32Array:
    """The unit vectors (N, E) in a `.npy` file, whose header is looked at first.

    Raises:
        ValueError: It is something else.
    """
    stream = io.BytesIO(data)
    if npy.read_magic(stream) != (1, 0):
        raise ValueError("it is of another version of the format")
    shape, is_fortran, dtype = npy.read_array_header_1_0(stream)
    if dtype != STORED or is_fortran:
        raise ValueError(f"it holds {dtype}, not rows of float32")
    if shape != expected:
        raise ValueError(f"it is {shape}, not {expected}")
    array: Float32Array = np.frombuffer(data, STORED, offset=stream.tell()).reshape(shape)
    if not np.allclose(np.linalg.norm(array, axis=1), 1.0, atol=UNIT_TOLERANCE):
        raise ValueError("its rows are not of unit length")
    return array


def judged(
    vector: Float32Array | None, manifest: Manifest, reference: ood.Reference | None
) -> OutOfDistribution:
    """How far a scan lies from those of training.

    Args:
        vector: Its embedding, (E,); None where the network saw nothing of it.
        manifest: Of the model that it is from.
        reference: As `load` gives it.

    Raises:
        BundleError: `bundle_inconsistent`, the reference is of another size.
    """
    if manifest.cascade is not None:
        return ood.unknown("cascade")
    if manifest.reference is None:
        return ood.unknown("no_reference")
    if reference is None:
        return ood.unknown("too_few_scans", manifest.reference.num_scans)
    if vector is None:
        return ood.unknown("nothing_seen", manifest.reference.num_scans)
    try:
        return ood.score(vector, reference)
    except ValueError as error:
        raise BundleError("bundle_inconsistent", f"{bundle.REFERENCE}: {error}") from error
