"""Every method's recipe, by its name; one file a method, listed here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Discriminator, Tag

from models.recipe.method import MethodRecipe, Sections
from models.recipe.pcrl import Pcrl
from models.recipe.rotnet import RotNet

METHODS: Mapping[str, type[MethodRecipe]] = {"pcrl": Pcrl, "rotnet": RotNet}


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
    Annotated[Pcrl, Tag("pcrl")] | Annotated[RotNet, Tag("rotnet")],
    Discriminator(_name_of),
]
"""Told apart by `name`."""
