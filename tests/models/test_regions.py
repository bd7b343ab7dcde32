"""Embeddings of regions, held against a slow definition."""

import numpy as np
import pytest
from onnx import helper

from imaging.resample import resample, resampled_grid
from imaging.volume import Volume
from models import bundle, preflight
from models.bundle import BundleError
from models.predict import embed
from models.preprocess import prepare
from models.regions import MIN_CELLS, embed_regions
from models.session import open_session
from models.tiling import pad, window_starts

E_ = 5
PATCH = (16, 16, 8)


@pytest.fixture
def encoder(make_bundle, mapped_encoder):
    return lambda **options: open_session(make_bundle(mapped_encoder, **options), num_threads=1)


def scan(shape=(27, 22, 13), spacing=(1.0, 1.0, 1.0)):
    random = np.random.default_rng(1)
    voxels = random.integers(0, 1000, shape).astype(np.int16)
    voxels[16:] = 0  # air: no window there counts in the whole scan's embedding
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = 5.0, -7.0, 11.0
    return Volume(voxels, affine)


def labels_on(volume):
    labels = np.zeros(volume.shape, np.uint8)
    labels[2:14, 3:17, 1:12] = 1
    labels[5:8, 6:9, 3:6] = 2
    labels[18:27, 10:20, 2:10] = 3  # in air
    return labels


VALUES = {"liver": 1, "nodule": 2, "bag": 3, "spleen": 4}


def slow(session, volume, mask):
    """Every cell of every window by itself."""
    spec = session.manifest.preprocessing
    prepared = prepare(volume, spec)
    share = resample(mask, volume.grid, resampled_grid(volume.grid, spec.spacing_mm), order=1)
    image, share = pad(prepared.array, PATCH, prepared.background), pad(share, PATCH, 0.0)
    total = np.zeros(E_)
    for i, j, k in window_starts(image.shape, PATCH, 0.0):
        part = image[i : i + 16, j : j + 16, k : k + 8]
        _, features = session.run_with_map(part[None, None])
        for a in range(2):
            for b in range(2):
                cell = share[i + 8 * a : i + 8 * a + 8, j + 8 * b : j + 8 * b + 8, k : k + 8]
                total += cell.mean() * features[0, :, a, b, 0]
    return total / np.linalg.norm(total)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 1.3, 1.0)])
def test_a_region_s_vector_is_masked_average_pooling(encoder, spacing):
    session, volume = encoder(), scan(spacing=spacing)
    labels = labels_on(volume)

    _, found = embed_regions(session, volume, labels, VALUES)

    by_name = {one.region: one for one in found}
    assert list(by_name) == list(VALUES)
    for name in ("liver", "bag"):
        vector = by_name[name].vector
        np.testing.assert_allclose(vector, slow(session, volume, labels == VALUES[name]), atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)
    other = slow(session, volume, labels == VALUES["nodule"])  # the control
    assert np.abs(by_name["liver"].vector - other).max() > 1e-3


def test_a_region_without_enough_is_told_with_the_reason(encoder):
    session, volume = encoder(), scan()

    _, found = embed_regions(session, volume, labels_on(volume), VALUES)

    told = {one.region: (one.vector is None, one.reason, one.num_voxels) for one in found}
    assert told["nodule"] == (True, "too_small", 27)
    assert told["spleen"] == (True, "absent", 0)
    assert told["liver"][:2] == (False, None)
    cells = {one.region: one.num_cells for one in found}
    assert cells["nodule"] == pytest.approx(27 / 512, abs=1e-3)
    assert cells["nodule"] < MIN_CELLS < cells["liver"]


def test_the_whole_scan_s_embedding_is_as_without_regions(encoder):
    session, volume = encoder(), scan()

    whole, _ = embed_regions(session, volume, labels_on(volume), VALUES)

    alone = embed(session, volume)
    np.testing.assert_allclose(whole.vector, alone.vector, atol=1e-6)
    assert whole.num_windows == alone.num_windows  # those in air alone count nothing


def test_a_region_of_everything_is_the_mean_of_every_cell(encoder):
    session = encoder()
    volume = Volume(np.full((32, 16, 16), 500, np.int16), np.eye(4))
    random = np.random.default_rng(3)
    volume.voxels[:] = random.integers(100, 1000, volume.shape)

    whole, (all_of_it,) = embed_regions(
        session, volume, np.ones(volume.shape, np.uint8), {"all": 1}
    )

    assert all_of_it.num_cells == 4 * 2 * 2
    np.testing.assert_allclose(all_of_it.vector, whole.vector, atol=1e-4)  # shares are 1 here


def test_a_plan_s_batch_changes_nothing_and_regions_take_memory(encoder):
    session, volume = encoder(), scan()
    labels = labels_on(volume)
    without = preflight.plan_embedding(session, volume)
    free = preflight.plan_embedding(session, volume, num_regions=len(VALUES))
    tight = preflight.plan_embedding(
        session, volume, num_regions=len(VALUES), available_bytes=free.predicted_bytes - 1
    )

    _, at_once = embed_regions(session, volume, labels, VALUES, plan=free)
    _, one_by_one = embed_regions(session, volume, labels, VALUES, plan=tight)

    assert free.predicted_bytes > without.predicted_bytes
    assert (free.windows.batch > 1, tight.windows.batch) == (True, 1)
    np.testing.assert_allclose(at_once[0].vector, one_by_one[0].vector, atol=1e-6)


def test_an_encoder_without_a_feature_map_refuses_regions_and_embeds_on(
    make_bundle, random_encoder
):
    session = open_session(make_bundle(random_encoder), num_threads=1)
    volume = scan()

    with pytest.raises(BundleError) as caught:
        embed_regions(session, volume, labels_on(volume), VALUES)

    assert caught.value.code == "no_feature_map"
    assert embed(session, volume).vector.shape == (5,)


def test_a_map_of_other_cells_is_refused(make_bundle, mapped_encoder):
    model = mapped_encoder
    pool = next(node for node in model.graph.node if node.op_type == "AveragePool")
    del pool.attribute[:]
    pool.attribute.extend(
        [helper.make_attribute("kernel_shape", [4] * 3), helper.make_attribute("strides", [4] * 3)]
    )
    session = open_session(make_bundle(model), num_threads=1)
    volume = scan()

    with pytest.raises(BundleError, match="feature map is"):
        embed_regions(session, volume, labels_on(volume), VALUES)


def test_the_cell_is_the_networks_stride():
    from models.networks import unet3d

    assert bundle.FEATURE_STRIDE == unet3d.STRIDE
