"""Fine-tuning recipes: the documented ones are real, and contradictions are refused."""

import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from models.recipe import ClassifyRecipe, FinetuneRecipe, Recipe

ROOT = Path(__file__).parents[2]


def test_the_documented_recipes_are_the_papers() -> None:
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)

    recipes = [TypeAdapter(Recipe).validate_python(json.loads(block)) for block in blocks]
    liver, brats, nodule, chest, cleaned, second = recipes

    assert (liver.patch_size, liver.batch_size, liver.learning_rate) == ((256, 256, 64), 4, 1e-4)
    assert (liver.split.train, liver.split.val, liver.split.test) == (0.7, 0.1, 0.2)
    assert len(brats.channels) == 4 and brats.targets == ("whole_tumour", "core", "enhancing")
    assert brats.values == {"value 1": 1, "value 2": 2, "value 4": 4}
    assert (nodule.input_size, nodule.batch_size, nodule.norm) == ((64, 64, 32), 32, "batch")
    assert chest.network.kind == "resnet18_unet2d" and chest.norm == "batch"
    assert cleaned.postprocess.parts == {"liver": ("tumour",)}
    assert not liver.postprocess.changes_masks
    assert liver.crop is None
    assert (second.crop.labels, second.crop.margin_voxels) == (("liver",), 30)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (FinetuneRecipe, {}, "labels or in regions"),
        (FinetuneRecipe, {"labels": {"a": 1}, "regions": {"b": (1,)}}, "labels or in regions"),
        (FinetuneRecipe, {"regions": {"a": ()}}, "regions.a"),
        (FinetuneRecipe, {"labels": {"a": 1, "b": 1}}, "share a value"),
        (FinetuneRecipe, {"labels": {"a": 1}, "channels": ("t1", "t1")}, "channel is named twice"),
        (FinetuneRecipe, {"labels": {"a": 1}, "channels": ()}, "channels"),
        (FinetuneRecipe, {"labels": {"a": 1}, "split": {"train": 0.0}}, "split.train"),
        (ClassifyRecipe, {"labels": ()}, "labels"),
        (ClassifyRecipe, {"labels": ("a", "a")}, "label is named twice"),
        (ClassifyRecipe, {"labels": ("a",), "exclusive": True}, "at least two"),
        (ClassifyRecipe, {"labels": ("a",), "input_size": (64, 64, 30)}, "multiples of 8"),
        (ClassifyRecipe, {"labels": ("a",), "input_size": (64, 32, 32)}, "I == J"),
        (ClassifyRecipe, {"labels": ("a",), "batch_size": 1}, "batch norm"),
    ],
)
def test_contradictions_are_refused(kind, change, reason) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(change)

    first = refused.value.errors()[0]
    assert reason in ".".join(map(str, first["loc"])) + " " + first["msg"]


def test_without_turns_an_input_need_not_be_square() -> None:
    oblong = ClassifyRecipe(labels=("a",), input_size=(64, 32, 32), quarter_turns=False)

    assert oblong.input_size == (64, 32, 32)
    with pytest.raises(ValueError, match="quarter turns"):
        ClassifyRecipe(labels=("a",), input_size=(64, 32, 32), quarter_turns=True)
