"""Recipes of methods: told apart by name, with defaults of their own; old recipes as they were."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from models.recipe import METHODS, AnyRecipe, Pcrl, PretrainRecipe, PretrainRecipe2d, Recipe

ADAPTER: TypeAdapter[AnyRecipe] = TypeAdapter(Recipe)

DIGESTS = {
    "paper": "175e607768a80c5a965756bbff7da72460f7db72a8b0c00eb15afdda4ffb9444",
    "official": "09610404fce9e357866e78f5b217a4a220afd5c26aee300673a8323f4bc1344f",
    "recommended": "b6ef29c3e94e91b15d17e9a3428154b69b4839de75e0a4edf1a26fd83ef90073",
}
"""As version 0.1 named them, when PCRL with SGD was all there was."""


@pytest.mark.parametrize(("preset", "digest"), DIGESTS.items())
def test_a_recipe_of_before_there_were_methods_keeps_its_name(preset: str, digest: str) -> None:
    recipe = PretrainRecipe.model_validate({"method": {"preset": preset}})
    other = recipe.model_copy(
        update={"optimizer": recipe.optimizer.model_copy(update={"beta2": 0.5})}
    )

    assert recipe.digest() == digest
    assert other.digest() != digest


def test_a_method_without_a_name_is_pcrl() -> None:
    assert isinstance(PretrainRecipe.model_validate({"method": {}}).method, Pcrl)
    assert PretrainRecipe.model_validate({"method": {"name": "pcrl"}}) == PretrainRecipe()


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="'pcrl', 'c2l', 'pcrlv2', 'rotnet'"):
        PretrainRecipe.model_validate({"method": {"name": "magic"}})
    with pytest.raises(ValidationError, match="name"):
        PretrainRecipe.model_validate({"method": {"name": ["pcrl"]}})


@pytest.mark.parametrize("network", ["unet3d", "resnet18_unet2d"])
@pytest.mark.parametrize("name", METHODS)
def test_a_methods_recipe_comes_back_from_its_json_as_itself(name: str, network: str) -> None:
    given = {"kind": "pretrain", "network": {"kind": network}, "method": {"name": name}}
    try:
        recipe = ADAPTER.validate_python(given)
    except ValidationError as error:
        assert "3D" in str(error) or "2D" in str(error), error
        return

    again = ADAPTER.validate_json(recipe.model_dump_json())

    assert again == recipe and again.digest() == recipe.digest()
    assert isinstance(recipe, PretrainRecipe2d if network == "resnet18_unet2d" else PretrainRecipe)
    assert json.loads(recipe.model_dump_json())["method"]["name"] == name
