"""What pretraining learns from: one file a method, listed here and nowhere else."""

from collections.abc import Mapping
from typing import Any

from models.recipe import AnyPretrain
from trainer.errors import DataError
from trainer.methods.c2l import C2l
from trainer.methods.cpc3d import Cpc3d
from trainer.methods.mae import Mae
from trainer.methods.method import Method
from trainer.methods.models_genesis import ModelsGenesis
from trainer.methods.pcrl import Pcrl
from trainer.methods.pcrlv2 import PcrlV2
from trainer.methods.rotnet import RotNet
from trainer.methods.rubiks_cube import RubiksCube
from trainer.methods.semantic_genesis import SemanticGenesis

METHODS: Mapping[str, type[Method[Any, Any]]] = {
    "pcrl": Pcrl,
    "c2l": C2l,
    "pcrlv2": PcrlV2,
    "rotnet": RotNet,
    "cpc3d": Cpc3d,
    "mae": Mae,
    "models_genesis": ModelsGenesis,
    "rubiks_cube": RubiksCube,
    "semantic_genesis": SemanticGenesis,
}
"""By the `name` of the recipe's method."""


def make(recipe: AnyPretrain) -> Method[Any, Any]:
    """The recipe's method with random weights, in training.

    Raises:
        DataError: `nothing_to_train`: weights from a file need no training (`trainer.imagenet`).
    """
    if recipe.method.name not in METHODS:
        raise DataError("nothing_to_train", f"{recipe.method.name} is made by --weights FILE")
    return METHODS[recipe.method.name](recipe).train()
