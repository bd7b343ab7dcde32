"""What a training job asks for.

Every number of the method is a field whose default is the paper's (Zhou et al., ICCV 2021; "P").
`method.preset` names another set of defaults (`models.presets`): it fills in the fields that were
not given, in `method`, `crops` and the recipe itself, so a validated recipe always says all.
A recipe is frozen, refuses unknown fields, and its `digest` names it in manifests and caches.

Axes are (I, J, K) in RAS+; sizes in voxels of the resampled grid, spacing in mm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Discriminator, GetJsonSchemaHandler, Tag
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from models.recipe.c2l import C2l
from models.recipe.cpc3d import Cpc3d
from models.recipe.finetune import (
    ClassifyRecipe,
    ClassifyRecipe2d,
    FinetuneRecipe,
    LabelCrop,
    LabelledShare,
    SplitShares,
)
from models.recipe.imagenet import ImageNet
from models.recipe.mae import Mae
from models.recipe.method import MethodRecipe
from models.recipe.methods import METHODS, AnyMethod
from models.recipe.models_genesis import ModelsGenesis
from models.recipe.optimizer import Constant, Cosine, Drops, Optimizer
from models.recipe.parts import (
    TISSUE_HU,
    Connectivity,
    LabelName,
    LabelValue,
    Normalisation,
    OwnRange,
    Part,
    Percentiles,
    Postprocess,
    Preprocessing,
    Preprocessing2d,
    ResNetUNet2d,
    Share,
    Size,
    Size2d,
    SpacingMm,
    UNet3d,
    Window,
    ZScore,
)
from models.recipe.pcrl import Contrast, Pcrl, Pushed, Reconstruction
from models.recipe.pcrlv2 import PcrlV2
from models.recipe.pretrain import PretrainRecipe, PretrainRecipe2d
from models.recipe.rotnet import RotNet
from models.recipe.rubiks_cube import RubiksCube
from models.recipe.semantic_genesis import SemanticGenesis
from models.recipe.views import CropPairs, ImageCrops, ImageViews

__all__ = [
    "METHODS",
    "TISSUE_HU",
    "AnyClassify",
    "AnyForm",
    "AnyMethod",
    "AnyPretrain",
    "AnyRecipe",
    "C2l",
    "ClassifyRecipe",
    "ClassifyRecipe2d",
    "Connectivity",
    "Constant",
    "Contrast",
    "Cosine",
    "Cpc3d",
    "CropPairs",
    "Drops",
    "FinetuneRecipe",
    "ImageCrops",
    "ImageNet",
    "ImageViews",
    "LabelCrop",
    "LabelName",
    "LabelValue",
    "LabelledShare",
    "Mae",
    "MethodRecipe",
    "ModelsGenesis",
    "Normalisation",
    "Optimizer",
    "OwnRange",
    "Part",
    "Pcrl",
    "PcrlV2",
    "Percentiles",
    "Postprocess",
    "Preprocessing",
    "Preprocessing2d",
    "PretrainRecipe",
    "PretrainRecipe2d",
    "Pushed",
    "Recipe",
    "Reconstruction",
    "ResNetUNet2d",
    "RotNet",
    "RubiksCube",
    "SemanticGenesis",
    "Share",
    "Size",
    "Size2d",
    "SpacingMm",
    "SplitShares",
    "UNet3d",
    "Window",
    "ZScore",
    "recipe_form",
]

AnyPretrain = PretrainRecipe | PretrainRecipe2d
AnyClassify = ClassifyRecipe | ClassifyRecipe2d
AnyRecipe = AnyPretrain | FinetuneRecipe | AnyClassify


def recipe_form(given: object) -> str | None:
    """Kind of a recipe, and whether its network is 2D."""

    def of(part: object, name: str) -> object:
        return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)

    kind = of(given, "kind")
    in_2d = of(of(given, "network"), "kind") == "resnet18_unet2d"
    has_2d = kind in ("pretrain", "classify")
    return f"{kind}_2d" if in_2d and has_2d else kind if isinstance(kind, str) else None


class AnyForm:
    """Has the JSON schema of a recipe say that it may fit several forms, not that it fits one.

    One without a `network` fits the schema of 3D and of 2D; `recipe_form` says which it is.
    """

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema of the union, with `anyOf` for `oneOf`."""
        schema = handler(core_schema)
        schema["anyOf"] = schema.pop("oneOf")
        return schema


Recipe = Annotated[
    Annotated[PretrainRecipe, Tag("pretrain")]
    | Annotated[PretrainRecipe2d, Tag("pretrain_2d")]
    | Annotated[FinetuneRecipe, Tag("finetune")]
    | Annotated[ClassifyRecipe, Tag("classify")]
    | Annotated[ClassifyRecipe2d, Tag("classify_2d")],
    Discriminator(recipe_form),
    AnyForm(),
]
"""Told apart by `kind`, and by `network.kind` where there are both."""
