"""Clean-up of a mask and a list of its lesions: connected components by cc3d.

Masks are uint8 (I, J, K) in RAS+, 0 is background. Two voxels are neighbours across a face (6), or
across a face, an edge or a corner (26); what lies between components has the other of the two, so
that no surface can be crossed. An organ is the union of its own label and those of its parts: a
tumour in the liver is liver.

Work is done in the bounding box of what is looked at, on labels of 1 byte and components of 2 or 4.

I J K voxels, N components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray

from models.box import around
from models.recipe import Connectivity, Postprocess

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Components = NDArray[np.unsignedinteger]
Bounds = tuple[slice, slice, slice]

MAX_LISTED = 100
"""Lesions that are listed one by one, the largest first; all are counted."""
DISTANCES_AT_ONCE = 256
"""Rows of the matrix of distances that are held at a time."""
_OTHER: dict[Connectivity, Connectivity] = {6: 26, 26: 6}


@dataclass(frozen=True, slots=True)
class Lesion:
    """One component of a label."""

    voxels: int
    volume_ml: float
    longest_mm: float
    """Greatest distance between two points of its voxels, which are boxes and not points."""
    centroid_mm: tuple[float, float, float]
    """Mean of its voxels' centres in the world of the affine, RAS+."""


@dataclass(frozen=True, slots=True)
class Lesions:
    """The components of a label."""

    num: int
    largest: tuple[Lesion, ...]
    """At most `MAX_LISTED`, by falling size; of equal ones the first in the mask leads."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A mask after its clean-up, and what that did."""

    labels: Labels
    removed_voxels: dict[str, int]
    """Of each label: became background."""
    filled_voxels: dict[str, int]
    """Of each label: were background."""


def clean(labels: Labels, names: Sequence[str], spec: Postprocess) -> Cleaned:
    """Keep the largest component of organs, then fill holes, as a bundle asks for.

    Args:
        labels: (I, J, K); stays as it is.
        names: Of the values 1 to n.
        spec: What to do; it names no other labels.
    """
    values = {name: value for value, name in enumerate(names, start=1)}
    parts = {name: tuple(values[part] for part in spec.parts.get(name, ())) for name in names}
    organs = {values[name]: parts[name] for name in spec.keep_largest}
    kept = keep_largest(labels, organs, spec.connectivity) if organs else labels
    filled = kept
    for name in spec.fill_holes:
        filled = fill_holes(filled, values[name], parts[name], spec.connectivity)
    removed = {name: _count(labels, v) - _count(kept, v) for name, v in values.items()}
    added = {name: _count(filled, v) - _count(kept, v) for name, v in values.items()}
    return Cleaned(filled, removed, added)


def keep_largest(
    labels: Labels, organs: Mapping[int, Sequence[int]], connectivity: Connectivity = 26
) -> Labels:
    """Of each organ nothing but its largest component, parts counted in; the rest is background.

    A component without a voxel of the organ's own label (a lone false tumour) is never the largest.
    A part stays where it lies in what is kept of any organ that it is a part of. An organ without
    any voxel loses nothing: its parts stay as they are.

    Args:
        labels: (I, J, K); stays as it is.
        organs: Value of each organ, and the values of its parts.
        connectivity: 6 or 26.
    """
    result = labels.copy()
    for value in {value for organ, parts in organs.items() for value in (organ, *parts)}:
        result[labels == value] = 0
    for organ, parts in organs.items():
        union = _union(labels, (organ, *parts))
        box = _bounds(union)
        if box is None:
            continue
        inside = np.ascontiguousarray(union[box])
        del union
        own = labels[box] == organ
        if own.any():
            components = _components(inside, connectivity)
            inside = components == _largest(components, own)
        np.copyto(result[box], labels[box], where=inside)
    return result


def fill_holes(
    labels: Labels, organ: int, parts: Sequence[int] = (), connectivity: Connectivity = 26
) -> Labels:
    """Give background that an organ encloses the organ's label.

    Equals `scipy.ndimage.binary_fill_holes` on the organ with its parts (6-connected holes for
    connectivity 26), but for voxels with another label, which keep theirs.

    Args:
        labels: (I, J, K); stays as it is.
        organ: Its value.
        parts: Values that count as the organ, and enclose as it does.
        connectivity: Of the organ; holes have the other one.
    """
    result = labels.copy()
    box = _bounds(_union(labels, (organ, *parts)))
    if box is None:
        return result
    around = np.pad(~_union(labels[box], (organ, *parts)), 1, constant_values=True)
    components = _components(around, _OTHER[connectivity])
    del around
    outside = components[0, 0, 0]  # the padding is one component, joined to all that is open
    inner = components[1:-1, 1:-1, 1:-1]
    view = result[box]
    view[(inner != 0) & (inner != outside) & (view == 0)] = organ
    return result


def lesions(
    labels: Labels, value: int, affine: NDArray[np.float64], connectivity: Connectivity = 26
) -> Lesions:
    """Number, volume, longest extent and centroid of a label's components.

    Args:
        labels: (I, J, K).
        value: Of the label.
        affine: (4, 4) voxel to world in mm.
        connectivity: 6 or 26.
    """
    found = labels == value
    box = _bounds(found)
    if box is None:
        return Lesions(0, ())
    components = _components(np.ascontiguousarray(found[box]), connectivity)
    del found
    facts = cc3d.statistics(components)
    counts = facts["voxel_counts"]  # (N + 1,), background first
    order = np.argsort(-counts[1:].astype(np.int64), kind="stable") + 1
    linear = affine[:3, :3]
    voxel_ml = abs(float(np.linalg.det(linear))) / 1000
    corner = np.array([side.start for side in box])
    listed = []
    for number in order[:MAX_LISTED]:
        place = facts["bounding_boxes"][number]
        x, y, z = linear @ (facts["centroids"][number] + corner) + affine[:3, 3]
        listed.append(
            Lesion(
                voxels=int(counts[number]),
                volume_ml=int(counts[number]) * voxel_ml,
                longest_mm=_diameter_mm(components[place] == number, linear),
                centroid_mm=(float(x), float(y), float(z)),
            )
        )
    return Lesions(len(counts) - 1, tuple(listed))


def _union(labels: Labels, values: Sequence[int]) -> Mask:
    found: Mask = labels == values[0]
    for value in values[1:]:
        found |= labels == value
    return found


def _bounds(mask: Mask) -> Bounds | None:
    box = around(mask)
    return None if box is None else box.slices


def _components(mask: Mask, connectivity: Connectivity) -> Components:
    """0 where false, else the number of the component, in C order of their first voxels.

    As uint8, since cc3d 4.1.1 takes booleans for a case of its own, in which it counts on too few
    components and gives up on small or thin masks of odd extents ("maximum length exception").
    """
    return cc3d.connected_components(mask.view(np.uint8), connectivity=connectivity)


def _largest(components: Components, own: Mask) -> int:
    """The number of the largest component with a voxel of `own`; of equal ones the first."""
    sizes = cc3d.statistics(components)["voxel_counts"].astype(np.int64)
    has_own = np.zeros(len(sizes), dtype=np.bool_)
    for numbers, wanted in zip(components, own, strict=True):  # by planes: an index is 8 bytes
        has_own[numbers[wanted]] = True
    return int(np.argmax(np.where(has_own, sizes, 0)))


def _diameter_mm(mask: Mask, linear: NDArray[np.float64]) -> float:
    """Greatest distance between corners of true voxels.

    A corner that is neither the first nor the last along K lies between two others, so those two
    of each column suffice; of them, the corners of the convex hull.
    """
    from scipy.spatial import ConvexHull  # here: 0.3 s, for models with lesions alone
    from scipy.spatial.distance import cdist

    (num_i, num_j), num_k = mask.shape[:2], mask.shape[2]
    column = mask.any(axis=2)
    first = np.where(column, mask.argmax(axis=2), num_k + 1)
    last = np.where(column, num_k - mask[:, :, ::-1].argmax(axis=2), -1)
    lowest = np.full((num_i + 1, num_j + 1), num_k + 1)
    highest = np.full((num_i + 1, num_j + 1), -1)
    for i in (0, 1):
        for j in (0, 1):
            at = (slice(i, i + num_i), slice(j, j + num_j))
            lowest[at] = np.minimum(lowest[at], first)
            highest[at] = np.maximum(highest[at], last)
    used = np.argwhere(highest >= 0)
    ends = (lowest[highest >= 0], highest[highest >= 0])
    points = np.concatenate([np.column_stack([used, end]) for end in ends]) @ linear.T
    hull = points[ConvexHull(points).vertices]
    starts = range(0, len(hull), DISTANCES_AT_ONCE)
    return max(float(cdist(hull[s : s + DISTANCES_AT_ONCE], hull).max()) for s in starts)


def _count(labels: Labels, value: int) -> int:
    return int(np.count_nonzero(labels == value))
