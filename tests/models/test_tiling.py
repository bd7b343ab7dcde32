import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference

from imaging.volume import Grid
from models.blend import Counter, Slab, blended_slabs
from models.preprocess import Prepared
from models.session import open_session
from models.tiling import Windows, axis_starts, fitted, gaussian_weights, window_starts


@pytest.mark.parametrize("patch", [(16, 16, 8), (5, 9, 32), (1, 2, 3)])
def test_weights_equal_monais_importance_map(patch):
    expected = compute_importance_map(patch, mode="gaussian", sigma_scale=0.125).numpy()

    weights = gaussian_weights(patch)

    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_windows_cover_every_voxel_of_an_axis(size, overlap):
    window = 8

    starts = axis_starts(size, window, overlap)

    seen = np.zeros(max(size, window), dtype=int)
    for start in starts:
        seen[start : start + window] += 1
        assert start + window <= len(seen)
    assert seen.min() >= 1
    assert starts == sorted(set(starts))


def test_windows_come_in_layers_along_k():
    starts = window_starts((20, 10, 30), (8, 8, 8), 0.5)

    assert [k for *_, k in starts] == sorted(k for *_, k in starts)
    assert len(set(starts)) == len(starts) == 4 * 2 * 7


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_overlap_outside_its_range_is_refused(overlap):
    with pytest.raises(ValueError, match="overlap"):
        window_starts((8, 8, 8), (8, 8, 8), overlap)


@pytest.mark.parametrize(
    ("shape", "patch", "overlap"),
    [
        ((16, 16, 8), (16, 16, 8), 0.5),
        ((33, 20, 29), (16, 16, 8), 0.5),
        ((21, 34, 17), (16, 8, 8), 0.25),
        ((40, 16, 9), (16, 16, 8), 0.0),
        ((9, 20, 5), (16, 16, 8), 0.5),
        ((3, 4, 2), (16, 16, 8), 0.5),
        ((30, 11, 40), (8, 16, 16), 0.7),
    ],
)
@pytest.mark.parametrize("background", [0.0, -1.5])
def test_the_blend_of_a_network_equals_monais(
    make_bundle, random_conv_model, shape, patch, overlap, background
):
    session = open_session(
        make_bundle(random_conv_model, labels=("a", "b"), patch_size=patch, overlap=overlap),
        num_threads=1,
    )
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    array[:, : shape[1] // 2] = background  # some windows are air
    expected = sliding_window_inference(
        torch.from_numpy(array)[None, None],
        patch,
        2,
        lambda batch: torch.from_numpy(session.run(batch.numpy())),
        overlap=overlap,
        mode="gaussian",
        padding_mode="constant",
        cval=background,
    )[0].numpy()

    prepared = Prepared(array, Grid(shape, np.eye(4)), background)
    slabs = [
        Slab(slab.first, slab.logits.copy()) for slab in blended_slabs(session, prepared, Counter())
    ]

    assert [slab.first for slab in slabs] == list(
        np.cumsum([0] + [slab.logits.shape[-1] for slab in slabs])[:-1]
    )
    blend = np.concatenate([slab.logits for slab in slabs], axis=-1)
    np.testing.assert_allclose(blend, expected, atol=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("shape", [(108, 97, 139), (40, 96, 300), (191, 400, 64)])
def test_fitted_windows_compute_least_and_stay_within_bounds(shape, overlap):
    patch = (96, 96, 64)

    def computed(sizes):
        return [
            size * len(axis_starts(extent, size, overlap))
            for size, extent in zip(sizes, shape, strict=True)
        ]

    found = fitted(Windows(patch, overlap, 3), shape, (8, 8, 8), 1.5)

    for axis, (size, small, extent) in enumerate(zip(found.size, patch, shape, strict=True)):
        allowed = [one for one in range(8, 1000, 8) if small <= one <= 1.5 * small]
        assert size in allowed
        costs = [one * len(axis_starts(extent, one, overlap)) for one in allowed]
        assert computed(found.size)[axis] == min(costs)
    assert (found.overlap, found.batch) == (overlap, 3)
    assert fitted(Windows(patch, overlap), shape, (8, 8, 8), 1.0).size == patch  # the control
