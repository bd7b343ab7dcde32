import numpy as np
import onnxruntime
import pytest

from models.bundle import BundleError
from models.session import CPU, CUDA, OPENVINO, TENSORRT, ProviderOptions, open_session
from models.session.binding import MAX_SHAPES, Bound
from models.session.providers import Device, parse_device, provider_list

IMAGE = np.full((1, 1, 16, 16, 8), 0.75, np.float32)


@pytest.fixture
def folder(make_bundle, thresholds):
    return make_bundle(thresholds())


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Device(CPU)),
        ("openvino", Device(OPENVINO)),
        ("cuda", Device(CUDA)),
        ("cuda:3", Device(CUDA, 3)),
        ("tensorrt:1", Device(TENSORRT, 1)),
    ],
)
def test_a_device_names_a_provider(text, device):
    assert parse_device(text) == device


@pytest.mark.parametrize("device", ["openvino", "cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_refused_unless_the_cpu_may_stand_in(folder, device):
    if parse_device(device).provider in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")

    with pytest.raises(BundleError) as caught:
        open_session(folder, device=device)
    instead = open_session(folder, device=device, cpu_fallback=True)

    assert caught.value.code == "provider_unavailable"
    assert instead.provider == CPU
    assert instead.fell_back_from == parse_device(device).provider
    assert open_session(folder, device="cpu", cpu_fallback=True).fell_back_from is None


def test_the_fallback_hides_no_other_fault(folder):
    with pytest.raises(BundleError, match="bundle_corrupt"):
        open_session(folder, device="cuda", cpu_fallback=True, digest="0" * 64)


def test_tensorrt_keeps_its_engines_under_the_bundles_digest(tmp_path):
    options = ProviderOptions(engine_cache_dir=tmp_path, gpu_mem_limit_bytes=5)

    (name, tensorrt), (_, cuda), last = provider_list(Device(TENSORRT, 2), options, "abc")

    assert name == TENSORRT and last == CPU
    assert tensorrt["trt_engine_cache_path"] == str(tmp_path / "abc")
    assert (tmp_path / "abc").is_dir()
    assert tensorrt["device_id"] == cuda["device_id"] == 2
    assert cuda["gpu_mem_limit"] == 5


def test_openvino_computes_in_float32():
    (_, openvino), _ = provider_list(Device(OPENVINO), ProviderOptions(num_threads=3), "abc")

    assert openvino == {"device_type": "CPU", "precision": "FP32", "num_of_threads": 3}


@pytest.mark.parametrize("other", ["onnxruntime-gpu", "onnxruntime-openvino"])
def test_every_pair_of_distributions_is_a_conflict(folder, tmp_path, monkeypatch, other):
    open_session(folder)  # one is fine
    for name in ("onnxruntime", other):
        info = tmp_path / f"{name.replace('-', '_')}-1.31.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(BundleError, match="runtime_conflict"):
        open_session(folder)


def test_bound_buffers_are_reused_and_their_answers_are_copies(random_conv_model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    inference = onnxruntime.InferenceSession(
        random_conv_model.SerializeToString(), options, providers=[CPU]
    )
    bound = Bound(inference, device="cpu", number=0, input_name="image", output_names=["logits"])
    random = np.random.default_rng(0)
    batches = [random.normal(size=(n, 1, 8, 8, 8)).astype(np.float32) for n in (2, 2, 1, 3, 2)]

    found = [bound.run(batch, onnxruntime.RunOptions())[0] for batch in batches]

    for batch, answer in zip(batches, found, strict=True):  # also the first, after its reuse
        np.testing.assert_array_equal(answer, inference.run(None, {"image": batch})[0])
    assert not np.array_equal(found[0], found[1])
    assert len(bound._buffers) == MAX_SHAPES
    bound.forget()
    assert len(bound._buffers) == 0


def test_a_larger_batch_than_allowed_is_run_in_parts(make_bundle, random_conv_model):
    folder = make_bundle(random_conv_model, labels=("a", "b"))
    whole, parts = open_session(folder), open_session(folder, max_batch=2)
    batch = np.random.default_rng(0).normal(size=(5, 1, 16, 16, 8)).astype(np.float32)

    expected, found = whole.run(batch), parts.run(batch, release_memory=True)

    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (whole.num_runs, parts.num_runs) == (1, 3)


def test_a_warmed_model_knows_what_it_costs(folder):
    session = open_session(folder)

    assert session.resident_bytes == session.size_bytes
    assert session.warm_up() >= 0.0
    assert session.num_runs == 1
    assert session.resident_bytes >= session.size_bytes
