import gc
import threading
import time

import numpy as np
import onnx
import onnxruntime
import pytest

from models import bundle
from models.bundle import BundleError
from models.onnx_wire import has_external_data
from models.session import SessionCache, open_session, refuse_another_provider

IMAGE = np.zeros((1, 1, 16, 16, 8), np.float32)


@pytest.fixture
def folder(make_bundle, thresholds):
    return make_bundle(thresholds())


def test_a_session_runs_the_network(folder):
    session = open_session(folder, device="cpu", num_threads=1)

    logits = session.run(IMAGE + 0.75)

    assert logits.shape == (1, 2, 16, 16, 8)
    np.testing.assert_allclose(logits[0, 1], 0.25, atol=1e-6)
    assert session.provider == "CPUExecutionProvider"
    assert session.digest == bundle.digest_of(folder)
    assert session.size_bytes == (folder / bundle.MODEL).stat().st_size


def test_cuda_on_a_machine_without_it_is_refused_not_replaced(folder):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")

    for device in ("cuda", "cuda:0"):
        with pytest.raises(BundleError) as caught:
            open_session(folder, device=device)
        assert caught.value.code == "provider_unavailable"


def test_a_session_that_silently_fell_back_to_the_cpu_is_refused(folder):
    fell_back = onnxruntime.InferenceSession(
        folder / bundle.MODEL, providers=["CPUExecutionProvider"]
    )
    refuse_another_provider(fell_back, "CPUExecutionProvider")

    with pytest.raises(BundleError, match="provider_unavailable"):
        refuse_another_provider(fell_back, "CUDAExecutionProvider")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_an_unknown_device_is_a_wrong_argument(folder, device):
    with pytest.raises(ValueError, match="device"):
        open_session(folder, device=device)


def test_a_corrupt_model_is_refused(folder):
    path = folder / bundle.MODEL
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(BundleError, match="bundle_corrupt"):
        open_session(folder)


def test_another_bundle_than_the_registrys_is_refused(folder):
    assert open_session(folder, digest=bundle.digest_of(folder))

    with pytest.raises(BundleError, match="bundle_corrupt"):
        open_session(folder, digest="0" * 64)


def test_a_model_with_external_data_is_refused(make_bundle, random_conv_model):
    onnx.external_data_helper.convert_model_to_external_data(
        random_conv_model, location="weights.bin", size_threshold=0
    )
    for tensor in random_conv_model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    folder = make_bundle(random_conv_model, labels=("a", "b"))

    with pytest.raises(BundleError, match="external_data"):
        open_session(folder)


def test_external_data_is_found_inside_subgraphs_and_functions(endless):
    assert not has_external_data(endless.SerializeToString())
    body = endless.graph.node[0].attribute[0].g
    body.initializer[0].data_location = onnx.TensorProto.EXTERNAL

    assert has_external_data(endless.SerializeToString())

    function = onnx.FunctionProto(name="f", domain="d")
    function.node.append(endless.graph.node[0])
    assert has_external_data(onnx.ModelProto(functions=[function]).SerializeToString())


@pytest.mark.parametrize("content", [b"\x0f", b"\xff" * 20, b"\x3a\x7f123"])
def test_bytes_that_are_no_protobuf_are_told(content):
    with pytest.raises(ValueError, match="no protobuf"):
        has_external_data(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "encoder"),
        ("labels", "kidney"),
        ("patch_size", "32,32,32"),
        ("spacing_mm", "2,2,2"),
    ],
)
def test_metadata_in_the_onnx_file_that_contradicts_the_manifest_is_refused(
    make_bundle, thresholds, key, value
):
    folder = make_bundle(thresholds(), metadata={key: value})

    with pytest.raises(BundleError, match="bundle_inconsistent") as caught:
        open_session(folder)

    assert key in caught.value.detail


def test_an_output_that_the_manifest_does_not_name_is_refused(make_bundle, thresholds):
    model = thresholds()
    folder = make_bundle(model)
    manifest = bundle.load(folder)
    wrong = manifest.model_copy(
        update={"outputs": (manifest.outputs[0].model_copy(update={"name": "scores"}),)}
    )
    other = folder.parent / "other"
    bundle.save(other, wrong, {bundle.MODEL: folder / bundle.MODEL}, "card")

    with pytest.raises(BundleError, match="bundle_inconsistent"):
        open_session(other)


def test_two_onnxruntime_distributions_are_refused(folder, tmp_path, monkeypatch):
    open_session(folder)  # one is fine
    for name in ("onnxruntime", "onnxruntime-gpu"):
        info = tmp_path / f"{name.replace('-', '_')}-1.31.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(BundleError, match="runtime_conflict"):
        open_session(folder)


def test_a_batch_without_end_is_ended_at_its_limit(make_bundle, endless):
    session = open_session(make_bundle(endless), num_threads=1, run_limit_s=0.5)
    begin = time.monotonic()

    with pytest.raises(BundleError, match="inference_timeout"):
        session.run(IMAGE)

    assert time.monotonic() - begin < 1.5


def test_an_output_that_is_not_finite_is_refused(folder):
    session = open_session(folder)

    with pytest.raises(BundleError, match="non_finite_output"):
        session.run(np.full_like(IMAGE, np.nan))


def test_a_batch_of_the_wrong_form_is_a_wrong_argument(folder):
    session = open_session(folder)

    for batch in (IMAGE[0], IMAGE.astype(np.float64), np.repeat(IMAGE, 2, axis=1)):
        with pytest.raises(ValueError, match="batch"):
            session.run(batch)


def test_memory_can_be_given_back_after_a_batch(folder):
    session = open_session(folder)

    np.testing.assert_array_equal(session.run(IMAGE, release_memory=True), session.run(IMAGE))


class Opener:
    def __init__(self, folder):
        self.folder = folder
        self.num_calls = 0

    def __call__(self):
        self.num_calls += 1
        return open_session(self.folder, num_threads=1)


@pytest.fixture
def openers(make_bundle, thresholds):
    return {name: Opener(make_bundle(thresholds())) for name in "abc"}


def test_a_resident_model_is_never_reloaded(openers):
    cache = SessionCache(10**9)

    sessions = [cache.get("a", openers["a"]) for _ in range(5)]

    assert all(session is sessions[0] for session in sessions)
    assert openers["a"].num_calls == cache.num_loads == 1


def test_a_cache_of_no_bytes_reloads_each_time(openers):
    cache = SessionCache(0)

    for _ in range(3):
        cache.get("a", openers["a"])
        gc.collect()

    assert openers["a"].num_calls == 3
    assert cache.resident_bytes == 0


def test_a_model_that_left_but_is_still_at_work_is_not_loaded_twice(openers):
    cache = SessionCache(0)

    at_work = cache.get("a", openers["a"])

    assert cache.get("a", openers["a"]) is at_work
    assert openers["a"].num_calls == 1


def test_the_least_recently_used_model_leaves_when_bytes_run_out(openers):
    size = openers["a"]().size_bytes
    cache = SessionCache(2 * size)

    for name in "abac":
        cache.get(name, openers[name])

    assert cache.digests() == ["a", "c"]
    assert cache.resident_bytes == 2 * size


def test_many_threads_open_a_model_once(openers):
    cache = SessionCache(10**9)
    start = threading.Barrier(8)
    found = []

    def ask():
        start.wait()
        found.append(cache.get("a", openers["a"]))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert openers["a"].num_calls == 1
    assert len({id(session) for session in found}) == 1


def test_a_failed_opening_is_tried_again(openers):
    cache = SessionCache(10**9)

    def fail():
        raise BundleError("bundle_corrupt", "x")

    with pytest.raises(BundleError):
        cache.get("a", fail)

    assert cache.get("a", openers["a"])
