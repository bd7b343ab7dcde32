"""A scan is held against those of training with the runs that segment it, and told apart."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from imaging.volume import Volume
from models import bundle, compose, ood, reference
from models.bundle import BundleError
from models.cascade import segment_case
from models.predict import FOREGROUND_ABOVE, embed
from models.preprocess import prepare
from models.session import open_session
from models.tiling import pad, window_starts
from models.windows import serving_windows


def scan(seed, shape=(20, 24, 12), kind="like"):
    """A ball of 700 HU in a body of 300 HU in air of 0; or what is not like it."""
    random = np.random.default_rng(seed)
    place = np.stack(np.indices(shape), axis=-1)
    middle = np.array(shape) / 2 + random.uniform(-1, 1, 3)
    distance = np.linalg.norm((place - middle) / (np.array(shape) / 2), axis=-1)
    voxels = np.select([distance < 0.4, distance < 0.9], [700, 300], 0)
    voxels = voxels + random.integers(0, 30, shape)
    if kind == "inverted":
        voxels = 1000 - voxels
    elif kind == "noise":
        voxels = random.integers(0, 1000, shape)
    elif kind == "other region":  # stripes: as bright, and shaped otherwise
        voxels = np.where(place[..., 0] % 2 == 0, 900, 50) + random.integers(0, 30, shape)
    return Volume(np.ascontiguousarray(voxels, dtype=np.int16), np.eye(4))


@pytest.fixture
def segmenter(make_bundle, thresholds, tmp_path):
    """A segmenter of which the bottleneck is three channels of a random convolution, pooled."""

    def make(vectors=(), **options):
        model = thresholds()
        random = np.random.default_rng(3)
        weight = random.normal(size=(6, 1, 3, 3, 3)).astype(np.float32)
        graph = model.graph
        graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        graph.node.extend(
            [
                helper.make_node("Conv", ["image", "w"], ["convolved"], pads=[1] * 6),
                helper.make_node("Relu", ["convolved"], ["seen"]),
                helper.make_node("GlobalAveragePool", ["seen"], ["pooled"]),
                helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
            ]
        )
        graph.output.append(
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 6])
        )
        plain = make_bundle(model, **options)
        manifest = bundle.load(plain)
        files = {bundle.MODEL: plain / bundle.MODEL}
        known = None
        if len(vectors):
            path = tmp_path / "reference.npy"
            known = reference.write(path, vectors, "features")
            if known.has_file:
                files[bundle.REFERENCE] = path
        made = manifest.model_copy(update={"reference": known})
        folder = tmp_path / f"with{len(list(tmp_path.iterdir()))}"
        bundle.save(folder, made, files, "# Card\n")
        return folder

    return make


@pytest.fixture
def known(segmenter):
    """The same segmenter with a reference of thirty scans."""
    session = open_session(segmenter(), num_threads=1)
    return segmenter([segment_case(session, scan(n)).features for n in range(30)])


def test_scans_like_those_of_training_are_in_and_others_are_out(known):
    session = open_session(known, num_threads=1)

    inside = [segment_case(session, scan(100 + n)).ood for n in range(20)]

    assert np.mean([one.is_out for one in inside]) <= 0.25
    assert all(one.reason is None and one.n_reference == 30 for one in inside)
    for kind in ("inverted", "noise", "other region"):
        found = segment_case(session, scan(7, kind=kind)).ood
        assert found.is_out and found.score > 2 * found.threshold, kind


def test_a_reference_of_noise_calls_the_scans_out_instead(segmenter):
    """The control: it is the reference that decides, and no property of the scan."""
    session = open_session(segmenter(), num_threads=1)
    of_noise = [segment_case(session, scan(n, kind="noise")).features for n in range(30)]

    session = open_session(segmenter(of_noise), num_threads=1)

    assert segment_case(session, scan(1)).ood.is_out
    inside = [segment_case(session, scan(50 + n, kind="noise")).ood.is_out for n in range(10)]
    assert np.mean(inside) <= 0.4


def test_features_are_the_mean_over_windows_by_their_share_of_body(segmenter):
    session = open_session(segmenter(), num_threads=1)
    volume = scan(5, shape=(30, 26, 20))
    prepared = prepare(volume, session.manifest.preprocessing)
    windows = serving_windows(session.manifest, prepared.grid.shape)
    padded = pad(prepared.array, windows.size, prepared.background)
    total, plain = np.zeros(6), np.zeros(6)
    for start in window_starts(padded.shape, windows.size, windows.overlap):
        place = tuple(slice(a, a + n) for a, n in zip(start, windows.size, strict=True))
        one = np.ascontiguousarray(padded[place][None, None])
        _, features = session.run_with_features(one)
        total += (one > prepared.background + FOREGROUND_ABOVE).mean() * features[0]
        plain += features[0]

    found = segment_case(session, volume).features

    np.testing.assert_allclose(found, total / np.linalg.norm(total), atol=1e-6)
    # The control: without the weights it is another vector.
    assert np.abs(found - plain / np.linalg.norm(plain)).max() > 1e-4


def test_no_window_goes_through_the_network_twice_and_the_mask_stays(
    known, make_bundle, thresholds
):
    session, without = open_session(known), open_session(make_bundle(thresholds()))
    volume = scan(2, shape=(40, 24, 12))

    found, expected = segment_case(session, volume), segment_case(without, volume)

    assert session.num_runs == without.num_runs > 1
    np.testing.assert_array_equal(found.segmentation.labels, expected.segmentation.labels)
    assert found.ood.score is not None and expected.ood == ood.unknown("no_reference")


def test_mirror_images_do_not_count(known):
    session = open_session(known)

    plain, flipped = segment_case(session, scan(2)), segment_case(session, scan(2), flips=("i",))

    np.testing.assert_allclose(flipped.features, plain.features, atol=1e-6)
    mirrored = Volume(np.ascontiguousarray(scan(2).voxels[::-1]), np.eye(4))
    assert np.abs(segment_case(session, mirrored).features - plain.features).max() > 1e-5


def test_what_has_no_score_says_why(known, segmenter, tmp_path):
    air = Volume(np.zeros((20, 24, 12), np.int16), np.eye(4))
    few = open_session(segmenter([np.eye(6, dtype=np.float32)[n] for n in range(4)]))
    compose.compose(tmp_path / "cascade", known, organ="organ", min_organ_ml=0.0)
    twice = open_session(tmp_path / "cascade")

    assert segment_case(open_session(known), air).ood == ood.unknown("nothing_seen", 30)
    assert segment_case(few, scan(1)).ood == ood.unknown("too_few_scans", 4)
    assert segment_case(twice, scan(1)).ood == ood.unknown("cascade")
    assert bundle.REFERENCE not in twice.manifest.files and twice.manifest.reference is None


def test_an_embedding_is_held_against_its_reference(make_bundle, random_encoder, tmp_path):
    plain = make_bundle(random_encoder)
    session = open_session(plain)
    path = tmp_path / "reference.npy"
    spec = reference.write(path, [embed(session, scan(n)).vector for n in range(30)], "embedding")
    manifest = session.manifest.model_copy(update={"reference": spec})
    files = {bundle.MODEL: plain / bundle.MODEL, bundle.REFERENCE: path}
    bundle.save(tmp_path / "known", manifest, files, "")
    known = open_session(tmp_path / "known")

    assert not embed(known, scan(3)).ood.is_out
    assert embed(known, scan(3, kind="inverted")).ood.is_out
    assert embed(session, scan(3)).ood == ood.unknown("no_reference")


@pytest.mark.parametrize("what", ["other size", "pickle", "not unit", "float64", "cut", "bytes"])
def test_a_reference_that_is_not_what_it_says_is_refused(known, what, tmp_path):
    good = np.load(known / bundle.REFERENCE)
    bad = {
        "other size": good[:-1],
        "pickle": np.array([{"a": 1}], dtype=object),
        "not unit": 2 * good,
        "float64": good.astype(np.float64),
    }
    path = known / bundle.REFERENCE
    if what in bad:
        np.save(path, bad[what])
    else:
        path.write_bytes(path.read_bytes()[:-8] if what == "cut" else b"no array")
    with pytest.raises(BundleError, match="bundle_corrupt"):
        open_session(known)
    manifest = json.loads((known / bundle.MANIFEST).read_bytes())
    manifest["files"][bundle.REFERENCE] = bundle.sha256_of(path)
    (known / bundle.MANIFEST).write_text(json.dumps(manifest))

    with pytest.raises(BundleError, match=r"bundle_invalid: reference.npy"):
        open_session(known)


def test_manifest_and_file_go_together(known):
    manifest = bundle.load(known)
    files = {bundle.MODEL: known / bundle.MODEL}
    bundle.save(known.parent / "lost", manifest, files, "")

    with pytest.raises(BundleError, match="do not go together"):
        bundle.load(known.parent / "lost")


def test_the_features_of_a_batch_in_parts_are_those_of_the_whole(segmenter):
    folder = segmenter()
    whole, parts = open_session(folder), open_session(folder, max_batch=2)
    batch = np.random.default_rng(0).random((5, 1, 16, 16, 8)).astype(np.float32)

    for found, expected in zip(
        parts.run_with_features(batch), whole.run_with_features(batch), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert dataclasses.is_dataclass(whole) and whole.has_features
