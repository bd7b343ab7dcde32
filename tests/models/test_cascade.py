import dataclasses
import itertools

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imaging.resample import argmax_on_grid, resampled_grid
from imaging.volume import Grid, Volume
from models import box, bundle, compose
from models.blend import Counter, blocks
from models.box import Box
from models.bundle import BundleError, Quality, volume_input
from models.cascade import box_of_organ, segment_case
from models.predict import Clock, Stopped, fill, segment
from models.preprocess import preparation, prepare
from models.recipe import FinetuneRecipe, LabelCrop, Postprocess, Preprocessing, Window
from models.session import open_session
from models.tiling import gaussian_weights, window_starts

WINDOW = Window(low_hu=0.0, high_hu=1000.0)


def scan(shape=(48, 44, 40), spacing=(1.0, 1.0, 1.0), organ=(25, 21, 20), radius=8.0, noise=40):
    """A ball of 800 HU in soft tissue of 200 HU with noise; a little turned in space."""
    place = (np.stack(np.indices(shape), axis=-1) - organ) * spacing
    inside = (place**2).sum(axis=-1) < radius**2
    noise = np.random.default_rng(0).integers(-noise, noise, shape)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    affine = turn @ np.diag([*spacing, 1.0])
    affine[:3, 3] = -31.0, 12.5, 77.0
    return Volume(
        np.where(inside, 800, 200)
        + np.where(inside & (noise.max() < 100), 0, noise).astype(np.int16),
        affine,
    ), inside


@dataclasses.dataclass
class Counting:
    """A real session that remembers how many windows went through it."""

    session: object
    num_windows: int = 0

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, batch, **options):
        self.num_windows += len(batch)
        return self.session.run(batch, **options)


@pytest.fixture
def cascade_of(make_bundle, tmp_path):
    """Compose bundles of two models (or one) and open their sessions."""
    count = itertools.count()

    def make(fine, coarse=None, *, organ="organ", fine_options=None, coarse_options=None, **how):
        fine_dir = make_bundle(fine, **(fine_options or {}))
        coarse_dir = make_bundle(coarse, **(coarse_options or {})) if coarse is not None else None
        out = tmp_path / f"cascade{next(count)}"
        compose.compose(out, fine_dir, coarse_dir, organ=organ, **how)
        session = open_session(out, num_threads=1)
        finder = open_session(out, num_threads=1, part="coarse") if coarse is not None else None
        return session, finder, open_session(fine_dir, num_threads=1)

    return make


def at(spacing):
    return {"preprocessing": Preprocessing(spacing_mm=(spacing,) * 3, intensity=WINDOW)}


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.9, 2.0), (1.7, 1.3, 0.6)])
def test_in_its_box_the_mask_is_that_of_the_single_pass(cascade_of, thresholds, two, spacing):
    session, finder, single = cascade_of(
        thresholds(), thresholds() if two else None,
        coarse_options=at(4.0), margin_mm=6.0, **({} if two else {"coarse_spacing_mm": 4.0}),
    )  # fmt: skip
    volume, _ = scan(spacing=spacing)

    case = segment_case(session, volume, coarse=finder)

    control = segment(single, volume)
    np.testing.assert_array_equal(case.segmentation.labels, control.labels)
    assert 0 < control.voxels["organ"] < control.labels.size / 4
    assert case.segmentation.volumes_ml == control.volumes_ml
    assert case.cascade.fallback is None
    assert not case.cascade.is_cut
    assert np.prod(case.cascade.box_voxels) < np.prod(volume.shape) * np.prod(spacing) / 3
    assert case.segmentation.num_windows == sum(case.cascade.num_windows.values())
    assert case.segmentation.num_windows < control.num_windows


def test_outside_of_the_box_there_is_background(cascade_of, thresholds):
    session, _, single = cascade_of(thresholds(), margin_mm=4.0)
    volume, inside = scan(radius=8.0)
    voxels = volume.voxels.copy()
    voxels[2:4, 2:4, 2:4] = 900  # as bright as the organ, and far from it
    volume = Volume(voxels, volume.affine)

    case = segment_case(session, volume)

    np.testing.assert_array_equal(case.segmentation.labels, inside)
    assert segment(single, volume).labels[3, 3, 3] == 1  # the control: the single pass takes it


def test_the_cascade_equals_a_slow_definition_with_a_network_that_sees_borders(
    cascade_of, random_conv_model, thresholds
):
    options = {"labels": ("organ", "other"), **at(1.5), "patch_size": (16, 16, 8)}
    session, finder, _ = cascade_of(
        random_conv_model, thresholds(), fine_options=options, coarse_options=at(4.0), margin_mm=3.0
    )
    volume, _ = scan(spacing=(1.0, 1.2, 2.0), noise=400)

    case = segment_case(session, volume, coarse=finder)

    whole = prepare(volume, session.manifest.preprocessing)
    rough = prepare(volume, finder.manifest.preprocessing)
    coarse = (rough.array > 0.5).astype(np.uint8)  # what that network does, written out
    found, _ = box_of_organ(
        coarse, rough.grid, session.manifest.cascade, ("organ",), fine_grid=whole.grid
    )
    found = box.at_least(found, (16, 16, 8), whole.grid.shape)
    assert found.shape == case.cascade.box_voxels != whole.grid.shape
    seen = box.centres_within(found, whole.grid, volume.grid)
    expected = np.zeros(volume.shape, np.uint8)
    expected[seen.slices] = dense_labels(
        session,
        whole.array[found.slices],
        box.grid_of(whole.grid, found),
        box.grid_of(volume.grid, seen),
    )
    same = expected == case.segmentation.labels
    assert same.mean() > 0.9999  # float32 sums in another order
    assert {0, 1, 2} == set(np.unique(expected))


def dense_labels(session, array, grid, target):
    """Gaussian sliding windows written out, the logits held for the whole array."""
    patch = session.manifest.patch_size
    sums = np.zeros((3, *array.shape), np.float64)
    norm = np.zeros(array.shape, np.float64)
    weights = gaussian_weights(patch)
    for start in window_starts(array.shape, patch, session.manifest.overlap):
        here = tuple(slice(first, first + size) for first, size in zip(start, patch, strict=True))
        sums[:, *here] += session.run(np.ascontiguousarray(array[here])[None, None])[0] * weights
        norm[here] += weights
    return argmax_on_grid((sums / norm).astype(np.float32), grid, target)


@given(
    corner=st.tuples(*[st.sampled_from([0, 1])] * 3),
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 1.9])] * 3),
)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_bright_corner_stays_in_its_corner(corner_session, corner, spacing):
    shape = np.array((28, 26, 24))
    voxels = np.full(shape, 100, np.int16)
    place = tuple(slice(-7, None) if end else slice(0, 7) for end in corner)
    voxels[place] = 900
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = 5.0, -7.0, 11.0

    case = segment_case(corner_session, Volume(voxels, affine))

    found = case.segmentation.labels == 1
    middle = np.argwhere(found).mean(axis=0)
    assert ((middle > shape / 2) == np.array(corner, bool)).all()
    assert found[place].mean() > 0.8
    assert found.sum() < 1.3 * found[place].sum()
    assert case.cascade.fallback is None


@pytest.fixture
def corner_session(cascade_of, thresholds):
    session, _, _ = cascade_of(thresholds(), margin_mm=2.0, coarse_spacing_mm=2.5, min_organ_ml=0.1)
    return session


def test_no_organ_in_the_coarse_pass_means_the_whole_scan_and_a_word_of_it(cascade_of, thresholds):
    never = thresholds(2, at=2.0)
    session, finder, single = cascade_of(thresholds(), never, coarse_options=at(4.0))
    volume, inside = scan()

    case = segment_case(session, volume, coarse=finder)

    assert case.cascade.fallback == "organ_not_found"
    assert case.cascade.box_voxels == volume.shape
    np.testing.assert_array_equal(case.segmentation.labels, inside)
    np.testing.assert_array_equal(case.segmentation.labels, segment(single, volume).labels)


def test_an_organ_that_is_too_small_counts_as_not_found(cascade_of, thresholds):
    volume, inside = scan(radius=6.0)
    ml = inside.sum() / 1000

    small, _, _ = cascade_of(thresholds(), min_organ_ml=3 * ml)
    large, _, _ = cascade_of(thresholds(), min_organ_ml=ml / 3)

    assert segment_case(small, volume).cascade.fallback == "organ_not_found"
    assert segment_case(large, volume).cascade.fallback is None


def test_the_largest_component_with_its_parts_is_the_organ():
    grid = Grid((20, 20, 20), np.diag([4.0, 4.0, 4.0, 1.0]))
    fine = resampled_grid(grid, (2.0, 2.0, 2.0))
    labels = np.zeros(grid.shape, np.uint8)
    labels[4:9, 4:9, 4:9] = 1
    labels[9:11, 5:8, 5:8] = 2  # a tumour at the organ's side is of the organ
    labels[15:19, 15:19, 15:19] = 1  # smaller, elsewhere
    labels[1:3, 1:3, 15:20] = 2  # a part alone is no organ
    cascade = bundle.Cascade(
        organ="liver", parts=("tumour",), margin_mm=0.0, coarse_spacing_mm=(4, 4, 4), fine_digest=""
    )

    found, ml = box_of_organ(labels, grid, cascade, ("liver", "tumour"), fine_grid=fine)

    assert found == Box((8, 8, 8), (22, 18, 18))
    assert ml == pytest.approx((125 + 18) * 0.064)
    labels[labels == 1] = 0
    none, _ = box_of_organ(labels, grid, cascade, ("liver", "tumour"), fine_grid=fine)
    assert none is None


def test_a_mask_that_its_box_cuts_off_is_flagged(cascade_of, thresholds):
    dim = thresholds(2, at=0.1)  # takes all the tissue for the organ
    session, finder, _ = cascade_of(dim, thresholds(), coarse_options=at(4.0), margin_mm=0.0)
    good, good_finder, _ = cascade_of(thresholds(), thresholds(), coarse_options=at(4.0))
    volume, _ = scan()

    cut = segment_case(session, volume, coarse=finder)
    whole = segment_case(good, volume, coarse=good_finder)

    assert cut.cascade.is_cut
    assert cut.quality.reasons == ("box_reaches_edge",)
    assert (whole.cascade.is_cut, whole.quality.flag) == (False, "unknown")


def test_passes_that_disagree_are_flagged(cascade_of, thresholds):
    session, finder, _ = cascade_of(
        thresholds(2, at=2.0), thresholds(), coarse_options=at(4.0), margin_mm=5.0
    )
    volume, _ = scan()

    case = segment_case(session, volume, coarse=finder)

    assert case.segmentation.voxels == {"organ": 0}
    assert case.quality.reasons == ("stages_disagree",)


@pytest.mark.parametrize("stop_in", ["coarse", "fine"])
def test_a_stop_ends_either_pass(cascade_of, thresholds, stop_in, monkeypatch):
    monkeypatch.setattr("models.blend.BATCH_VOXELS", 1)
    session, finder, _ = cascade_of(thresholds(), thresholds(), coarse_options=at(4.0))
    fine, coarse = Counting(session), Counting(finder)
    volume, _ = scan()

    with pytest.raises(Stopped):
        segment_case(
            fine, volume, coarse=coarse,
            should_stop=lambda: (coarse if stop_in == "coarse" else fine).num_windows >= 2,
        )  # fmt: skip

    assert (coarse if stop_in == "coarse" else fine).num_windows == 2
    assert (fine.num_windows == 0) == (stop_in == "coarse")


@pytest.mark.parametrize("flips", [(), ("j",)])
def test_progress_goes_over_both_passes_and_never_back(cascade_of, thresholds, flips):
    session, finder, _ = cascade_of(thresholds(), thresholds(), coarse_options=at(4.0))
    volume, _ = scan()
    seen = []

    case = segment_case(
        session, volume, coarse=finder, flips=flips, progress=lambda *now: seen.append(now)
    )

    shares = [done / total for done, total in seen]
    assert shares == sorted(shares)
    assert seen[-1] == (case.segmentation.num_windows,) * 2
    assert seen[0][0] < case.cascade.num_windows["coarse"] + 1


def test_a_model_without_a_cascade_gives_the_mask_that_it_gave(make_bundle, random_conv_model):
    session = open_session(make_bundle(random_conv_model, labels=("a", "b")), num_threads=1)
    volume, _ = scan((24, 20, 16), spacing=(0.8, 1.0, 1.6), noise=900)

    case = segment_case(session, volume)

    control = segment(session, volume)
    assert len(np.unique(control.labels)) == 3
    np.testing.assert_array_equal(case.segmentation.labels, control.labels)
    assert case.segmentation.voxels == control.voxels
    assert case.segmentation.num_windows == control.num_windows
    assert case.cascade is case.entropy_map is None
    assert case.quality.flag == "unknown"


def test_flips_are_counted_and_change_the_mask_of_a_network_that_minds(
    make_bundle, random_conv_model, thresholds
):
    minds = open_session(make_bundle(random_conv_model, labels=("a", "b")), num_threads=1)
    even = open_session(make_bundle(thresholds()), num_threads=1)
    small, radius = (24, 20, 16), {"organ": (12, 10, 8), "radius": 5.0}
    noisy, _ = scan(small, noise=900, **radius)
    volume, inside = scan(small, **radius)

    once, twice = segment_case(minds, noisy), segment_case(minds, noisy, flips=("i", "k"))

    assert twice.segmentation.num_windows == 4 * once.segmentation.num_windows
    assert (twice.segmentation.labels != once.segmentation.labels).mean() > 0.01
    np.testing.assert_array_equal(
        segment_case(even, volume, flips=("i", "j", "k")).segmentation.labels, inside
    )


def test_the_entropy_map_lies_on_the_scan_and_is_empty_outside_of_the_box(cascade_of, thresholds):
    session, _, single = cascade_of(thresholds(), margin_mm=4.0)
    volume, inside = scan(radius=7.0)

    boxed = segment_case(session, volume, wants_map=True)
    full = segment_case(single, volume, wants_map=True)

    assert boxed.entropy_map.shape == volume.shape
    in_box = boxed.entropy_map > 0
    assert 0 < in_box.mean() < 0.5
    np.testing.assert_allclose(
        boxed.entropy_map[in_box].astype(int), full.entropy_map[in_box], atol=1
    )
    # the network's logits are -x + 1/2 and x - 1/2: surest where the organ is
    p = 1 / (1 + np.exp(-2 * (0.8 - 0.5)))
    expected = -(p * np.log(p) + (1 - p) * np.log(1 - p)) / np.log(2)
    assert boxed.uncertainty.mean_foreground_entropy == pytest.approx(expected, abs=2e-3)
    assert boxed.entropy_map[inside].mean() == pytest.approx(255 * expected, abs=2)


def test_every_column_that_thick_slices_look_at_is_shown_to_the_meter(make_bundle, thresholds):
    """A box may begin before the first column that a thick target looks at."""
    session = open_session(make_bundle(thresholds()), num_threads=1)
    volume, _ = scan(shape=(24, 12, 16), spacing=(1.0, 7.0, 1.0), organ=(12, 4, 8))
    grid = resampled_grid(volume.grid, (1.0, 1.0, 1.0))
    part = Box((0, 11, 0), (24, 51, 16))
    seen = box.centres_within(part, grid, volume.grid)
    target = box.grid_of(volume.grid, seen)
    spec, _ = volume_input(session.manifest)
    source = preparation(volume, spec, part)
    (block,) = blocks(source.grid, target, 1)
    assert block.source.start > 0  # the control: without it nothing is tried
    shown = []

    fill(
        session, source, target, np.zeros(target.shape, np.uint8), counter=Counter(),
        clock=Clock(), watch=lambda logits, column, _: shown.append((column, logits.shape[2])),
    )  # fmt: skip

    width = block.source.stop - block.source.start
    assert set(shown) == {(block.source.start, width)}


def test_a_composed_bundle_is_whole_and_says_what_it_is(make_bundle, thresholds, tmp_path):
    fine, coarse = make_bundle(thresholds()), make_bundle(thresholds(), **at(4.0))

    digest = compose.compose(tmp_path / "made", fine, coarse, organ="organ", margin_mm=12.0)

    made = bundle.load(tmp_path / "made")
    assert digest == bundle.digest_of(tmp_path / "made") != bundle.digest_of(fine)
    assert made.cascade.fine_digest == bundle.digest_of(fine)
    assert made.cascade.coarse.bundle_digest == bundle.digest_of(coarse)
    assert made.cascade.coarse_spacing_mm == (4.0, 4.0, 4.0)
    assert set(made.files) == {"model.onnx", "coarse.onnx", "card.md"}
    assert "looked for at 4 x 4 x 4 mm" in (tmp_path / "made" / "card.md").read_text()
    props = {p.key: p.value for p in onnx.load(tmp_path / "made" / "model.onnx").metadata_props}
    assert props["cascade"] == bundle.onnx_metadata(made)["cascade"]
    assert props["kind"] == "segmenter"
    coarse_path = tmp_path / "made" / "coarse.onnx"
    assert coarse_path.read_bytes() == (coarse / "model.onnx").read_bytes()
    coarse_path.write_bytes(b"else")
    with pytest.raises(BundleError, match="bundle_corrupt"):
        open_session(tmp_path / "made")


def test_an_onnx_file_with_another_cascade_than_the_manifest_is_refused(
    make_bundle, thresholds, tmp_path
):
    compose.compose(tmp_path / "a", make_bundle(thresholds()), organ="organ", margin_mm=5.0)
    manifest = bundle.load(tmp_path / "a")
    wider = manifest.cascade.model_copy(update={"margin_mm": 50.0})

    bundle.save(
        tmp_path / "b",
        manifest.model_copy(update={"cascade": wider}),
        {"model.onnx": tmp_path / "a" / "model.onnx"},
        "",
    )

    open_session(tmp_path / "a")
    with pytest.raises(BundleError, match="bundle_inconsistent"):
        open_session(tmp_path / "b")


def test_what_is_no_cascade_is_not_composed(make_bundle, thresholds, random_encoder, tmp_path):
    fine, encoder = make_bundle(thresholds()), make_bundle(random_encoder)
    compose.compose(tmp_path / "made", fine, organ="organ")

    with pytest.raises(BundleError, match="wrong_model_kind"):
        compose.compose(tmp_path / "x", encoder, organ="organ")
    with pytest.raises(BundleError, match="wrong_model_kind"):
        compose.compose(tmp_path / "x", tmp_path / "made", organ="organ")
    with pytest.raises(ValueError, match="spleen"):
        compose.compose(tmp_path / "x", fine, organ="spleen")
    with pytest.raises(ValueError, match="coarse_spacing_mm"):
        compose.compose(tmp_path / "x", fine, fine, organ="organ", coarse_spacing_mm=3.0)
    assert not (tmp_path / "x").exists()


def test_the_margin_is_what_the_fine_network_was_trained_with(make_bundle, thresholds, tmp_path):
    fine = make_bundle(thresholds())
    manifest = bundle.load(fine)
    recipe = FinetuneRecipe(
        labels={"organ": 1},
        crop=LabelCrop(margin_voxels=20),
        preprocessing=Preprocessing(spacing_mm=(1.0, 1.0, 1.5), intensity=WINDOW),
    )
    bundle.save(
        tmp_path / "trained",
        manifest.model_copy(update={"recipe": recipe}),
        {"model.onnx": fine / "model.onnx"},
        "",
    )

    compose.compose(tmp_path / "a", tmp_path / "trained", organ="organ")
    compose.compose(tmp_path / "b", fine, organ="organ")

    assert bundle.load(tmp_path / "a").cascade.margin_mm == 30.0
    assert bundle.load(tmp_path / "b").cascade.margin_mm == 15.0


def test_parts_come_from_the_model_that_finds_the_organ(make_bundle, thresholds, tmp_path):
    spec = Postprocess(parts={"liver": ("tumour",)})
    both = ("liver", "tumour")
    fine = make_bundle(thresholds(3), labels=both)
    coarse = make_bundle(thresholds(3), labels=both, postprocess=spec, **at(4.0))

    compose.compose(tmp_path / "a", fine, coarse, organ="liver")
    compose.compose(tmp_path / "b", fine, organ="liver", parts=["tumour"])
    compose.compose(tmp_path / "c", fine, organ="liver")

    parts = [bundle.load(tmp_path / name).cascade.parts for name in "abc"]
    assert parts == [("tumour",), ("tumour",), ()]


def test_the_quality_threshold_of_the_bundle_flags_the_case(make_bundle, thresholds, tmp_path):
    fine = make_bundle(thresholds())
    manifest = bundle.load(fine)
    volume, _ = scan()

    flags = []
    for limit in (0.99, 0.01):
        quality = Quality(
            max_foreground_entropy=limit, min_dice=0.7, num_cases=2, num_good=2, split="val"
        )
        out = tmp_path / str(limit)
        bundle.save(
            out,
            manifest.model_copy(update={"quality": quality}),
            {"model.onnx": fine / "model.onnx"},
            "",
        )
        flags.append(segment_case(open_session(out, num_threads=1), volume).quality.flag)

    assert flags == ["ok", "review"]
