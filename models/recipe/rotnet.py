"""RotNet's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from models.recipe.method import Defaults, MethodRecipe


class RotNet(MethodRecipe):
    """By how many quarter turns was the crop turned (Gidaris et al., ICLR 2018).

    Turns are in the plane of the first two axes, as P's. See docs/methods/rotnet.md.
    """

    TITLE: ClassVar[str] = "RotNet"
    DEFAULTS: ClassVar[Mapping[str, Defaults]] = {}

    name: Literal["rotnet"] = "rotnet"
    corrupted: bool = False
    """Show the network painted and blurred crops, as PCRL's ordinary encoder sees them."""
