"""Every method's recipe, by its name; one file a method, listed here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Discriminator, Tag

from models.recipe.c2l import C2l
from models.recipe.cpc3d import Cpc3d
from models.recipe.imagenet import ImageNet
from models.recipe.mae import Mae
from models.recipe.method import MethodRecipe, Sections
from models.recipe.models_genesis import ModelsGenesis
from models.recipe.pcrl import Pcrl
from models.recipe.pcrlv2 import PcrlV2
from models.recipe.rotnet import RotNet
from models.recipe.rubiks_cube import RubiksCube
from models.recipe.semantic_genesis import SemanticGenesis

METHODS: Mapping[str, type[MethodRecipe]] = {
    "pcrl": Pcrl,
    "c2l": C2l,
    "pcrlv2": PcrlV2,
    "rotnet": RotNet,
    "cpc3d": Cpc3d,
    "imagenet": ImageNet,
    "mae": Mae,
    "models_genesis": ModelsGenesis,
    "rubiks_cube": RubiksCube,
    "semantic_genesis": SemanticGenesis,
}


def _name_of(given: object) -> object:
    """PCRL where none is given, as before there were others."""
    if isinstance(given, Mapping):
        return given.get("name", "pcrl")
    return getattr(given, "name", None)


def defaults_of(given: object) -> Sections:
    """What a method, as given, fills into the recipe around it; nothing for an unknown one."""
    name = _name_of(given)
    kind = METHODS.get(name) if isinstance(name, str) else None
    if kind is None:
        return {}
    if isinstance(given, Mapping):
        return kind.defaults(given.get("preset"))
    return kind.defaults(getattr(given, "preset", None))


AnyMethod = Annotated[
    Annotated[Pcrl, Tag("pcrl")]
    | Annotated[C2l, Tag("c2l")]
    | Annotated[PcrlV2, Tag("pcrlv2")]
    | Annotated[RotNet, Tag("rotnet")]
    | Annotated[Cpc3d, Tag("cpc3d")]
    | Annotated[ImageNet, Tag("imagenet")]
    | Annotated[Mae, Tag("mae")]
    | Annotated[ModelsGenesis, Tag("models_genesis")]
    | Annotated[RubiksCube, Tag("rubiks_cube")]
    | Annotated[SemanticGenesis, Tag("semantic_genesis")],
    Discriminator(_name_of),
]
"""Told apart by `name`."""
