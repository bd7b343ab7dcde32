"""ImageNet's weights as a method: what radiographs are usually started from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from models.recipe.method import MethodRecipe


class ImageNet(MethodRecipe):
    """A ResNet-18 that was trained on ImageNet, from a file that the user supplies.

    Nothing is trained: no step, batch or optimizer of the recipe is used. See
    docs/methods/imagenet.md.
    """

    TITLE: ClassVar[str] = "ImageNet's labels, by others"

    name: Literal["imagenet"] = "imagenet"
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of the file that is meant; another one is refused. None takes any."""

    @property
    def is_random(self) -> bool:
        """The encoder is what the file says."""
        return False

    def num_groups(self, batch_size: int) -> int:
        """There is nothing to share out."""
        return 1

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """The weights are of a 2D network."""
        if dims == 3:
            raise ValueError("imagenet is for resnet18_unet2d alone, in 2D; this is 3D")
