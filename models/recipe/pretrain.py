"""Recipes of pretraining, in 3D and in 2D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from models.recipe.health import Health
from models.recipe.methods import AnyMethod, defaults_of
from models.recipe.optimizer import Optimizer
from models.recipe.parts import (
    TISSUE_HU,
    Part,
    Preprocessing,
    Preprocessing2d,
    ResNetUNet2d,
    UNet3d,
    Window,
)
from models.recipe.pcrl import Pcrl
from models.recipe.views import CropPairs, ImageViews


class _Pretraining(Part):
    """What pretraining has in 3D and in 2D."""

    kind: Literal["pretrain"] = "pretrain"
    method: AnyMethod = Pcrl()
    batch_size: Annotated[int, Field(ge=2)] = 32
    learning_rate: PositiveFloat = 1e-3
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-4
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10
    compile: bool = False
    """Compile the step with torch.compile: minutes once, the same function but for rounding."""

    optimizer: Optimizer = Optimizer()
    """Of which rate, momentum and decay are given above."""

    health: Health = Health()

    ADDED: ClassVar[Mapping[str, object]] = {"optimizer": Optimizer(), "health": Health()}
    DIMS: ClassVar[Literal[2, 3]] = 3

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        in_2d = "_2d" if cls.DIMS == 2 else ""
        of_method = defaults_of(given.get("method", {}))
        own: dict[str, object] = {**of_method.get(f"recipe{in_2d}", {}), **given}
        for part in ("crops", "optimizer"):
            asked = own.get(part, {})
            if isinstance(asked, Mapping):
                own[part] = {**of_method.get(f"{part}{in_2d}", {}), **asked}
        return own

    @model_validator(mode="after")
    def _suits_the_method(self) -> Self:
        self.method.check(batch_size=self.batch_size, dims=self.DIMS)
        return self


class PretrainRecipe(_Pretraining):
    """Self-supervised pretraining; the defaults are P's, or those of `method`."""

    network: UNet3d = UNet3d()
    preprocessing: Preprocessing = Preprocessing()
    crops: CropPairs = CropPairs()
    num_steps: PositiveInt = 74_400
    """240 epochs of 310 steps (P on LUNA)."""
    fused: bool = True
    """Compute the decoder's up-convolutions fused: the same function, a third fewer operations."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.crops.max_tissue is not None:
            window = self.preprocessing.intensity
            if not isinstance(window, Window) or not window.low_hu < TISSUE_HU < window.high_hu:
                raise ValueError(f"max_tissue needs a window that contains {TISSUE_HU} HU")
        self.method.check_crops(self.crops.input_size)
        return self


class PretrainRecipe2d(_Pretraining):
    """Self-supervised pretraining on 2D images; `network` says that it is 2D."""

    network: ResNetUNet2d = ResNetUNet2d()
    preprocessing: Preprocessing2d = Preprocessing2d()
    crops: ImageViews = ImageViews()
    num_steps: PositiveInt = 73_564
    """240 epochs of P's 78,468 images of Chest14."""
    batch_size: Annotated[int, Field(ge=2)] = 256

    DIMS: ClassVar[Literal[2, 3]] = 2

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.method.check_crops((self.crops.input_size, self.crops.input_size))
        return self
