"""What a segmentation was told to take, held against what a process of its own really took."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from imaging import nifti
from imaging.volume import Volume
from models import compose, memory, pace, preflight, windows
from models.bundle import BundleError, TensorSpec
from models.cascade import segment_case
from models.predict import embed, segment
from models.recipe import Preprocessing
from models.session import open_session
from models.tiling import Windows
from models.windows import serving_windows

CHILD = """
import json, sys
from pathlib import Path
from imaging import nifti
from models import predict, preflight
from models.recipe import Preprocessing
from models.session import open_session

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

session = open_session(Path(sys.argv[1]), num_threads=1)
scan = nifti.open_canonical(Path(sys.argv[2]))
limit = int(sys.argv[3]) or None
plan = preflight.plan(session, scan, available_bytes=limit)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = status("VmRSS:")
found = predict.segment(session, scan, plan=plan)
print(json.dumps({
    "predicted": plan.predicted_bytes, "peak": status("VmHWM:") - before,
    "num_blocks": plan.num_blocks, "degraded": plan.degraded, "windows": found.num_windows,
    "checksum": int(found.labels.astype("int64").sum()),
}))
"""


def measured(bundle_dir, scan, limit=0):
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(bundle_dir), str(scan), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def scan_file(folder, shape, spacing=(1.0, 1.0, 1.0)):
    """Noise without any air, in the form that the intake writes."""
    rng = np.random.default_rng(0)
    path = folder / f"scan{'x'.join(map(str, shape))}.nii"
    voxels = np.asfortranarray(rng.integers(1, 1000, shape, dtype=np.int16))
    nifti.write(path, voxels, np.diag([*spacing, 1.0]))
    return path


def in_memory(shape, spacing=(1.0, 1.0, 1.0)):
    return Volume(np.ones(shape, np.int16), np.diag([*spacing, 1.0]))


@pytest.fixture
def wide(make_bundle, random_conv_model):
    return make_bundle(random_conv_model, labels=("a", "b"), patch_size=(96, 96, 64), overlap=0.25)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((288, 288, 160), (1.0,) * 3), ((300, 280, 90), (0.8, 0.8, 2.5))]
)
def test_the_real_peak_is_below_the_prediction_and_not_far_below(tmp_path, wide, shape, spacing):
    found = measured(wide, scan_file(tmp_path, shape, spacing))

    assert found["peak"] > 100 << 20  # the control: the child did something that is seen
    assert found["peak"] <= found["predicted"] <= 1.5 * found["peak"]
    assert found["degraded"] == []


def test_with_little_memory_columns_are_taken_in_blocks_and_the_promise_is_kept(tmp_path, wide):
    scan = scan_file(tmp_path, (288, 288, 100))
    free = measured(wide, scan)
    limit = int(0.75 * free["predicted"])

    tight = measured(wide, scan, limit)

    assert tight["degraded"][-1] == "column_blocks" and tight["num_blocks"] > 1
    assert tight["peak"] <= tight["predicted"] <= limit < free["predicted"]
    assert tight["windows"] > free["windows"]
    assert tight["checksum"] == pytest.approx(free["checksum"], rel=1e-4)


def test_the_prediction_comes_from_shapes_alone(wide):
    session = open_session(wide, num_threads=1)
    shape = (512, 512, 1000)
    unread = np.lib.stride_tricks.as_strided(np.zeros(1, np.int16), shape, (0, 0, 0))

    plan = preflight.plan(session, Volume(unread, np.eye(4)))

    assert math.prod(shape) < plan.predicted_bytes < 2 << 30
    assert plan.num_windows == 7 * 7 * 21


def test_memory_grows_with_voxels_and_hardly_with_windows_or_classes(make_bundle, thresholds):
    def needed(num_classes, overlap, planes):
        labels = tuple(f"organ{n}" for n in range(1, num_classes))
        model = make_bundle(
            thresholds(num_classes), labels=labels, patch_size=(96, 96, 64), overlap=overlap
        )
        session = open_session(model, num_threads=1)
        return preflight.plan(session, in_memory((512, 512, planes))).predicted_bytes

    base = needed(3, 0.5, 200)

    assert needed(3, 0.75, 200) < 1.05 * base
    assert needed(60, 0.5, 200) < needed(6, 0.5, 200) * 1.6
    assert needed(3, 0.5, 1600) - needed(3, 0.5, 800) == pytest.approx(
        2 * (needed(3, 0.5, 800) - needed(3, 0.5, 400)), rel=0.1
    )


def test_what_cannot_fit_is_refused_with_the_sentence(wide):
    session = open_session(wide, num_threads=1)

    with pytest.raises(BundleError) as caught:
        preflight.plan(session, in_memory((300, 300, 100)), available_bytes=30_000_000)

    assert caught.value.code == "insufficient_memory"
    assert caught.value.detail.startswith("the segmentation needs 0.")
    assert "GB, 0.0 GB available, about " in caught.value.detail


def test_a_smaller_batch_is_tried_first(make_bundle, thresholds):
    session = open_session(make_bundle(thresholds(3), labels=("a", "b")), num_threads=1)
    volume = in_memory((64, 64, 40))
    free = preflight.plan(session, volume)

    tight = preflight.plan(session, volume, available_bytes=free.predicted_bytes - 1)

    assert free.windows.batch > 1 and free.degraded == ()
    assert tight.windows.batch == 1 and tight.degraded == ("smaller_batch",)
    assert tight.predicted_bytes < free.predicted_bytes


def test_windows_are_those_of_training_unless_larger_ones_are_allowed(wide, monkeypatch):
    declared = TensorSpec(name="image", shape=("batch", 1, "8*i", "8*j", "8*k"))

    def manifest(patch, inputs):
        return SimpleNamespace(
            preprocessing=Preprocessing(), patch_size=patch, overlap=0.25, inputs=(inputs,)
        )

    free = declared.model_copy(update={"shape": ("batch", 1, "i", "j", "k")})
    shape = (108, 108, 139)

    assert serving_windows(manifest((96, 96, 64), declared), shape).size == (96, 96, 64)
    monkeypatch.setattr(windows, "LARGEST_WINDOW", 1.5)
    assert serving_windows(manifest((96, 96, 64), declared), shape).size == (112, 112, 80)
    assert serving_windows(manifest((96, 96, 64), declared)).size == (96, 96, 64)
    assert serving_windows(manifest((96, 96, 64), free), shape).size == (96, 96, 64)
    large = (200, 200, 200)  # 8 million voxels are more than a window may have
    assert serving_windows(manifest((160, 160, 160), declared), large).size == (160, 160, 160)

    opened = open_session(wide, num_threads=1)
    strided = opened.manifest.model_copy(update={"inputs": (declared,)})
    session = dataclasses.replace(opened, manifest=strided)
    grown = preflight.plan(session, in_memory(shape))
    short = preflight.plan(
        session, in_memory(shape), available_bytes=int(0.99 * grown.predicted_bytes)
    )
    assert (grown.windows.size, grown.degraded) == ((112, 112, 80), ())
    assert (short.windows.size, short.degraded) == ((96, 96, 64), ("smaller_windows",))


def test_a_result_carries_its_plan_and_the_pace_is_learned(wide):
    session = open_session(wide, num_threads=1)
    volume = in_memory((100, 100, 70))
    plan = preflight.plan(session, volume, windows=Windows((64, 64, 64), 0.0, 2))

    result = segment(session, volume, plan=plan)

    assert result.preflight == plan
    assert result.num_windows == plan.num_windows == 8
    again = preflight.plan(session, volume, windows=plan.windows)
    learned = pace.pace_of(session).seconds * 8 * 64**3
    assert learned == pytest.approx(result.timings_s["infer"], abs=0.01)
    assert again.predicted_s >= round(learned, 1)


def test_the_least_of_all_limits_counts(tmp_path):
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("5000000\n")
    (tmp_path / "a" / "memory.current").write_text("2000000\n")
    (tmp_path / "a" / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000000\n")
    old = tmp_path / "memory" / "c"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("7000000\n")
    (old / "memory.usage_in_bytes").write_text("1000000\n")

    left = memory._left_in_groups(tmp_path, ["0::/a/b", "4:cpu,memory:/c", "3:cpu:/x"])

    assert sorted(left) == [3_500_000, 6_000_000]
    assert memory.available_bytes(1000) == 1000
    assert memory.available_bytes() > 1 << 20


def test_a_plan_says_in_words_what_it_needs():
    plan = preflight.Preflight(Windows((96, 96, 64), 0.5), 1, 54, 6_120_000_000, 8 * 10**9, 40.2)

    assert str(plan) == "needs 6.1 GB, 8.0 GB available, about 40 s"
    assert str(dataclasses.replace(plan, available_bytes=None)) == "needs 6.1 GB, about 40 s"
    assert plan.fits and not dataclasses.replace(plan, available_bytes=10**9).fits


CHILD_OF_BOTH = """
import json, sys
from pathlib import Path
from imaging import nifti
from models import cascade, predict, preflight
from models.session import open_session

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak_of(plan, work):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    work()
    return {"predicted": plan.predicted_bytes, "peak": status("VmHWM:") - before}

scan = nifti.open_canonical(Path(sys.argv[3]))
encoder = open_session(Path(sys.argv[1]), num_threads=1)
plan = preflight.plan_embedding(encoder, scan)
embedded = peak_of(plan, lambda: predict.embed(encoder, scan, plan=plan))
scan = nifti.open_canonical(Path(sys.argv[3]))
segmenter = open_session(Path(sys.argv[2]), num_threads=1)
flipped = preflight.plan(segmenter, scan, num_views=2)
work = lambda: cascade.segment_case(segmenter, scan, flips=("i",), plan=flipped)
print(json.dumps({"embed": embedded, "flips": peak_of(flipped, work)}))
"""


@pytest.mark.nightly
def test_an_embedding_and_mirror_images_take_no_more_than_predicted(
    tmp_path, make_bundle, random_encoder, wide
):
    encoder = make_bundle(random_encoder, patch_size=(64, 64, 64))
    scan = scan_file(tmp_path, (224, 224, 120))

    ran = subprocess.run(
        [sys.executable, "-c", CHILD_OF_BOTH, str(encoder), str(wide), str(scan)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr

    for found in json.loads(ran.stdout).values():
        assert found["peak"] > 20 << 20
        assert found["peak"] <= found["predicted"] <= 2.5 * found["peak"]


def test_mirror_images_are_told_with_their_time_and_memory(wide):
    session = open_session(wide, num_threads=1)
    volume = in_memory((200, 200, 100))

    once = preflight.plan(session, volume)
    eight = preflight.plan(session, volume, num_views=8)

    assert eight.num_windows == 8 * once.num_windows
    assert eight.predicted_s > 4 * once.predicted_s
    assert eight.predicted_bytes > once.predicted_bytes


@pytest.fixture
def steady_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pace for every question: what is measured beside other work changes between two."""
    monkeypatch.setattr(preflight, "pace_of", lambda session: pace.Pace(40.0, 1e-7))


@pytest.mark.usefixtures("steady_pace")
def test_a_cascade_is_told_with_its_coarse_pass_which_may_degrade(make_bundle, thresholds):
    organ = make_bundle(thresholds())
    folder = organ.with_name("cascade")
    compose.compose(folder, organ, organ, organ="organ", margin_mm=4.0)
    session = open_session(folder, num_threads=1)
    finder = open_session(folder, num_threads=1, part="coarse")
    volume = in_memory((64, 64, 40))
    single = preflight.plan(open_session(organ, num_threads=1), volume)

    whole = preflight.plan(session, volume, coarse=finder)

    assert whole.coarse is not None and single.coarse is None
    assert whole.num_windows == 2 * single.num_windows
    assert whole.predicted_bytes == max(whole.coarse.predicted_bytes, single.predicted_bytes)
    assert "at most about" in str(whole) and "at most" not in str(single)
    tight = preflight.plan(
        session, volume, coarse=finder, available_bytes=whole.coarse.predicted_bytes - 1
    )
    assert tight.coarse.windows.batch == 1 and "smaller_batch" in tight.degraded
    case = segment_case(session, volume, coarse=finder, plan=tight)
    assert case.segmentation.num_windows == tight.num_windows  # no organ: the whole scan
    with pytest.raises(BundleError, match="insufficient_memory"):
        preflight.plan(session, volume, coarse=finder, available_bytes=1 << 20)


@pytest.mark.usefixtures("steady_pace")
def test_an_embedding_degrades_or_is_refused_with_the_sentence(make_bundle, random_encoder):
    session = open_session(make_bundle(random_encoder), num_threads=1)
    volume = in_memory((40, 40, 24))
    free = preflight.plan_embedding(session, volume)
    tight = preflight.plan_embedding(session, volume, available_bytes=free.predicted_bytes - 1)

    assert free.windows.batch > 1 and free.degraded == ()
    assert tight.windows.batch == 1 and tight.degraded == ("smaller_batch",)
    assert embed(session, volume, plan=tight).num_windows == tight.num_windows
    np.testing.assert_allclose(
        embed(session, volume, plan=tight).vector, embed(session, volume).vector, atol=1e-6
    )
    with pytest.raises(BundleError) as caught:
        preflight.plan_embedding(session, volume, available_bytes=1 << 20)
    assert caught.value.code == "insufficient_memory"
    assert caught.value.detail.startswith("the embedding needs 0.0 GB")
