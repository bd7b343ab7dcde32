"""What moves the weights in pretraining, and how its rate falls.

The rate itself, `weight_decay` and `momentum` are fields of the recipe, as every optimizer has
them: `momentum` is SGD's, or the first beta of Adam and NAdam.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from models.recipe.parts import Part, Share


class Cosine(Part):
    """From the rate to 0 along half a cosine."""

    kind: Literal["cosine"] = "cosine"


class Drops(Part):
    """The rate times `factor` whenever a share of the run is done (StepLR and MultiStepLR)."""

    kind: Literal["drops"] = "drops"
    at: Annotated[tuple[Share, ...], Field(min_length=1)]
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(before >= after for before, after in pairwise(self.at)):
            raise ValueError(f"at must rise: {self.at}")
        return self


class Constant(Part):
    """The rate, to the end."""

    kind: Literal["constant"] = "constant"


class Optimizer(Part):
    """Which optimizer, and its schedule; the defaults are P's."""

    kind: Literal["sgd", "adam", "adamw", "nadam"] = "sgd"
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Second beta of Adam and NAdam; SGD has none."""
    schedule: Annotated[Cosine | Drops | Constant, Field(discriminator="kind")] = Cosine()
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises from 0, along a line, to what the schedule says."""
