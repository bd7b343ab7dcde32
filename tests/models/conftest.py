"""Bundles with real, tiny ONNX networks, built with onnx.helper."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import bundle
from models.bundle import Lineage, Manifest, TensorSpec
from models.recipe import FinetuneRecipe, Postprocess, Preprocessing, PretrainRecipe, Window

SHAPE = ["batch", 1, "i", "j", "k"]
WINDOW_01 = Preprocessing(intensity=Window(low_hu=0.0, high_hu=1000.0))
"""1 mm; 0 HU is 0, 1000 HU is 1."""

MakeBundle = Callable[..., Path]


def conv_model(weight: np.ndarray, bias: np.ndarray, output: str = "logits") -> onnx.ModelProto:
    """One convolution with "same" padding; (C, 1, n, n, n) weights."""
    margin = weight.shape[-1] // 2
    node = helper.make_node(
        "Conv", ["image", "weight", "bias"], ["logits"], pads=[margin] * 6, name="conv"
    )
    nodes, out_shape = [node], ["batch", len(bias), "i", "j", "k"]
    if output == "embedding":
        nodes.append(helper.make_node("GlobalAveragePool", ["logits"], ["pooled"]))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["embedding"], axis=1))
        out_shape = ["batch", len(bias)]
    return _model(nodes, output, out_shape, {"weight": weight, "bias": bias})


def endless_model() -> onnx.ModelProto:
    """Adds one to the image 2^60 times."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["state", "one"], ["next"]),
            helper.make_node("Identity", ["going_on"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    nodes = [
        helper.make_node("Loop", ["trips", "", "image"], ["final"], body=body),
        helper.make_node("Concat", ["final", "final"], ["logits"], axis=1),
    ]
    trips = np.array(2**60, dtype=np.int64)
    return _model(nodes, "logits", ["batch", 2, "i", "j", "k"], {"trips": trips})


def threshold_model(num_classes: int = 2, at: float = 0.5) -> onnx.ModelProto:
    """Class 1 where the input is above `at`, background elsewhere; further classes never."""
    weight = np.zeros((num_classes, 1, 1, 1, 1), np.float32)
    bias = np.full(num_classes, -10.0, np.float32)
    weight[:2, 0, 0, 0, 0] = -1.0, 1.0
    bias[:2] = at, -at
    return conv_model(weight, bias)


def random_conv(num_channels: int, *, seed: int = 0, output: str = "logits") -> onnx.ModelProto:
    """A 3x3x3 convolution with random weights: what a window gives depends on its border."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(num_channels, 1, 3, 3, 3)).astype(np.float32)
    return conv_model(weight, rng.normal(size=num_channels).astype(np.float32), output)


def _model(
    nodes: list[Any], output: str, out_shape: list[Any], weights: dict[str, np.ndarray]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, out_shape)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def encoder_with_map() -> onnx.ModelProto:
    """A random convolution, means over cells of 8 voxels, and the mean of those."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(5, 1, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["seen"], pads=[1] * 6),
        helper.make_node("Tanh", ["seen"], ["bent"]),
        helper.make_node(
            "AveragePool", ["bent"], ["feature_map"], kernel_shape=[8] * 3, strides=[8] * 3
        ),
        helper.make_node("GlobalAveragePool", ["feature_map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, "i", "j", "k"])],
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 5]),
            helper.make_tensor_value_info(
                "feature_map", TensorProto.FLOAT, ["batch", 5, "a", "b", "c"]
            ),
        ],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Save a model as a bundle; returns its folder."""
    count = 0

    def make(
        model: onnx.ModelProto,
        *,
        labels: tuple[str, ...] = ("organ",),
        patch_size: tuple[int, int, int] = (16, 16, 8),
        overlap: float = 0.5,
        preprocessing: Preprocessing = WINDOW_01,
        postprocess: Postprocess | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Path:
        nonlocal count
        count += 1
        output = model.graph.output[0]
        is_encoder = output.name == "embedding"
        manifest = Manifest(
            kind="encoder" if is_encoder else "segmenter",
            labels=() if is_encoder else labels,
            inputs=(TensorSpec(name="image", shape=("batch", 1, "i", "j", "k")),),
            outputs=tuple(
                TensorSpec(
                    name=one.name,
                    shape=tuple(
                        dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim
                    ),
                )
                for one in model.graph.output
            ),
            preprocessing=preprocessing,
            patch_size=patch_size,
            overlap=overlap,
            postprocess=postprocess or Postprocess(),
            recipe=PretrainRecipe() if is_encoder else FinetuneRecipe(labels={"organ": 1}),
            lineage=Lineage(
                dataset_digest="0" * 64, seed=0, num_steps=1, code_version="test", torch_version=""
            ),
            parity=(),
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
        facts = bundle.onnx_metadata(manifest) | (metadata or {})
        for key, value in facts.items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value
        source = tmp_path / f"source{count}.onnx"
        onnx.save(model, source)
        folder = tmp_path / f"bundle{count}"
        bundle.save(folder, manifest, {bundle.MODEL: source}, "# A test model\n")
        return folder

    return make


@pytest.fixture
def random_conv_model() -> onnx.ModelProto:
    """Three classes from a random 3x3x3 convolution."""
    return random_conv(3)


@pytest.fixture
def random_encoder() -> onnx.ModelProto:
    """An embedding of five numbers."""
    return random_conv(5, output="embedding")


@pytest.fixture
def mapped_encoder() -> onnx.ModelProto:
    """See `encoder_with_map`."""
    return encoder_with_map()


@pytest.fixture
def thresholds() -> Callable[..., onnx.ModelProto]:
    """See `threshold_model`."""
    return threshold_model


@pytest.fixture
def endless() -> onnx.ModelProto:
    """See `endless_model`."""
    return endless_model()
