"""docs/methods/pcrl.md gives the value of every field in every preset."""

import json
import re
from pathlib import Path
from typing import Any

from models.presets import PRESETS
from models.recipe import CropPairs, Pcrl, PretrainRecipe

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "methods" / "pcrl.md").read_text("utf-8")
ROW = re.compile(
    r"^\| [^|]+ \| `([a-z_.]+)` \| `([^|]+)` \| `([^|]+)` \| `([^|]+)` \|", re.MULTILINE
)


def value_of(preset: str, field: str) -> Any:
    recipe = PretrainRecipe.model_validate({"method": {"preset": preset}})
    value: Any = json.loads(recipe.model_dump_json())
    for part in field.split("."):
        value = value[part]
    return value


def test_every_value_in_the_table_is_the_recipes() -> None:
    rows = ROW.findall(TEXT)

    for field, *values in rows:
        for preset, value in zip(PRESETS, values, strict=True):
            assert json.loads(value) == value_of(preset, field), f"{field} of {preset}"
    assert len(rows) > 30


def test_every_field_of_the_method_and_the_crops_is_in_the_table() -> None:
    listed = {field for field, *_ in ROW.findall(TEXT)}

    method = {f"method.{name}" for name in Pcrl.model_fields} - {"method.name", "method.preset"}
    crops = {f"crops.{name}" for name in CropPairs.model_fields} - {
        "crops.kind",
        "crops.input_size",
    }
    assert method | crops <= listed
