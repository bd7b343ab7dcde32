"""Largest component, holes, lesions: against a search voxel by voxel, and on a phantom."""

import itertools
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
from pydantic import ValidationError

from imaging.volume import Volume
from models.postprocess import MAX_LISTED, clean, fill_holes, keep_largest, lesions
from models.predict import segment
from models.recipe import FinetuneRecipe, Postprocess
from models.session import open_session

LIVER, TUMOUR, SPLEEN = 1, 2, 3
NAMES = ("liver", "tumour", "spleen")


def steps(connectivity):
    around = itertools.product((-1, 0, 1), repeat=3)
    return [s for s in around if 0 < sum(map(abs, s)) <= (1 if connectivity == 6 else 3)]


def searched(mask, connectivity):
    """Components as lists of voxels, found breadth first, in C order of their first voxels."""
    seen, found = set(), []
    for start in map(tuple, np.argwhere(mask).tolist()):
        if start in seen:
            continue
        seen.add(start)
        queue, component = deque([start]), []
        while queue:
            at = queue.popleft()
            component.append(at)
            for step in steps(connectivity):
                near = tuple(a + s for a, s in zip(at, step, strict=True))
                inside = all(0 <= n < size for n, size in zip(near, mask.shape, strict=True))
                if inside and mask[near] and near not in seen:
                    seen.add(near)
                    queue.append(near)
        found.append(component)
    return found


def slow_keep_largest(labels, organs, connectivity):
    keep = ~np.isin(labels, [value for o, parts in organs.items() for value in (o, *parts)])
    for organ, parts in organs.items():
        found = searched(np.isin(labels, [organ, *parts]), connectivity)
        own = [c for c in found if any(labels[at] == organ for at in c)]
        for at in max(own, key=len) if own else sum(found, []):  # noqa: RUF017 - small
            keep[at] = True
    return np.where(keep, labels, 0)


def slow_fill_holes(labels, organ, parts, connectivity):
    result = labels.copy()
    for component in searched(~np.isin(labels, [organ, *parts]), 32 - connectivity):
        ends = zip(*component, strict=True)
        if all(
            min(e) > 0 and max(e) < size - 1 for e, size in zip(ends, labels.shape, strict=True)
        ):
            for at in component:
                result[at] = result[at] or organ
    return result


def random_labels(seed):
    """Density, shape and memory order differ, so that components are many, few and ragged."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, 3))
    background = rng.uniform(0.02, 0.9)
    p = [background, *(np.array([0.5, 0.3, 0.2]) * (1 - background))]
    if seed % 5 == 0:  # nearly solid, or no hole would be closed by faces alone
        p = [0.04, 0.7, 0.25, 0.01]
    labels = rng.choice(4, shape, p=p).astype(np.uint8)
    return np.asfortranarray(labels) if seed % 2 else labels


@pytest.mark.parametrize("connectivity", [6, 26])
def test_on_random_masks_everything_equals_the_search_voxel_by_voxel(connectivity):
    changed = filled = 0
    for seed in range(150):
        labels = random_labels(seed)
        before = labels.copy()
        organs = {LIVER: (TUMOUR,), SPLEEN: (TUMOUR,)} if seed % 3 else {LIVER: (TUMOUR,)}

        kept = keep_largest(labels, organs, connectivity)
        whole = fill_holes(labels, LIVER, (TUMOUR,), connectivity)

        np.testing.assert_array_equal(kept, slow_keep_largest(labels, organs, connectivity))
        np.testing.assert_array_equal(
            whole, slow_fill_holes(labels, LIVER, (TUMOUR,), connectivity)
        )
        np.testing.assert_array_equal(labels, before)
        changed += (kept != labels).any()
        filled += (whole != labels).any()
    assert changed > 40 and filled > 3, (changed, filled)


@pytest.mark.parametrize("connectivity", [6, 26])
def test_lesions_of_random_masks_are_those_of_the_search(connectivity):
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = turned * [0.7, 0.8, 5.0]
    affine[:3, 3] = -120.0, 35.5, 900.0
    num_seen = 0
    for seed in range(60):
        labels = random_labels(seed)
        expected = searched(labels == LIVER, connectivity)
        expected.sort(key=len, reverse=True)  # stable: of equal ones the first leads

        found = lesions(labels, LIVER, affine, connectivity)

        assert found.num == len(expected)
        assert len(found.largest) == min(found.num, MAX_LISTED)
        num_seen += found.num
        for one, component in zip(found.largest, expected, strict=False):
            at = np.array(component)
            corners = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
            points = ((at[:, None] + corners).reshape(-1, 3)) @ affine[:3, :3].T
            apart = np.linalg.norm(points[:, None] - points, axis=-1).max()
            centre = at.mean(axis=0) @ affine[:3, :3].T + affine[:3, 3]
            assert one.voxels == len(component)
            assert one.volume_ml == pytest.approx(len(component) * 0.7 * 0.8 * 5.0 / 1000)
            assert one.longest_mm == pytest.approx(apart, abs=1e-6)
            assert one.centroid_mm == pytest.approx(tuple(centre), abs=1e-3)
    assert num_seen > 100


def liver_with_errors():
    """A liver with a tumour and a hole; beside it a blob of liver, and a tumour in nothing."""
    labels = np.zeros((24, 20, 16), np.uint8)
    labels[2:12, 3:13, 2:12] = LIVER
    labels[4:7, 4:7, 4:7] = TUMOUR
    labels[9, 9, 9] = 0  # the hole
    labels[5, 5, 5] = 0  # and one in the tumour
    labels[16:19, 4:7, 4:7] = LIVER
    labels[16:18, 12:14, 4:6] = TUMOUR
    return labels


def test_the_blob_goes_the_hole_closes_and_the_tumour_stays():
    labels = liver_with_errors()
    spec = Postprocess(
        parts={"liver": ("tumour",)}, keep_largest=("liver",), fill_holes=("tumour", "liver")
    )

    cleaned = clean(labels, NAMES, spec)
    off = clean(labels, NAMES, Postprocess())

    assert cleaned.removed_voxels == {"liver": 27, "tumour": 8, "spleen": 0}
    assert cleaned.filled_voxels == {"liver": 1, "tumour": 1, "spleen": 0}
    assert not cleaned.labels[15:].any()
    assert cleaned.labels[9, 9, 9] == LIVER and cleaned.labels[5, 5, 5] == TUMOUR
    assert (cleaned.labels[2:12, 3:13, 2:12] != 0).all()
    # The control: by default all of it stays.
    np.testing.assert_array_equal(off.labels, labels)
    assert off.labels[17, 5, 5] == LIVER and off.labels[9, 9, 9] == 0
    assert not any((off.removed_voxels | off.filled_voxels).values())


def test_a_hole_keeps_another_label_and_an_open_bay_is_no_hole():
    labels = liver_with_errors()
    labels[8:11, 8:11, 8:11] = 0
    labels[9, 9, 9] = SPLEEN
    labels[2:5, 11, 11] = 0  # open to the outside

    filled = fill_holes(labels, LIVER, (TUMOUR,))

    assert filled[9, 9, 9] == SPLEEN
    assert (filled[8:11, 8:11, 8:11] != 0).all()
    assert not filled[2:5, 11, 11].any()


def test_a_liver_that_a_large_false_tumour_outweighs_is_still_the_liver():
    labels = liver_with_errors()
    labels[14:24, :, 1:15] = TUMOUR
    assert (labels == TUMOUR).sum() > ((labels == LIVER) | (labels == TUMOUR))[:13].sum()

    kept = keep_largest(labels, {LIVER: (TUMOUR,)})

    assert not kept[14:].any() and (kept[2:12] == labels[2:12]).all()


def test_an_empty_mask_and_an_absent_label_are_left_alone():
    empty = np.zeros((5, 4, 3), np.uint8)
    spec = Postprocess(
        parts={"liver": ("tumour",)}, keep_largest=("liver", "spleen"), fill_holes=("liver",)
    )
    lone = empty.copy()
    lone[0, 0, 0] = lone[4, 3, 2] = TUMOUR

    assert not clean(empty, NAMES, spec).labels.any()
    assert lesions(empty, TUMOUR, np.eye(4)).num == 0
    assert lesions(empty, TUMOUR, np.eye(4)).largest == ()
    np.testing.assert_array_equal(clean(lone, NAMES, spec).labels, lone)  # no liver to lie in


def test_a_lesion_that_touches_two_organs_is_one_and_stays_with_either():
    labels = np.zeros((20, 8, 8), np.uint8)
    labels[1:8, 1:7, 1:7] = LIVER
    labels[8:11, 2:5, 2:5] = TUMOUR
    labels[11:16, 1:7, 1:7] = SPLEEN
    labels[18, 1:3, 1] = TUMOUR

    of_liver = keep_largest(labels, {LIVER: (TUMOUR,)})
    of_both = keep_largest(labels, {LIVER: (TUMOUR,), SPLEEN: (TUMOUR,)})

    for kept in (of_liver, of_both):
        np.testing.assert_array_equal(kept[:17], labels[:17])
        assert not kept[17:].any()
    found = lesions(labels, TUMOUR, np.diag([2.0, 1.0, 1.0, 1.0]))
    assert [one.voxels for one in found.largest] == [27, 2]
    assert found.largest[0].longest_mm == pytest.approx(np.sqrt(6**2 + 3**2 + 3**2))
    assert found.largest[0].centroid_mm == (18.0, 3.0, 3.0)


def test_voxels_that_share_a_corner_are_one_with_26_and_two_with_6():
    labels = np.zeros((2, 2, 2), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = TUMOUR

    assert lesions(labels, TUMOUR, np.eye(4), 26).num == 1
    assert lesions(labels, TUMOUR, np.eye(4), 6).num == 2


@pytest.mark.parametrize("connectivity", [6, 26])
@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 9), (5, 1, 3), (7, 7, 7), (1, 1, 1)])
def test_as_many_components_as_a_mask_can_hold_are_counted(shape, connectivity):
    labels = np.zeros(shape, np.uint8)
    if connectivity == 26:
        labels[::2, ::2, ::2] = LIVER
    else:
        labels[np.indices(shape).sum(axis=0) % 2 == 0] = LIVER

    assert lesions(labels, LIVER, np.eye(4), connectivity).num == (labels == LIVER).sum()


MEASURE = """
import re, time
from pathlib import Path
import numpy as np
from models.postprocess import clean, lesions
from models.recipe import Postprocess
def kib(name):
    # Not ru_maxrss, which starts with the parent's.
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
labels = np.zeros((512, 512, 160), np.uint8)
j, k = np.ogrid[-1:1:512j, -1:1:160j]
for plane, i in zip(labels, np.linspace(-1, 1, 512)):
    plane[i * i + j * j + k * k < 1] = 1
labels[256, 256, 80] = 0
labels[:8, :8, :8] = labels[-8:, -8:, -8:] = 1
labels[200:240, 200:240, 100:140] = 2
before = kib("VmHWM")
began = time.monotonic()
spec = Postprocess(parts={"a": ("b",)}, keep_largest=("a",), fill_holes=("a",))
cleaned = clean(labels, ("a", "b"), spec)
found = lesions(cleaned.labels, 1, np.eye(4))
seconds = time.monotonic() - began
grown = (kib("VmHWM") - before) * 1024
assert cleaned.removed_voxels["a"] == 1024 and cleaned.filled_voxels["a"] == 1
assert found.num == 1 and abs(found.largest[0].longest_mm - 512) < 3, found
print(grown / labels.size, seconds)
"""


@pytest.mark.nightly
def test_a_large_scan_takes_a_few_bytes_a_voxel():
    """512 x 512 x 160 with a bounding box that is all of it: the worst case of a real size."""
    ran = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    bytes_a_voxel, seconds = map(float, ran.stdout.split())
    assert 3 < bytes_a_voxel < 12, (bytes_a_voxel, seconds)  # float64 or int64 would take more


def test_a_bundle_says_what_its_masks_go_through(make_bundle, thresholds):
    voxels = np.where(liver_with_errors() > 0, 1000, 0).astype(np.int16)
    scan = Volume(voxels, np.diag([1.0, 1.0, 1.0, 1.0]))
    spec = Postprocess(keep_largest=("organ",), fill_holes=("organ",), lesions=("organ",))
    plain = open_session(make_bundle(thresholds()), num_threads=1)
    cleaning = open_session(make_bundle(thresholds(), postprocess=spec), num_threads=1)

    without, cleaned = segment(plain, scan), segment(cleaning, scan)

    np.testing.assert_array_equal(without.labels, voxels > 0)
    assert without.lesions == without.removed_voxels == {} and "postprocess" not in (
        without.timings_s
    )
    assert cleaned.removed_voxels == {"organ": 27 + 8} and cleaned.filled_voxels == {"organ": 2}
    assert cleaned.voxels == {"organ": 1000} == {"organ": int((cleaned.labels == 1).sum())}
    assert cleaned.lesions["organ"].num == 1
    assert cleaned.lesions["organ"].largest[0].volume_ml == pytest.approx(1.0)
    assert cleaned.volumes_ml["organ"] == pytest.approx(1.0)
    assert "postprocess" in cleaned.timings_s


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"lesions": ["cyst"]}, "what labels does not: \\['cyst'\\]"),
        ({"parts": {"liver": ["cyst"]}}, "what labels does not: \\['cyst'\\]"),
        ({"keep_largest": ["liver", "liver"]}, "names a label twice"),
        ({"parts": {"liver": ["tumour"]}, "keep_largest": ["tumour"]}, "stays with its organ"),
        ({"parts": {"liver": ["tumour"], "tumour": ["liver"]}}, "a part has parts"),
        ({"connectivity": 18}, "6 or 26"),
    ],
)
def test_a_recipe_that_asks_for_nonsense_is_refused_with_the_reason(asked, why):
    labels = {"liver": 1, "tumour": 2}

    with pytest.raises(ValidationError, match=why):
        FinetuneRecipe.model_validate({"labels": labels, "postprocess": asked})

    FinetuneRecipe.model_validate({"labels": labels, "postprocess": {"lesions": ["tumour"]}})


def test_regions_that_overlap_make_no_mask_to_clean():
    with pytest.raises(ValidationError, match="postprocess names what labels does not"):
        FinetuneRecipe.model_validate(
            {"regions": {"core": [1, 4]}, "postprocess": {"keep_largest": ["core"]}}
        )
