"""What pretraining learns from: one file a method, listed here and nowhere else."""

from collections.abc import Mapping
from typing import Any

from models.recipe import AnyPretrain
from trainer.methods.method import Method
from trainer.methods.pcrl import Pcrl
from trainer.methods.rotnet import RotNet

METHODS: Mapping[str, type[Method[Any, Any]]] = {"pcrl": Pcrl, "rotnet": RotNet}
"""By the `name` of the recipe's method."""


def make(recipe: AnyPretrain) -> Method[Any, Any]:
    """The recipe's method with random weights, in training."""
    return METHODS[recipe.method.name](recipe).train()
