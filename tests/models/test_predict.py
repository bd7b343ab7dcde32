import dataclasses
import math
import tracemalloc

import numpy as np
import pytest

from imaging.resample import resample
from imaging.volume import Volume
from models.bundle import BundleError
from models.predict import Stopped, embed, segment
from models.preprocess import prepare
from models.session import open_session, opening
from models.tiling import Windows


def phantom(shape, spacing, seed=0):
    """An ellipsoid of 800 HU in air of 0 HU, with noise inside it; rotated a little in space."""
    centre = (np.asarray(shape) - 1) / 2
    axes = np.stack(np.indices(shape), axis=-1) - centre
    inside = ((axes / (np.asarray(shape) * [0.35, 0.25, 0.4])) ** 2).sum(axis=-1) < 1
    noise = np.random.default_rng(seed).integers(-60, 60, shape)
    voxels = np.where(inside, 800 + noise, 0).astype(np.int16)
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(0.2), -math.sin(0.2)], [math.sin(0.2), math.cos(0.2)]]
    affine = turn @ np.diag([*spacing, 1.0])
    affine[:3, 3] = -20.0, 35.5, 110.0
    return Volume(voxels, affine), inside


@pytest.fixture
def segmenter(make_bundle, thresholds):
    return open_session(make_bundle(thresholds()), num_threads=1)


@pytest.fixture
def encoder(make_bundle, random_encoder):
    return open_session(make_bundle(random_encoder), num_threads=1)


@dataclasses.dataclass(eq=False)
class Counting:
    """A real session that remembers how many windows went through it."""

    session: object
    num_windows: int = 0

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, batch, **options):
        self.num_windows += len(batch)
        return self.session.run(batch, **options)


@pytest.mark.parametrize("shape", [(32, 32, 24), (37, 41, 23), (9, 40, 5), (1, 1, 1)])
def test_at_the_networks_spacing_the_mask_is_exact(segmenter, shape):
    volume, inside = phantom(shape, (1.0, 1.0, 1.0))

    result = segment(segmenter, volume)

    assert result.labels.dtype == np.uint8
    np.testing.assert_array_equal(result.labels, inside)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((45, 37, 12), (0.7, 0.8, 5.0)),
        ((30, 30, 60), (1.5, 1.2, 0.5)),
        ((33, 20, 31), (0.9, 2.5, 1.0)),
        ((20, 20, 3), (1.0, 1.0, 10.0)),
    ],
)
def test_on_another_spacing_the_mask_equals_the_dense_computation(segmenter, shape, spacing):
    volume, _ = phantom(shape, spacing)
    prepared = prepare(volume, segmenter.manifest.preprocessing)
    logits = [
        resample(sign * (prepared.array - 0.5), prepared.grid, volume.grid, order=1)
        for sign in (-1, 1)
    ]
    clear = np.abs(logits[1]) > 1e-4
    assert clear.mean() > 0.99

    result = segment(segmenter, volume)

    assert result.labels.shape == shape
    np.testing.assert_array_equal(result.labels[clear], (logits[1] > logits[0])[clear])
    assert 0 < result.voxels["organ"] < np.prod(shape)


def test_a_border_across_anisotropic_voxels_lies_where_the_ramp_crosses_it(segmenter):
    shape, spacing = (50, 43, 17), (0.8, 0.9, 3.0)
    i, j, k = np.indices(shape)
    place = i * 0.8 + j * 0.9 + k * 3.0
    ramp = place / place.max() * 1000
    volume = Volume(ramp.astype(np.float32), np.diag([*spacing, 1.0]))

    labels = segment(segmenter, volume).labels

    inner = (slice(2, -2), slice(2, -2), slice(1, -1))  # beyond the last centres there is no ramp
    clear = np.abs(ramp - 500) > 0.1
    np.testing.assert_array_equal(labels[inner][clear[inner]], (ramp > 500)[inner][clear[inner]])


def test_volumes_are_counted_in_millilitres(segmenter):
    volume, _ = phantom((30, 30, 20), (0.9, 0.8, 2.0))

    result = segment(segmenter, volume)

    count = int((result.labels == 1).sum())
    assert result.voxels == {"organ": count}
    assert result.volumes_ml["organ"] == pytest.approx(count * 0.9 * 0.8 * 2.0 / 1000)
    assert set(result.timings_s) == {"preprocess", "infer", "resample", "total"}


def test_windows_of_air_are_run_once_and_change_nothing(make_bundle, random_conv_model):
    session = open_session(make_bundle(random_conv_model, labels=("a", "b")), num_threads=1)
    voxels = np.zeros((64, 64, 32), np.int16)
    voxels[20:30, 20:30, 10:20] = np.random.default_rng(0).integers(0, 1000, (10, 10, 10))
    in_air = Volume(voxels, np.eye(4))
    full = Volume(voxels + np.int16(1), np.eye(4))  # no voxel is exactly air
    counting, counting_full = Counting(session), Counting(session)

    result, control = segment(counting, in_air), segment(counting_full, full)

    assert counting.num_windows < result.num_windows / 3
    assert counting_full.num_windows == control.num_windows == result.num_windows
    assert (result.labels == control.labels).mean() > 0.999


@pytest.mark.parametrize("num_blocks", [2, 5, 1000])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 2.6, 1.5), (2.0, 0.4, 0.8)])
def test_columns_in_blocks_give_the_same_labels(
    make_bundle, random_conv_model, num_blocks, spacing
):
    session = open_session(make_bundle(random_conv_model, labels=("a", "b")), num_threads=1)
    volume, _ = phantom((20, 44, 26), spacing)

    whole = segment(session, volume)
    parts = segment(session, volume, num_blocks=num_blocks)

    assert parts.num_windows > whole.num_windows
    assert len(np.unique(whole.labels)) > 1
    assert (parts.labels == whole.labels).mean() > 0.9999  # but for rounding
    # The control: a block computed without its neighbours' windows differs by more.
    alone = segment(session, Volume(volume.voxels[:, :22], volume.affine)).labels
    assert (alone == whole.labels[:, :22]).mean() < 0.9999


def test_windows_of_any_size_and_overlap_may_be_asked_for(segmenter):
    volume, inside = phantom((40, 33, 25), (1.0, 1.0, 1.0))
    sizes = [Windows((16, 16, 8), 0.25, 4), Windows((40, 48, 8), 0.0), Windows((8, 8, 8), 0.5, 3)]

    results = [segment(segmenter, volume, windows=windows) for windows in sizes]

    assert len({result.num_windows for result in results}) == 3
    for result in results:
        np.testing.assert_array_equal(result.labels, inside)


def test_progress_ends_at_all_windows(segmenter):
    volume, _ = phantom((40, 40, 24), (1.0, 1.0, 1.0))
    seen = []

    result = segment(segmenter, volume, progress=lambda done, total: seen.append((done, total)))

    assert seen == sorted(seen)
    assert seen[-1] == (result.num_windows, result.num_windows)
    assert {total for _, total in seen} == {result.num_windows}


@pytest.mark.parametrize("function", [segment, embed])
def test_a_stop_ends_the_work_before_the_next_batch(function, segmenter, encoder, monkeypatch):
    monkeypatch.setattr("models.blend.BATCH_VOXELS", 1)  # one window a batch
    counting = Counting(segmenter if function is segment else encoder)
    volume, _ = phantom((40, 40, 24), (1.0, 1.0, 1.0))

    with pytest.raises(Stopped):
        function(counting, volume, should_stop=lambda: counting.num_windows >= 3)

    assert counting.num_windows == 3
    function(counting, volume, should_stop=lambda: False)
    assert counting.num_windows > 6


def test_memory_does_not_grow_with_classes_times_resolution(make_bundle, thresholds):
    num_classes, shape = 20, (48, 48, 256)
    labels = tuple(f"organ{n}" for n in range(1, num_classes))
    few = open_session(make_bundle(thresholds(2)), num_threads=1)
    many = open_session(make_bundle(thresholds(num_classes), labels=labels), num_threads=1)
    short, _ = phantom((48, 48, 64), (1.0, 1.0, 1.0))
    long, _ = phantom(shape, (1.0, 1.0, 1.0))
    dense_bytes = 4 * num_classes * math.prod(shape)

    peak_few, peak_many = peak_bytes(few, long), peak_bytes(many, long)
    peak_short = peak_bytes(many, short)

    assert peak_many - peak_few < dense_bytes / 4
    growth = peak_many - peak_short  # with length, the classes must not count
    assert growth < 4 * 4 * math.prod(shape) < dense_bytes / 4
    # The control: holding the logits of the whole volume is seen by the same measure.
    tracemalloc.start()
    dense = np.ones((num_classes, *shape), np.float32)
    assert tracemalloc.get_traced_memory()[1] >= dense.nbytes == dense_bytes
    tracemalloc.stop()


def peak_bytes(session, volume):
    tracemalloc.start()
    try:
        segment(session, volume)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_embedding_has_unit_length_and_comes_out_the_same_again(encoder):
    volume, _ = phantom((40, 33, 25), (1.0, 1.2, 1.0))

    first, second = embed(encoder, volume), embed(encoder, volume)

    assert first.vector.shape == (5,)
    assert first.vector.dtype == np.float32
    assert np.linalg.norm(first.vector) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(first.vector, second.vector)


@pytest.mark.parametrize(("most", "gives_back"), [(None, False), (0, True)])
def test_a_small_scan_leaves_its_working_memory_for_the_next_one(
    encoder, monkeypatch, most, gives_back
):
    network, shrank = encoder._network, []
    real = network._inference

    class Watched:
        def run(self, names, feed, options):
            try:
                options.get_run_config_entry("memory.enable_memory_arena_shrinkage")
                shrank.append(True)
            except RuntimeError:  # there is no such entry
                shrank.append(False)
            return real.run(names, feed, options)

    monkeypatch.setattr(network, "_inference", Watched())
    if most is not None:
        monkeypatch.setattr(opening, "KEPT_VOXELS", most)

    embed(encoder, phantom((40, 33, 25), (1.0, 1.2, 1.0))[0])

    assert shrank[-1] is gives_back


def test_an_embedding_is_the_mean_of_windows_weighted_by_their_share_of_body(encoder):
    voxels = np.zeros((32, 16, 8), np.int16)
    voxels[:16] = 900
    voxels[16:24] = np.random.default_rng(0).integers(100, 1000, (8, 16, 8))
    image = (voxels / 1000).astype(np.float32)
    left, right = (encoder.run(part[None, None])[0] for part in (image[:16], image[16:]))
    expected = left + 0.5 * right

    result = embed(encoder, Volume(voxels, np.eye(4)))

    assert result.num_windows == 2
    np.testing.assert_allclose(result.vector, expected / np.linalg.norm(expected), atol=1e-6)


def test_windows_without_body_have_no_part_in_an_embedding(encoder):
    body = np.random.default_rng(0).integers(100, 1000, (16, 16, 8)).astype(np.int16)
    noise = np.random.default_rng(1).integers(-20, 20, (64, 16, 8)).astype(np.int16)
    beside_air = np.concatenate([body, noise])

    alone = embed(encoder, Volume(body, np.eye(4)))
    in_air = embed(encoder, Volume(beside_air, np.eye(4)))

    assert in_air.num_windows == alone.num_windows == 1
    np.testing.assert_allclose(in_air.vector, alone.vector, atol=1e-6)


def test_a_scan_of_air_still_gets_a_vector(encoder):
    result = embed(encoder, Volume(np.zeros((20, 20, 8), np.int16), np.eye(4)))

    assert np.isfinite(result.vector).all()


def test_a_model_of_the_wrong_kind_is_refused(segmenter, encoder):
    volume, _ = phantom((8, 8, 8), (1.0, 1.0, 1.0))

    for function, session in ((segment, encoder), (embed, segmenter)):
        with pytest.raises(BundleError) as caught:
            function(session, volume)
        assert caught.value.code == "wrong_model_kind"


def test_fewer_outputs_than_labels_are_refused(make_bundle, thresholds):
    session = open_session(make_bundle(thresholds(2), labels=("a", "b")), num_threads=1)
    volume, _ = phantom((8, 8, 8), (1.0, 1.0, 1.0))

    with pytest.raises(BundleError, match="bundle_inconsistent"):
        segment(session, volume)
