"""Training on the box of a label: what a network behind another one will see."""

from pathlib import Path

import numpy as np
import pytest
import torch

from imaging import nifti
from models import bundle
from models.recipe import FinetuneRecipe
from trainer import finetune
from trainer.data.cache import VolumeCache
from trainer.data.label_crop import cropped
from trainer.data.scans import discover
from trainer.errors import DataError

CPU = torch.device("cpu")


def with_crop(recipe: FinetuneRecipe, **crop: object) -> FinetuneRecipe:
    fields = recipe.model_dump()
    return FinetuneRecipe.model_validate(fields | {"crop": crop})


def case_of(tmp_path: Path, recipe: FinetuneRecipe, labels: np.ndarray):
    """Voxels that say where they are, at the recipe's own spacing."""
    place = np.arange(labels.size).reshape(labels.shape) % 4001 / 10 - 200
    nifti.write(tmp_path / "x_image.nii", place.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
    nifti.write(tmp_path / "x_label.nii", labels, np.diag([2.0, 2.0, 2.0, 1.0]))
    scan = discover(tmp_path).scans[0]
    return VolumeCache(tmp_path / "cache").labelled(scan, recipe)


@pytest.fixture
def labels() -> np.ndarray:
    made = np.zeros((40, 36, 44), np.uint8)
    made[10:30, 12:31, 3:21] = 1
    made[14:16, 20:22, 30:32] = 2  # outside of the organ's box
    return made


@pytest.mark.parametrize(
    ("crop", "first", "stop"),
    [
        ({"labels": ["organ"], "margin_voxels": 2}, (8, 10, 1), (32, 33, 23)),
        ({"labels": ["organ"], "margin_voxels": 5}, (5, 7, 0), (35, 36, 26)),
        ({"margin_voxels": 0}, (10, 12, 3), (30, 31, 32)),
        ({"labels": ["lesion"], "margin_voxels": 0}, (7, 13, 23), (23, 29, 39)),  # a patch large
    ],
)
def test_a_scan_is_cut_to_its_labels_box_and_margin(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, labels: np.ndarray, crop, first, stop
) -> None:
    recipe = with_crop(finetune_recipe, **crop)
    whole = case_of(tmp_path, recipe, labels)

    cut = cropped(whole, recipe)

    at = tuple(slice(a, b) for a, b in zip(first, stop, strict=True))
    np.testing.assert_array_equal(cut.labels, labels[at])
    np.testing.assert_array_equal(cut.channels[0].image, whole.channels[0].image[at])
    assert cut.channels[0].grid.shape == cut.labels.shape
    np.testing.assert_allclose(
        cut.channels[0].grid.affine @ [0, 0, 0, 1],
        whole.channels[0].grid.affine @ [*first, 1],
    )
    assert cropped(whole, finetune_recipe) is whole  # the control: no crop asked for


def test_a_region_is_cut_to_all_its_values(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, labels: np.ndarray
) -> None:
    fields = finetune_recipe.model_dump() | {
        "labels": {},
        "regions": {"both": [2, 1], "small": [2]},
        "crop": {"labels": ["both"], "margin_voxels": 0},
    }
    recipe = FinetuneRecipe.model_validate(fields)

    cut = cropped(case_of(tmp_path, recipe, labels), recipe)

    assert cut.labels.shape == (20, 19, 29)


def test_a_scan_without_the_label_is_refused_by_name(
    tmp_path: Path, finetune_recipe: FinetuneRecipe, labels: np.ndarray
) -> None:
    recipe = with_crop(finetune_recipe, labels=["lesion"])
    labels[labels == 2] = 0
    case = case_of(tmp_path, recipe, labels)

    with pytest.raises(DataError, match="scan x holds none of lesion") as caught:
        cropped(case, recipe)

    assert caught.value.code == "unusable_labels"
    with pytest.raises(ValueError, match="kidney"):
        with_crop(finetune_recipe, labels=["kidney"])


@pytest.mark.usefixtures("without_onnx")
def test_a_training_on_boxes_says_so_and_stores_its_threshold(
    tmp_path: Path, scan_folder: Path, finetune_recipe: FinetuneRecipe, report
) -> None:
    recipe = with_crop(finetune_recipe, labels=["organ"], margin_voxels=2).model_copy(
        update={"num_steps": 4, "validate_every": 4, "quality_min_dice": 0.0}
    )
    never = recipe.model_copy(update={"quality_min_dice": 1.0})

    folders = [
        finetune.run(
            one, discover(scan_folder), tmp_path / str(number), report,
            device=CPU, should_stop=lambda: False, cache=tmp_path / "cache",
        )
        for number, one in enumerate((recipe, never))
    ]  # fmt: skip

    quality = bundle.load(folders[0]).quality
    assert quality is not None
    assert (quality.num_cases, quality.num_good, quality.split) == (1, 1, "val")
    assert 0 < quality.max_foreground_entropy <= 1
    assert "quality" in bundle.onnx_metadata(bundle.load(folders[0]))
    strict = bundle.load(folders[1]).quality
    assert strict is not None
    assert (strict.num_good, strict.max_foreground_entropy) == (0, 0.0)
    card = (folders[0] / "card.md").read_text(encoding="utf-8")
    assert "Trained and measured on the box of organ with 2 voxels" in card
    assert "to be reviewed" in card
