"""From a checkpoint to a bundle: ONNX, proven equal to torch before anything is published."""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor, nn

from models import bundle
from models.bundle import Lineage, Manifest, Metric, Parity, Quality, TensorSpec
from models.networks import resnet_unet2d, unet3d
from models.networks.encoder_alone import EncoderAlone
from models.networks.resnet_unet2d import ResNet18Encoder, ResNetUNet2d
from models.networks.unet3d import UNet3d, UNet3dEncoder, fold, pooled
from models.recipe import (
    AnyClassify,
    AnyPretrain,
    AnyRecipe,
    ClassifyRecipe,
    ClassifyRecipe2d,
    FinetuneRecipe,
    Postprocess,
    PretrainRecipe,
    PretrainRecipe2d,
    Recipe,
    Size,
    Size2d,
)
from trainer import half, reference
from trainer.build import build, norm_of, num_outputs
from trainer.card import card_text
from trainer.checkpoint import State
from trainer.data.scan_set import ScanFile
from trainer.errors import DataError, ParityError
from trainer.report import Report

OPSET = 20
TOLERANCE = 1e-3
"""Largest difference, as a part of the largest value of torch's answer where that is above 1."""
MIN_AGREEMENT = 0.9999
"""Of the argmax of logits, and the cosine of embeddings."""

Precision = Literal["float32", "float16"]
LIMITS: dict[Precision, tuple[float, float]] = {
    "float32": (TOLERANCE, MIN_AGREEMENT),
    "float16": (half.TOLERANCE, half.MIN_AGREEMENT),
}

_RECIPE: TypeAdapter[AnyRecipe] = TypeAdapter(Recipe)
STRIDES = {2: resnet_unet2d.STRIDE, 3: unet3d.STRIDE}
"""Pixels or voxels of which every extent is a multiple, by the network's axes."""
AXES = {2: ("r32", "c32"), 3: ("i8", "j8", "k8")}
"""Free dimensions of the ONNX file: the extents divided by that."""
_COLOURS = ("red", "green", "blue")


class PooledEncoder(nn.Module):
    """The served embedding: the bottleneck pooled, before any head."""

    def __init__(self, encoder: UNet3dEncoder | ResNet18Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, I, J, K) to (B, 16 W), or (B, 3, I, J) to (B, 8 W); not normalised."""
        return pooled(self.encoder(image).bottleneck)


class MappedEncoder(nn.Module):
    """The served embedding of a 3D encoder, and the map that it is the mean of."""

    def __init__(self, encoder: UNet3dEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, I, J, K) to (B, 16 W) and (B, 16 W, I/8, J/8, K/8); not normalised."""
        features = self.encoder(image).bottleneck
        return pooled(features), features


class WithFeatures(nn.Module):
    """A segmenter that also tells what its encoder made of the window, for `models.features`."""

    def __init__(self, unet: UNet3d) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, I, J, K) to logits (B, L, I, J, K) and the pooled bottleneck (B, 16 W)."""
        features = self.unet.encoder(image)
        logits: Tensor = self.unet.out(self.unet.decoder(features))
        return logits, pooled(features.bottleneck)


def publish(
    state: State,
    folder: Path,
    report: Report,
    scans: Sequence[ScanFile] = (),
    *,
    device: torch.device | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Path:
    """Export a checkpoint's network, prove it, and publish its bundle.

    Args:
        state: A checkpoint of `trainer.pretrain` or `trainer.finetune`.
        folder: Where the bundle will be; must not exist.
        report: Told of the result.
        scans: Those of training, which the bundle's reference is made of; without them it has none.
        device: Where the exported network runs over them; the CPU if None.
        should_stop: Asked meanwhile.

    Raises:
        DataError: `bundle_exists`.
        ParityError: ONNX and torch disagree; nothing is left behind.
        Preempted: `should_stop` turned true; nothing is left behind.
    """
    if folder.exists():
        raise DataError("bundle_exists", "there is a bundle at the output already")
    recipe = _RECIPE.validate_json(state["recipe"])
    network = restore(state, recipe)
    served = network
    if isinstance(recipe, PretrainRecipe | PretrainRecipe2d):
        assert isinstance(network, UNet3d | ResNetUNet2d | EncoderAlone)
        encoder = network.encoder
        if isinstance(encoder, UNet3dEncoder):
            served = MappedEncoder(encoder)
        else:
            served = PooledEncoder(encoder)
    written = served.eval()
    if isinstance(served, UNet3d):
        written, served = WithFeatures(fold(served)), WithFeatures(served)
    manifest = _describe(state, recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    report.progress("export", 0, 1)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        model = Path(scratch) / bundle.MODEL
        to_onnx(written, model, manifest, _facts(manifest, state))
        parity = check_parity(served, model, state["sample"].float(), manifest)
        manifest = manifest.model_copy(update={"parity": parity})
        weights = Path(scratch) / bundle.WEIGHTS
        tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
        facts: dict[str, str] = {"norm": norm_of(recipe), "network": recipe.network.kind}
        save_file(tensors, weights, metadata=facts)
        files = {bundle.MODEL: model, bundle.WEIGHTS: weights}
        if parity:  # what is not proven in float32 is not tried in float16
            small = Path(scratch) / bundle.MODEL_FLOAT16
            half.write_float16(model, small)
            proof = _measure(served, small, state["sample"].float(), manifest, "float16")
            if all(one.passed for one in proof):
                files[bundle.MODEL_FLOAT16] = small
                manifest = manifest.model_copy(update={"parity": (*parity, *proof)})
        if parity and scans:
            draft = Path(scratch) / "draft"
            bundle.save(draft, manifest, {bundle.MODEL: model}, "")
            kept = Path(scratch) / bundle.REFERENCE
            known = reference.of_scans(
                draft,
                scans,
                kept,
                report,
                device=device or torch.device("cpu"),
                num_steps=state["step"],
                should_stop=should_stop,
            )
            manifest = manifest.model_copy(update={"reference": known})
            if known is not None and known.has_file:
                files[bundle.REFERENCE] = kept
        digest = bundle.save(folder, manifest, files, card_text(manifest))
    report.progress("export", 1, 1)
    report.result(folder.name, digest)
    return folder


def restore(state: State, recipe: AnyRecipe) -> nn.Module:
    """The checkpoint's network on the host, unfused: what parity is judged against."""
    network = build(recipe, fused=False)
    if isinstance(recipe, PretrainRecipe | PretrainRecipe2d):
        prefix = "student."
        method: dict[str, Tensor] = state["method"]
        weights = {k.removeprefix(prefix): v for k, v in method.items() if k.startswith(prefix)}
    else:
        weights = state["network"]
    network.load_state_dict(weights)
    return network


def to_onnx(network: nn.Module, path: Path, manifest: Manifest, facts: dict[str, str]) -> None:
    """Write a network as one ONNX file with free batch and spatial dimensions.

    Args:
        network: Takes (B, C, I, J, K) or (B, C, I, J), in eval mode.
        path: The file to write.
        manifest: Says what it takes and gives.
        facts: Go into the model's metadata.
    """
    num_axes = len(manifest.patch_size)
    stride = STRIDES[num_axes]
    # Batch 2: a tracer may take a dimension of size 1 for a constant.
    extents = (4 * stride, 3 * stride, 2 * stride)[:num_axes]
    example = torch.zeros(2, len(manifest.channels), *extents)
    free = {
        tensor.name: {
            axis: f"axis{axis}" for axis, size in enumerate(tensor.shape) if isinstance(size, str)
        }
        for tensor in (*manifest.inputs, *manifest.outputs)
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is the older exporter: ADR 0015
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in manifest.inputs],
            output_names=[tensor.name for tensor in manifest.outputs],
            dynamic_axes=free,
        )
    model = onnx.load(path)
    for value, tensor in zip(
        (*model.graph.input, *model.graph.output),
        (*manifest.inputs, *manifest.outputs),
        strict=True,
    ):
        for dim, size in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
            if isinstance(size, str):
                dim.dim_param = size
    del model.graph.value_info[:]  # inferred with the tracer's names; the checker infers anew
    for node in model.graph.node:
        node.doc_string = ""
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def check_parity(
    network: nn.Module, model: Path, real: Tensor, manifest: Manifest
) -> tuple[Parity, ...]:
    """Compare torch and onnxruntime on random and on real input.

    Raises:
        ParityError: Beyond the tolerance.
    """
    found = _measure(network, model, real, manifest, "float32")
    bad = [parity for parity in found if not parity.passed]
    if bad:
        shown = "; ".join(
            f"{p.input_kind}: max difference {p.max_abs_difference:.3g} of {p.tolerance:.3g}"
            f", argmax agreement {p.argmax_agreement}, cosine {p.embedding_cosine}"
            for p in bad
        )
        raise ParityError(f"onnxruntime and torch disagree: {shown}")
    return found


def _measure(
    network: nn.Module, model: Path, real: Tensor, manifest: Manifest, precision: Precision
) -> tuple[Parity, ...]:
    """How far an ONNX file is from torch, on the CPU.

    The random input has another batch and other extents than the example of the export.
    """
    num_axes = len(manifest.patch_size)
    extents = [times * STRIDES[num_axes] for times in (2, 3, 4)[:num_axes]]
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(3, len(manifest.channels), *extents, generator=generator)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found = []
    for kind, image in (("random", random), ("real", real)):
        with torch.inference_mode():
            answer = network(image)
        expected = [one.numpy() for one in (answer if isinstance(answer, tuple) else (answer,))]
        actual = session.run(None, {"image": image.numpy()})
        shape = tuple(image.shape)
        found.append(_compare(expected, actual, manifest, kind, shape, precision=precision))
    return tuple(found)


def _compare(
    all_expected: Sequence[NDArray[np.float32]],
    all_actual: Sequence[NDArray[np.float32]],
    manifest: Manifest,
    kind: str,
    shape: tuple[int, ...],
    *,
    precision: Precision,
) -> Parity:
    """Of all outputs: of the first everything, of features and their map the cosine."""
    allowed, least = LIMITS[precision]
    expected, actual = all_expected[0], all_actual[0]
    tolerance = allowed * max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(expected - actual).max())
    agreement = cosine = None
    if manifest.kind == "segmenter" and manifest.activation == "softmax":
        agreement = float((expected.argmax(axis=1) == actual.argmax(axis=1)).mean())
    elif manifest.kind == "segmenter":
        agreement = float(((expected > 0) == (actual > 0)).mean())
    elif manifest.kind == "encoder":
        cosine = _least_cosine(expected, actual)
    if len(all_expected) > 1:
        other = _least_cosine(all_expected[1], all_actual[1])
        cosine = other if cosine is None else min(cosine, other)
    # Of a classifier's few logits the difference says all that there is to say.
    worst = min((value for value in (agreement, cosine) if value is not None), default=1.0)
    return Parity(
        input_kind="random" if kind == "random" else "real",
        shape=shape,
        provider="CPUExecutionProvider",
        max_abs_difference=difference,
        tolerance=tolerance,
        argmax_agreement=agreement,
        embedding_cosine=cosine,
        precision=precision,
        # NaN compares false, so it fails too.
        passed=bool(difference <= tolerance and worst >= least),
    )


def _least_cosine(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    """Of the pairs of rows of (B, E); a map (B, E, i, j, k) is a row of all its numbers."""
    expected, actual = expected.reshape(len(expected), -1), actual.reshape(len(actual), -1)
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    return float(((expected * actual).sum(axis=1) / np.maximum(lengths, 1e-30)).min())


def _describe(state: State, recipe: AnyRecipe) -> Manifest:
    num_axes = recipe.network.dims
    spatial = tuple(f"{STRIDES[num_axes]}*{name}" for name in AXES[num_axes])
    lineage = Lineage(
        run_id=state["run_id"] or None,
        dataset_digest=state["data_digest"],
        parent_digest=state.get("parent_digest") or None,
        loaded_keys=tuple(state.get("loaded_keys", ())),
        skipped_keys=tuple(state.get("skipped_keys", ())),
        seed=recipe.seed,
        num_steps=state["step"],
        code_version=_code_version(),
        torch_version=torch.__version__,
    )
    channels: tuple[str, ...] = ("image",) if num_axes == 3 else _COLOURS
    labels: tuple[str, ...] = ()
    more: tuple[TensorSpec, ...] = ()
    overlap, activation = 0.5, "softmax"
    postprocess = Postprocess()
    match recipe:
        case PretrainRecipe() | PretrainRecipe2d():
            kind, patch = "encoder", _patch_of(recipe)
            features = recipe.network.num_features
            output = TensorSpec(name="embedding", shape=("batch", features))
            if num_axes == 3:
                cells = ("batch", features, *AXES[3])
                more = (TensorSpec(name=bundle.FEATURE_MAP, shape=cells),)
        case FinetuneRecipe():
            kind, labels, patch = "segmenter", recipe.targets, recipe.patch_size
            overlap, channels = recipe.overlap, recipe.channels
            postprocess = recipe.postprocess
            activation = "softmax" if recipe.labels else "sigmoid"
            output = TensorSpec(name="logits", shape=("batch", num_outputs(recipe), *spatial))
            more = (TensorSpec(name=bundle.FEATURES, shape=("batch", recipe.network.num_features)),)
        case ClassifyRecipe() | ClassifyRecipe2d():
            kind, labels, patch = "classifier", recipe.labels, _patch_of(recipe)
            channels = recipe.channels if isinstance(recipe, ClassifyRecipe) else _COLOURS
            activation = "softmax" if recipe.exclusive else "sigmoid"
            output = TensorSpec(name="logits", shape=("batch", num_outputs(recipe)))
    metrics = {
        name: Metric.model_validate(value) for name, value in state.get("metrics", {}).items()
    }
    return Manifest(
        kind=kind,
        labels=labels,
        activation=activation,
        channels=channels,
        inputs=(TensorSpec(name="image", shape=("batch", len(channels), *spatial)),),
        outputs=(output, *more),
        preprocessing=recipe.preprocessing,
        patch_size=patch,
        overlap=overlap,
        postprocess=postprocess,
        quality=Quality.model_validate(state["quality"]) if "quality" in state else None,
        recipe=recipe,
        lineage=lineage,
        metrics=metrics,
        parity=(),
        created_at=datetime.now(UTC),
    )


def _patch_of(recipe: AnyPretrain | AnyClassify) -> Size | Size2d:
    """What is served at once: a crop, a cube, or a whole 2D image."""
    match recipe:
        case PretrainRecipe():
            return recipe.crops.input_size
        case ClassifyRecipe():
            return recipe.input_size
        case _:
            return recipe.preprocessing.size, recipe.preprocessing.size


def _facts(manifest: Manifest, state: State) -> dict[str, str]:
    """What the ONNX file says of itself: what a session checks, and where it comes from."""
    return {
        **bundle.onnx_metadata(manifest),
        "stride": str(STRIDES[len(manifest.patch_size)]),
        "run_id": manifest.lineage.run_id or "",
        "dataset_digest": manifest.lineage.dataset_digest,
        "recipe_digest": state["recipe_digest"],
        "code_version": manifest.lineage.code_version,
        "intended_use": manifest.intended_use,
    }


def _code_version() -> str:
    try:
        return importlib.metadata.version("pcrl")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "checkout"
