"""Bundles for the inference benchmarks: an untrained segmenter of any width, and a trained one.

The trained one learns the liver from CT of the shared folder, of which the scan that is measured is
left out; without the folder it learns from phantoms. It is kept in a git-ignored folder and made
once.
"""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from imaging import phantom
from models import bundle
from models.bundle import Lineage, Manifest, TensorSpec
from models.networks.unet3d import UNet3d, fold
from models.recipe import FinetuneRecipe, Preprocessing, Size, Window
from models.recipe import UNet3d as Network
from models.recipe.finetune import SplitShares
from trainer import export, finetune
from trainer.data.scans import discover
from trainer.report import Human

SHARED = next(
    (
        folder
        for above in Path(__file__).parents
        if (folder := above / "shared" / "data" / "ct_liver_btcv").is_dir()
    ),
    Path("no shared folder"),
)
HELD_OUT = "btcv_01"
"""The scan that is measured, and never learned from."""
PATCH: Size = (96, 96, 64)
"""Windows of the comparison with MONAI."""
TRAINED_PATCH: Size = (64, 64, 48)
"""What a CPU learns from in minutes; at 3 mm that is most of an abdomen."""
SPACING_MM = (3.0, 3.0, 3.0)
LIVER_IN_BTCV = 6


def untrained(
    folder: Path,
    *,
    width: int,
    labels: tuple[str, ...] = ("liver", "tumour"),
    patch: Size = PATCH,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    overlap: float = 0.5,
) -> Path:
    """A segmenter with random weights, exported fused; for memory and time."""
    network = random_network(width, len(labels))
    spatial = ("batch", 1, "8*i8", "8*j8", "8*k8")
    preprocessing = Preprocessing(
        spacing_mm=spacing_mm, intensity=Window(low_hu=-125.0, high_hu=275.0)
    )
    manifest = Manifest(
        kind="segmenter",
        labels=labels,
        inputs=(TensorSpec(name="image", shape=spatial),),
        outputs=(TensorSpec(name="logits", shape=("batch", 1 + len(labels), *spatial[2:])),),
        preprocessing=preprocessing,
        patch_size=patch,
        overlap=overlap,
        recipe=FinetuneRecipe(
            network=Network(base_width=width),
            labels={name: value for value, name in enumerate(labels, start=1)},
            preprocessing=preprocessing,
            patch_size=patch,
        ),
        lineage=Lineage(
            dataset_digest="0" * 64,
            seed=0,
            num_steps=0,
            code_version="benchmark",
            torch_version=torch.__version__,
        ),
        parity=(),
        created_at=datetime.now(UTC),
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / bundle.MODEL
        export.to_onnx(fold(network), model, manifest, bundle.onnx_metadata(manifest))
        bundle.save(folder, manifest, {bundle.MODEL: model}, "# Benchmark\n")
    return folder


def random_network(width: int, num_labels: int, *, fused: bool = True) -> UNet3d:
    """The same random weights every time, in eval mode."""
    torch.manual_seed(0)
    out_channels = 1 + num_labels
    network = UNet3d(out_channels=out_channels, base_width=width, norm="group", fused=fused)
    return network.eval()


def trained(
    cache: Path,
    *,
    width: int,
    num_steps: int,
    threads: int,
    spacing_mm: float = SPACING_MM[0],
    patch: Size = TRAINED_PATCH,
    parent: Path | None = None,
    device: str = "cpu",
) -> Path:
    """A segmenter of the liver, learned once and kept under `cache`; see the module.

    Args:
        cache: Where it is kept, by what follows but for threads, parent and device.
        width: Base width of the network.
        num_steps: Of the training.
        threads: Of torch.
        spacing_mm: Of its voxels.
        patch: What it learns from.
        parent: Segmenter whose weights it starts from, at whatever spacing; None: random ones.
        device: `cpu` or `cuda`, on which it learns.
    """
    is_real = SHARED.is_dir()
    out = cache / f"{'btcv' if is_real else 'phantom'}-w{width}-s{num_steps}"
    if spacing_mm != SPACING_MM[0]:
        out = out.with_name(f"{out.name}-{spacing_mm:g}mm")
    if (out / "bundle").is_dir():
        return out / "bundle"
    scans = _real_scans(cache) if is_real else _phantoms(cache)
    recipe = FinetuneRecipe(
        network=Network(base_width=width),
        labels={"liver": LIVER_IN_BTCV if is_real else phantom.LIVER},
        unlisted_labels="background",
        preprocessing=Preprocessing(
            spacing_mm=(spacing_mm,) * 3, intensity=Window(low_hu=-125.0, high_hu=275.0)
        ),
        patch_size=patch,
        transfer="encoder" if parent is None else "encoder_decoder",
        batch_size=1,
        learning_rate=1e-3,
        schedule="cosine",
        num_steps=num_steps,
        validate_every=num_steps,
        checkpoint_every=100,
        log_every=50,
        split=SplitShares(train=0.93, val=0.07, test=0.0),
        overlap=0.25,
        foreground_share=0.5,  # half of what it sees lies anywhere, as a scan does
    )
    torch.set_num_threads(threads)
    return finetune.run(
        recipe,
        discover(scans, channels=recipe.channels, shares=recipe.split),
        out,
        Human(),
        device=torch.device(device),
        should_stop=lambda: False,
        parent=parent,
    )


def _real_scans(cache: Path) -> Path:
    """A folder of links to all scans but the one that is measured."""
    folder = cache / "scans"
    folder.mkdir(parents=True, exist_ok=True)
    for path in SHARED.glob("*.nii.gz"):
        link = folder / path.name
        if not path.name.startswith(HELD_OUT) and not link.is_symlink():
            link.symlink_to(path)
    return folder


def _phantoms(cache: Path) -> Path:
    folder = cache / "phantoms"
    for seed in range(1, 9):
        made = phantom.make(seed)
        phantom.write_pair(made, folder, f"phantom_{seed:02d}")
    return folder
