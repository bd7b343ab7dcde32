"""Real allocation failures, in a child process whose address space is limited."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.session.memory import allocation_failure

ROOT = Path(__file__).parents[2]
CHILD = textwrap.dedent(
    """
    import json, re, resource, sys
    from pathlib import Path
    import numpy as np
    from models.bundle import BundleError
    from models.session import OUT_OF_MEMORY, SessionCache, give_memory_back, open_session
    from models.session.memory import resident_memory_bytes

    folder, extra_mib = Path(sys.argv[1]), int(sys.argv[2])
    cache = SessionCache(1 << 30)
    opener = lambda: open_session(folder, num_threads=1)
    window = np.ones((1, 1, 32, 32, 32), np.float32)
    expected = cache.get("a", opener).run(window)
    size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + (extra_mib << 20), -1))
    try:
        cache.get("a", opener).run(np.ones((16, 1, 32, 32, 32), np.float32))
        code = "none"
    except BundleError as error:
        code = error.code
    held = resident_memory_bytes()
    cache.drop("a")
    give_memory_back()
    given_back = held - resident_memory_bytes()
    again = cache.get("a", lambda: open_session(folder, num_threads=1, max_batch=1))
    parts = again.run(np.ones((16, 1, 32, 32, 32), np.float32))
    print(json.dumps({
        "code": code,
        "is_equal": bool((parts == expected).all()),
        "next": bool((again.run(window) == expected).all()),
        "loads": cache.num_loads,
        "given_back_mib": given_back >> 20,
    }))
    """
)


@pytest.fixture
def hungry(make_bundle):
    """Two convolutions with 32 channels between them: 4 MiB of work for a window of 32 cubed."""
    random = np.random.default_rng(0)
    weights = {
        "up": random.normal(size=(32, 1, 3, 3, 3)).astype(np.float32),
        "down": random.normal(size=(2, 32, 1, 1, 1)).astype(np.float32),
    }
    shape = ["batch", 1, "i", "j", "k"]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "up"], ["wide"], pads=[1] * 6),
            helper.make_node("Conv", ["wide", "down"], ["logits"]),
        ],
        "hungry",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, "i", "j", "k"])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return make_bundle(model, patch_size=(32, 32, 32))


def run_child(folder, extra_mib):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(extra_mib)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_batch_too_large_for_the_memory_is_told_and_the_next_request_succeeds(hungry):
    found = run_child(hungry, extra_mib=60)

    assert found["code"] == "host_out_of_memory"
    assert found["is_equal"] and found["next"]
    assert found["loads"] == 2
    assert found["given_back_mib"] >= 0


def test_with_enough_memory_the_same_batch_succeeds(hungry):
    assert run_child(hungry, extra_mib=2000)["code"] == "none"


@pytest.mark.parametrize(
    ("text", "is_gpu", "code"),
    [
        ("Failed to allocate memory for requested buffer of size 9", False, "host_out_of_memory"),
        ("Failed to allocate memory for requested buffer of size 9", True, "gpu_out_of_memory"),
        ("Available memory of 5 is smaller than requested bytes of 9", True, "gpu_out_of_memory"),
        ("CUDA failure 2: out of memory ; GPU=0", True, "gpu_out_of_memory"),
        ("CUDNN_STATUS_ALLOC_FAILED", True, "gpu_out_of_memory"),
        ("std::bad_alloc", True, "host_out_of_memory"),
        ("Non-zero status code returned while running Conv", True, None),
    ],
)
def test_an_allocation_failure_is_told_from_other_failures(text, is_gpu, code):
    assert allocation_failure(RuntimeError(text), is_gpu=is_gpu) == code


def test_pythons_own_failure_is_the_hosts():
    assert allocation_failure(MemoryError(), is_gpu=True) == "host_out_of_memory"
