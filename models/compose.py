"""Make a cascade of registered models: a bundle of two passes out of one or two of one pass.

Nothing is trained and no network is changed: the fine bundle's files are taken as they are, its
ONNX file gets the cascade's facts into its metadata, and a coarse network comes in as a second
ONNX file with its preprocessing, patch and parity in the manifest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from models import bundle
from models.bundle import BundleError, Cascade, CoarseNetwork, Manifest, volume_input
from models.onnx_wire import with_metadata
from models.recipe import FinetuneRecipe, SpacingMm
from models.verify import verified_model

COARSE_SPACING_MM = 4.0
MARGIN_MM = 15.0
_LEFT = (bundle.CARD, bundle.REFERENCE)
"""Files of the fine bundle that are not taken over: what is measured there is of whole scans."""


def compose(
    out: Path,
    fine: Path,
    coarse: Path | None = None,
    *,
    organ: str,
    parts: Sequence[str] | None = None,
    margin_mm: float | None = None,
    coarse_spacing_mm: float | None = None,
    min_organ_ml: float = 1.0,
) -> str:
    """Publish a cascade at `out`.

    Args:
        out: Where the bundle will be; must not exist.
        fine: Bundle of the network that makes the mask.
        coarse: Bundle of the network that finds the organ, at its own spacing; None: the fine one
            finds it, at `coarse_spacing_mm`.
        organ: A label of the network that finds it.
        parts: Labels that lie in it and count as it; those of that model's `postprocess` if None.
        margin_mm: Around the organ's box. If None, what the fine network saw in training (`crop`
            of its recipe, on the axis with most), else 15 mm.
        coarse_spacing_mm: 4 mm if None; not together with `coarse`.
        min_organ_ml: An organ smaller than this counts as not found.

    Returns:
        The bundle's digest.

    Raises:
        BundleError: `wrong_model_kind` for models that make no cascade, `bundle_invalid` or
            `bundle_corrupt`.
        ValueError: Arguments that do not go together, or an unknown label.
    """
    manifest = bundle.load(fine)
    _require_one_pass(manifest, "fine")
    finder = manifest if coarse is None else bundle.load(coarse)
    _require_one_pass(finder, "coarse")
    if coarse is not None and coarse_spacing_mm is not None:
        raise ValueError("coarse has a spacing of its own; leave coarse_spacing_mm out")
    spec, patch = volume_input(finder)
    spacing: SpacingMm = spec.spacing_mm
    network = None
    if coarse is None:
        size = COARSE_SPACING_MM if coarse_spacing_mm is None else coarse_spacing_mm
        spacing = (size, size, size)
    else:
        network = CoarseNetwork(
            bundle_digest=bundle.digest_of(coarse),
            labels=finder.labels,
            inputs=finder.inputs,
            outputs=finder.outputs,
            preprocessing=spec,
            patch_size=patch,
            overlap=finder.overlap,
            parity=tuple(one for one in finder.parity if one.precision == "float32"),
        )
    try:
        cascade = Cascade(
            organ=organ,
            parts=tuple(finder.postprocess.parts.get(organ, ()) if parts is None else parts),
            margin_mm=_margin_mm(manifest) if margin_mm is None else margin_mm,
            coarse_spacing_mm=spacing,
            min_organ_ml=min_organ_ml,
            fine_digest=bundle.digest_of(fine),
            coarse=network,
        )
        made = Manifest.model_validate(
            {
                **_fields(manifest),
                "reference": None,
                "cascade": cascade,
                "created_at": datetime.now(UTC),
                "files": {},
            }
        )
    except ValidationError as error:
        raise ValueError("; ".join(found["msg"] for found in error.errors())) from error
    facts = {"cascade": bundle.onnx_metadata(made)["cascade"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compose-", dir=out.parent) as scratch:
        files = {name: fine / name for name in manifest.files if name not in _LEFT}
        for name in (bundle.MODEL, bundle.MODEL_FLOAT16):
            if name in files:
                files[name] = Path(scratch) / name
                files[name].write_bytes(with_metadata(verified_model(fine, manifest, name), facts))
        if coarse is not None:
            files[bundle.COARSE] = Path(scratch) / bundle.COARSE
            files[bundle.COARSE].write_bytes(verified_model(coarse, finder))
        card = (fine / bundle.CARD).read_text(encoding="utf-8") if _has_card(manifest) else ""
        return bundle.save(out, made, files, card + card_section(cascade))


def card_section(cascade: Cascade) -> str:
    """What the card says of the cascade, in Markdown."""
    by = (
        "the same network" if cascade.coarse is None else f"bundle `{cascade.coarse.bundle_digest}`"
    )
    spacing = " x ".join(f"{size:g}" for size in cascade.coarse_spacing_mm)
    inside = f" ({', '.join(cascade.parts)} counts as it)" if cascade.parts else ""
    return "\n".join(
        [
            "",
            "## Cascade",
            "",
            f"- {cascade.organ}{inside} is looked for at {spacing} mm by {by}; below "
            f"{cascade.min_organ_ml:g} ml it counts as not found, and the whole scan is looked at.",
            f"- The mask is made in its box with {cascade.margin_mm:g} mm on each side, by bundle "
            f"`{cascade.fine_digest}`; what was measured above was measured without the cascade.",
            "- A box is no scan: there is no distance from the training scans.",
            "",
        ]
    )


def _require_one_pass(manifest: Manifest, role: str) -> None:
    """A cascade's passes are segmenters of one image with exclusive labels, and no cascades."""
    fits = (
        manifest.kind == "segmenter"
        and manifest.activation == "softmax"
        and len(manifest.channels) == 1
        and len(manifest.patch_size) == 3
    )
    if not fits:
        raise BundleError(
            "wrong_model_kind", f"{role} must segment a volume of one image, one label a voxel"
        )
    if manifest.cascade is not None:
        raise BundleError(
            "wrong_model_kind", f"{role} is a cascade itself; take the version it was made of"
        )


def _margin_mm(manifest: Manifest) -> float:
    """What the fine network was trained to see around its organ, where that is known."""
    recipe = manifest.recipe
    if isinstance(recipe, FinetuneRecipe) and recipe.crop is not None:
        return recipe.crop.margin_voxels * max(recipe.preprocessing.spacing_mm)
    return MARGIN_MM


def _fields(manifest: Manifest) -> dict[str, object]:
    return {name: getattr(manifest, name) for name in Manifest.model_fields}


def _has_card(manifest: Manifest) -> bool:
    return bundle.CARD in manifest.files
