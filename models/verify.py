"""Whether a bundle's ONNX file is what the manifest says: its bytes, and its own statements."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from models import bundle
from models.bundle import BundleError, Manifest, TensorSpec
from models.onnx_wire import has_external_data

_ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "uint8": "tensor(uint8)",
    "int64": "tensor(int64)",
}


def verified_model(bundle_dir: Path, manifest: Manifest, name: str = bundle.MODEL) -> bytes:
    """The model's bytes, whose digest was checked: no swap can come between check and load.

    Args:
        bundle_dir: The bundle's folder.
        manifest: Its manifest.
        name: `model.onnx` or `coarse.onnx`.

    Raises:
        BundleError: `bundle_corrupt`, `bundle_invalid` or `external_data`.
    """
    model = (bundle_dir / name).read_bytes()
    if hashlib.sha256(model).hexdigest() != manifest.files.get(name):
        raise BundleError("bundle_corrupt", f"{name} is not what was saved")
    try:
        external = has_external_data(model)
    except ValueError as error:
        raise BundleError("bundle_invalid", f"{name}: {error}") from error
    if external:
        raise BundleError("external_data", f"{name} wants tensors from other files")
    return model


def check_consistent(inference: Any, manifest: Manifest) -> None:
    """Hold the ONNX file's own statements against the manifest's.

    Args:
        inference: An onnxruntime.InferenceSession.
        manifest: Of the same bundle.

    Raises:
        BundleError: `bundle_inconsistent`, or `bundle_invalid` for a manifest without tensors.
    """
    if not manifest.inputs or not manifest.outputs:
        raise BundleError("bundle_invalid", "the manifest names no input or no output")
    for what, specs, nodes in (
        ("input", manifest.inputs, inference.get_inputs()),
        ("output", manifest.outputs, inference.get_outputs()),
    ):
        by_name = {node.name: node for node in nodes}
        if sorted(by_name) != sorted(spec.name for spec in specs):
            named = [spec.name for spec in specs]
            raise BundleError("bundle_inconsistent", f"{what}s are {[*by_name]}, not {named}")
        for spec in specs:
            _check_tensor(what, spec, by_name[spec.name])
    stated = inference.get_modelmeta().custom_metadata_map
    for key, expected in bundle.onnx_metadata(manifest).items():
        if stated.get(key, expected) != expected:
            raise BundleError("bundle_inconsistent", f"{key} in the ONNX file is {stated[key]!r}")


def _check_tensor(what: str, spec: TensorSpec, node: Any) -> None:
    fits = len(node.shape) == len(spec.shape) and all(
        found == expected
        for found, expected in zip(node.shape, spec.shape, strict=True)
        if isinstance(found, int) and isinstance(expected, int)
    )
    if not fits or node.type != _ONNX_TYPES[spec.dtype]:
        found = f"{node.type} {node.shape}"
        raise BundleError(
            "bundle_inconsistent", f"{what} {spec.name} is {found}, not {spec.dtype} {spec.shape}"
        )
