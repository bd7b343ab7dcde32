"""The model card: a bundle's manifest, for a reader."""

from __future__ import annotations

from models.bundle import Manifest
from models.recipe import (
    AnyClassify,
    FinetuneRecipe,
    OwnRange,
    Preprocessing2d,
    PretrainRecipe,
    PretrainRecipe2d,
    UNet3d,
    Window,
)


def card_text(manifest: Manifest) -> str:
    """What the model is, what it wants, how good it is, and where it comes from, in Markdown."""
    return "\n".join(
        [
            f"# {_title(manifest)}",
            "",
            f"**{manifest.intended_use.capitalize()}.**",
            "",
            *_input_lines(manifest),
            "",
            *_result_lines(manifest),
            "",
            *_origin_lines(manifest),
            "",
            *_parity_lines(manifest),
            "",
        ]
    )


def _title(manifest: Manifest) -> str:
    recipe, network = manifest.recipe, manifest.recipe.network
    if isinstance(network, UNet3d):
        made = f"3D U-Net, base width {network.base_width}"
    else:
        made = f"2D U-Net on a ResNet-18, width {network.width}"
    if isinstance(recipe, PretrainRecipe | PretrainRecipe2d):
        return f"Encoder: {made}, pretrained with {recipe.method.TITLE}"
    what = "Classifier" if manifest.kind == "classifier" else "Segmenter"
    return f"{what} of {', '.join(manifest.labels)}: {made}"


def _input_lines(manifest: Manifest) -> list[str]:
    spec = manifest.preprocessing
    if isinstance(spec, Preprocessing2d):
        return _image_lines(spec, manifest)
    spacing = " x ".join(f"{size:g}" for size in spec.spacing_mm)
    if isinstance(spec.intensity, Window):
        low, high = spec.intensity.low_hu, spec.intensity.high_hu
        scale = f"{low:g} to {high:g} HU, scaled to 0..1 and clipped"
    else:
        scale = "zero mean and unit deviation over the non-zero voxels"
    patch = " x ".join(str(size) for size in manifest.patch_size)
    num_channels = len(manifest.channels)
    read = f" ({', '.join(manifest.channels)})" if num_channels > 1 else ""
    return [
        "## Input and output",
        "",
        f"- Volume in {spec.orientation}+ at {spacing} mm; intensities {scale}.",
        f"- `image` (batch, {num_channels}, I, J, K){read}, patches of {patch} voxels; "
        "I, J, K multiples of 8.",
        _output_line(manifest),
        *_mask_lines(manifest),
        *_quality_lines(manifest),
    ]


def _quality_lines(manifest: Manifest) -> list[str]:
    """When serving flags a scan or calls it unlike those of training, where it does."""
    quality, recipe, known = manifest.quality, manifest.recipe, manifest.reference
    lines = []
    if known is not None and known.threshold is not None:
        how = "Mahalanobis, with a shrunk covariance"
        if known.method == "cosine":
            how = f"one minus the mean cosine to the {known.num_neighbours} nearest"
        lines.append(
            f"- A scan is out of distribution where its {known.space} lies further than "
            f"{known.threshold:.3g} ({how}) from those of {known.num_scans} training scans; "
            f"the threshold is the {known.quantile:g} quantile of their own distances."
        )
    elif known is not None:
        lines.append(
            f"- {known.num_scans} training scans are too few to tell whether a scan is like them."
        )
    if isinstance(recipe, FinetuneRecipe) and recipe.crop is not None:
        around = ", ".join(recipe.crop.labels or recipe.targets)
        lines.append(
            f"- Trained and measured on the box of {around} with {recipe.crop.margin_voxels} "
            "voxels on each side, where the truth has it: to be served behind a model that finds "
            "it (a cascade)."
        )
    if quality is not None:
        lines.append(
            f"- A scan is to be reviewed where the mean entropy of what is labelled is above "
            f"{quality.max_foreground_entropy:.3f}: the highest among {quality.num_good} of "
            f"{quality.num_cases} {quality.split} scans with a mean Dice of {quality.min_dice:g} "
            "at least."
        )
    return lines


def _mask_lines(manifest: Manifest) -> list[str]:
    """What serving does to the mask, where it does something."""
    asked = manifest.postprocess
    steps = [
        f"{what} of {', '.join(names)}"
        for what, names in (
            ("largest component", asked.keep_largest),
            ("holes filled", asked.fill_holes),
            ("lesions counted", asked.lesions),
        )
        if names
    ]
    inside = "; ".join(
        f"{', '.join(parts)} counts as {name}" for name, parts in asked.parts.items()
    )
    if not steps:
        return []
    return [f"- Mask: {'; '.join(steps)}{f' ({inside})' if inside else ''}."]


def _image_lines(spec: Preprocessing2d, manifest: Manifest) -> list[str]:
    if isinstance(spec.intensity, OwnRange):
        limits = "each image's own range"
    else:
        limits = f"percentiles {spec.intensity.low:g} to {spec.intensity.high:g} of each image"
    scale = f"{limits} scaled to 0..1"
    if spec.normalisation is not None:
        means, deviations = (
            ", ".join(f"{value:g}" for value in values)
            for values in (spec.normalisation.mean, spec.normalisation.std)
        )
        scale += f", then means {means} taken off and divided by {deviations}"
    return [
        "## Input and output",
        "",
        f"- Grey 2D image stretched to {spec.size} x {spec.size} pixels; {scale}.",
        "- `image` (batch, 3, rows, columns), the grey image three times; rows and columns "
        "multiples of 32.",
        _output_line(manifest),
    ]


def _output_line(manifest: Manifest) -> str:
    makes = "" if manifest.kind == "encoder" else f"; {manifest.activation} makes probabilities"
    return f"- `{manifest.outputs[0].name}` {list(manifest.outputs[0].shape)}{makes}."


def _result_lines(manifest: Manifest) -> list[str]:
    lines = ["## Measured", ""]
    if not manifest.metrics:
        return [*lines, "Nothing: an encoder is judged by what is fine-tuned from it."]
    rows = [
        f"| {name} | {metric.value:.4f} | {metric.n} | {metric.split} |"
        for name, metric in manifest.metrics.items()
    ]
    chosen_on = "train" if any(m.split == "train" for m in manifest.metrics.values()) else "val"
    note = (
        f"The checkpoint was chosen by its values on {chosen_on}, so those are optimistic; the "
        "test scans were looked at once, after the choice."
        if any(metric.split == "test" for metric in manifest.metrics.values())
        else f"The checkpoint was chosen on {chosen_on} itself, so the values are optimistic."
    )
    return [
        *lines,
        "| metric | value | cases | split |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        note,
    ]


def _origin_lines(manifest: Manifest) -> list[str]:
    lineage = manifest.lineage
    lines = [
        "## Origin",
        "",
        f"- Data set `{lineage.dataset_digest}`, seed {lineage.seed}, {lineage.num_steps} steps.",
        f"- Recipe `{manifest.recipe.digest()}`, in full in `manifest.json`.",
        f"- Code {lineage.code_version}, torch {lineage.torch_version}.",
    ]
    recipe = manifest.recipe
    if isinstance(recipe, FinetuneRecipe | AnyClassify) and recipe.labelled.ratio < 1.0:
        lines.append(
            f"- Trained on {recipe.labelled.ratio:.3g} of the labelled training patients, chosen "
            f"by seed {recipe.labelled.seed}."
        )
    if lineage.parent_digest is not None:
        lines.append(
            f"- Started from bundle `{lineage.parent_digest}`: {len(lineage.loaded_keys)} tensors "
            f"taken over, {len(lineage.skipped_keys)} not (both listed in `manifest.json`)."
        )
    return lines


def _parity_lines(manifest: Manifest) -> list[str]:
    return [
        "## ONNX against torch",
        "",
        *(
            f"- {parity.precision}, {parity.input_kind} input {list(parity.shape)}: "
            f"largest difference {parity.max_abs_difference:.2g} "
            f"(at most {parity.tolerance:.2g} allowed)."
            for parity in manifest.parity
        ),
    ]
