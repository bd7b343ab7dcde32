"""C2L's own numbers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from models.recipe.method import MethodRecipe, Sections
from models.recipe.pcrl import Contrast, Pushed

_RECIPE = {
    "batch_size": 128,
    "learning_rate": 0.03,
    # 120 epochs of P's 78,468 images of Chest14, or of its 9,968 pairs of LUNA.
    "optimizer": {"schedule": {"kind": "drops", "at": (1 / 2, 2 / 3, 5 / 6), "factor": 0.1}},
}


class C2l(MethodRecipe):
    """Comparing to Learn (Zhou et al., MICCAI 2020): contrast of mixed batches, no decoder.

    The defaults are the official code's. See docs/methods/c2l.md.
    """

    TITLE: ClassVar[str] = "C2L"
    DEFAULTS: ClassVar[Sections] = {
        "recipe": {**_RECIPE, "num_steps": 9_345},
        "recipe_2d": {**_RECIPE, "num_steps": 73_564},
        "crops_2d": {"outpaint_probability": 0.0},
    }

    name: Literal["c2l"] = "c2l"
    embedding_size: PositiveInt = 128
    queue_size: PositiveInt = 16384
    temperature: PositiveFloat = 0.07
    ema_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    mix_alpha: PositiveFloat = 1.0
    """A batch is mixed with itself by lambda from Beta(alpha, alpha), one a step."""
    mix_fold: bool = False
    """Take the larger of lambda and 1 - lambda."""
    contrast_loss: Literal["info_nce", "nce"] = "nce"
    normaliser_momentum: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99
    """Of the average that is `nce`'s normaliser Z; 1 freezes it after the first batch (bug B1)."""
    contrasts: Annotated[tuple[Contrast, ...], Field(min_length=1)] = (
        "views", "mixup", "mixed_key",
    )  # fmt: skip
    """The terms of the loss, which is their mean."""
    push: Annotated[
        tuple[Literal["key", "mixup_key", "mixed_key"], ...], Field(min_length=1)
    ] = ("key", "mixup_key", "mixed_key")  # fmt: skip
    """What enters the queue after a step, in this order."""
    push_when: Literal["after_step", "each_term"] = "each_term"
    """With `each_term` a term's key is among the negatives of the step's later terms."""
    momentum_groups: PositiveInt = 4
    """Shuffled groups in which the momentum encoder normalises a batch (ShuffleBN)."""

    @property
    def mask_same_scan(self) -> bool:
        """Never: a mixed embedding is of two scans."""
        return False

    def num_groups(self, batch_size: int) -> int:
        """The groups in which the momentum encoder normalises."""
        return min(self.momentum_groups, batch_size // 2)

    def check(self, *, batch_size: int, dims: Literal[2, 3]) -> None:
        """The queue holds a step's pushes."""
        pushed = len(self.push) * batch_size
        if self.queue_size < pushed:
            raise ValueError(
                f"queue_size {self.queue_size} is below the {pushed} vectors of one step"
            )

    @model_validator(mode="after")
    def _once(self) -> Self:
        named: dict[str, tuple[Contrast, ...] | tuple[Pushed, ...]] = {
            "contrasts": self.contrasts,
            "push": self.push,
        }
        for name, values in named.items():
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names one thing twice: {', '.join(values)}")
        return self
