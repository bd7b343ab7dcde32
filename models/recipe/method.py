"""What the rest of a pretraining recipe knows of its method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from models.recipe.parts import Part

Defaults = Mapping[str, object]

Sections = Mapping[str, Defaults]
"""Defaults by part of the recipe: `method`, `recipe` (its own fields), `crops`, `optimizer`; of a
recipe in 2D those but the first end with `_2d`."""


class MethodRecipe(Part):
    """Base of every method's numbers; a method adds its `name` and its fields.

    A property here is overridden where the method departs from most.
    """

    TITLE: ClassVar[str]
    """For the model card."""
    DEFAULTS: ClassVar[Sections] = {}
    """What the recipe around the method has, where it differs from the recipe's own defaults."""

    @classmethod
    def defaults(cls, preset: object) -> Sections:
        """`DEFAULTS`, or those of a preset, where the method has presets."""
        return cls.DEFAULTS

    @property
    def is_random(self) -> bool:
        """Whether another seed makes another encoder."""
        return True

    @property
    def trains_decoder(self) -> bool:
        """Whether the network has a decoder, which is then exported with the encoder."""
        return False

    @property
    def has_skips(self) -> bool:
        """Whether that decoder sees the encoder's skips."""
        return True

    @property
    def sees_changed_input(self) -> bool:
        """Whether the network never sees a crop as it is.

        The running statistics of its norms are then taken anew at the end, from clean crops.
        """
        return False

    @property
    def needs_several_scans(self) -> bool:
        """Whether the method says nothing on a single scan."""
        return False

    def num_groups(self, batch_size: int) -> int:
        """Groups of a batch of which each must stay on one process; 1 is all on one."""
        return batch_size

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """Refuse what contradicts the recipe around the method.

        Raises:
            ValueError: Says what.
        """

    def check_crops(self, size: tuple[int, ...]) -> None:
        """Refuse crops that the method cannot use.

        Args:
            size: Extents of the network's input, two or three.

        Raises:
            ValueError: Says what.
        """


def require_volumes(title: str, dims: Literal[2, 3]) -> None:
    """Refuse 2D, for methods of volumes alone.

    Raises:
        ValueError: Names the method.
    """
    if dims == 2:
        raise ValueError(f"{title} is for volumes alone, and the network is in 2D")


def require_blocks(name: str, side: int, size: tuple[int, ...]) -> None:
    """Refuse blocks that do not fill a crop.

    Raises:
        ValueError: Names the field.
    """
    if any(extent % side for extent in size):
        raise ValueError(f"{name} {side} divides not every extent of input_size {size}")
